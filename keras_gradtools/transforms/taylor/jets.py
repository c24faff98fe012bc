r"""A forward pass that carries a set of mixed partial derivatives of each value.

A key names a derivative: a sorted tuple of variables, `(0, 1, 1)` for $\partial_0 \partial_1^2$. With a key, the set
also holds all keys that remain when variables are removed from it, because the chain rule needs these:

- elementwise: $f(u)_\alpha = \sum_\pi f^{(|\pi|)}(u) \prod_{\beta \in \pi} u_\beta$, over the partitions of $\alpha$
  (Faa di Bruno's formula),
- products and bilinear operations: $(u v)_\alpha = \sum_\beta u_\beta v_{\alpha - \beta}$ (Leibniz' rule),
- linear operations: those of the input, all at once,
- all others: derivatives of derivatives of this one operation.

Source: Griewank & Walther, "Evaluating Derivatives" (2008), chapter 13.
"""

import collections
import functools
import itertools
from typing import Any, NamedTuple

from keras import ops

from keras_gradtools.backend import steps as kinds
from keras_gradtools.tape import vectors
from keras_gradtools.transforms.taylor import elementwise, stacks


class Jet(NamedTuple):
    """The derivatives of one value by key. One that is missing is zero.

    With `is_uniform`, they are equal for all examples, and have size 1 along the batch axis.
    """

    parts: dict[tuple, Any]
    is_uniform: bool = False


def closure(keys):
    """`keys` and all that remain when variables are removed from them, the shortest first, without the empty one."""
    found = {
        tuple(sorted(part)) for key in keys for n in range(1, len(key) + 1) for part in itertools.combinations(key, n)
    }
    return sorted(found, key=lambda key: (len(key), key))


def push(steps, slots, jets, keys):
    """Runs the pass over `steps`, from the `Jet` of each source slot. Returns the `Jet` by slot."""
    state = dict(zip(slots, jets, strict=True))
    for step in steps:
        given = [state.get(slot) for slot in step.inputs]
        if any(jet is not None and jet.parts for jet in given):
            for slot, jet in zip(step.outputs, _through(step, given, keys), strict=True):
                state[slot] = jet
    return state


def at_targets(call, parts, seeds, keys):
    """The derivatives of each target of a call by key, from the `Jet` of each source.

    `parts` are those of `backend.steps_between`.
    """
    steps, targets, sources = parts
    present = [(slot, seed) for slot, seed in zip(sources, seeds, strict=True) if slot is not None]
    state = push(steps, [slot for slot, _ in present], [seed for _, seed in present], keys)
    return [full(state.get(slot), y) for slot, y in zip(targets, call.flat_targets, strict=True)]


def packed(call, by_target, key):
    """One derivative in the structure of the target of a call, with zeros where it is missing."""
    leaves = [
        ops.broadcast_to(parts[key], ops.shape(y)) if key in parts else vectors.zeros(y)
        for parts, y in zip(by_target, call.flat_targets, strict=True)
    ]
    return vectors.pack_as(call.target, leaves)


def full(jet, x):
    """The derivatives by key, for each example of `x`."""
    if jet is None:
        return {}
    if not jet.is_uniform:
        return jet.parts
    return {key: ops.broadcast_to(part, ops.shape(x)) for key, part in jet.parts.items()}


def _through(step, given, keys):
    if all(jet is not None and jet.is_uniform for jet in given):
        if (found := _linear(step, [jet.parts for jet in given], step.push_uniform, True)) is not None:
            return [Jet(parts, True) for parts in found]
        if step.kind == kinds.ELEMENTWISE:
            return [Jet(_elementwise(step, given[0].parts, keys))]
    parts = [full(jet, x) for jet, x in zip(given, step.primals, strict=True)]
    if step.kind == kinds.ELEMENTWISE:
        return [Jet(_elementwise(step, parts[0], keys))]
    if step.kind == kinds.PRODUCT:
        return [Jet(_leibniz(lambda a, b: [a * b], step, parts, keys)[0])]
    if step.kind == kinds.BILINEAR:
        return [Jet(found) for found in _leibniz(step.call, step, parts, keys)]
    if step.kind == kinds.LINEAR:
        found = _linear(step, parts, step.push_linear)
        return [Jet(p) for p in found or _linear(step, parts, step.push_stacks)]
    return [Jet(found) for found in _general(step, parts, keys)]


def _linear(step, parts, push, is_uniform=False):
    present = sorted({key for part in parts for key in part}, key=lambda key: (len(key), key))

    def zeros(x):
        # With size 1 along the batch axis, also if there are no examples.
        return ops.zeros((1, *ops.shape(x)[1:]), dtype=x.dtype) if is_uniform else ops.zeros_like(x)

    rows = [
        stacks.of_rows([part[key] if key in part else zeros(x) for key in present])
        for part, x in zip(parts, step.primals, strict=True)
    ]
    found = push(rows)
    if found is None:
        return None
    return [{key: stacks.row(stack, i) for i, key in enumerate(present)} for stack in found]


def _elementwise(step, parts, keys):
    # All derivatives of a piecewise linear function but the first are zero.
    order = 1 if step.is_piecewise_linear else max(_highest(parts, keys), 1)
    slopes = elementwise.derivatives(step, order)
    found = {}
    for key in keys:
        total = None
        for blocks, count in _partitions(key).items():
            if len(blocks) <= order and all(block in parts for block in blocks):
                term = slopes[len(blocks) - 1]
                for block in blocks:
                    term = term * parts[block]
                term = term if count == 1 else count * term
                total = term if total is None else total + term
        if total is not None:
            found[key] = total
    return found


def _highest(parts, keys):
    """The highest derivative of an elementwise function that any key needs."""
    return max(
        (len(blocks) for key in keys for blocks in _partitions(key) if all(block in parts for block in blocks)),
        default=0,
    )


@functools.cache
def _partitions(key):
    """How often each way to split `key` into blocks occurs."""
    if not key:
        return collections.Counter([()])
    found = collections.Counter()
    # The block of the last variable, and all ways to split the others.
    for (block, rest), count in _splits(key[:-1]).items():
        for blocks, times in _partitions(rest).items():
            found[tuple(sorted((*blocks, (*block, key[-1]))))] += count * times
    return found


@functools.cache
def _splits(key):
    """How often each way to divide `key` between two factors occurs."""
    places = range(len(key))
    return collections.Counter(
        (tuple(key[i] for i in left), tuple(key[i] for i in places if i not in left))
        for n in range(len(key) + 1)
        for left in itertools.combinations(places, n)
    )


def _leibniz(multiply, step, parts, keys):
    first, second = ({(): x, **part} for x, part in zip(step.primals, parts, strict=True))
    found = [{} for _ in step.outputs]
    for key in keys:
        total = None
        for (left, right), count in _splits(key).items():
            if left in first and right in second:
                terms = [t if count == 1 else count * t for t in multiply(first[left], second[right])]
                total = terms if total is None else [t + u for t, u in zip(total, terms, strict=True)]
        for column, term in zip(found, total or [], strict=False):
            column[key] = term
    return found


def _general(step, parts, keys):
    """Each derivative with a perturbation of its own for each of its variables."""
    found = [{} for _ in step.outputs]
    for key in keys:
        if not any(
            tuple(key[i] for i in c) in part
            for part in parts
            for n in range(len(key))
            for c in itertools.combinations(range(len(key)), n + 1)
        ):
            continue
        for column, term in zip(found, _mixed(step, parts, key), strict=True):
            column[key] = term
    return found


def _mixed(step, parts, key):
    """One mixed derivative of an operation: a jvp for each variable, of what has been differentiated so far.

    The arguments are the derivatives of the inputs for each subset of the variables. Those whose subset has the last
    variable are the tangents of the others.
    """

    def of_subset(bits):
        inner = tuple(v for i, v in enumerate(key) if bits >> i & 1)
        if not inner:
            return list(step.primals)
        return [
            part[inner] if inner in part else ops.zeros_like(x) for part, x in zip(parts, step.primals, strict=True)
        ]

    def differentiated(fun):
        def derivative(*args):
            half = len(args) // 2
            return step.jvp(fun, args[:half], args[half:])

        return derivative

    fun = step.call
    for _ in key:
        fun = differentiated(fun)
    return fun(*(x for bits in range(2 ** len(key)) for x in of_subset(bits)))
