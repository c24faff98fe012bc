r"""The forward Laplacian: one pass that carries first derivatives and the *sum* of second derivatives.

For directions $v_d$, every value $y$ has its derivatives $J_d = \partial_{v_d} y$, as one stack, and the sum
$S = \sum_d \partial_{v_d} \partial_{w_d} y$. An operation $z = f(y)$ maps them to

$$J_d \mapsto f' J_d, \qquad S \mapsto f' S + \sum_d f''[J_d, K_d],$$

where $K_d = \partial_{w_d} y$, which is $J_d$ for the Laplacian. The second derivatives are summed at each operation,
so none of them is carried on alone. On request they are not summed but carried as a stack, for the variance of a random
estimate.

Source: Li et al., "A computational framework for neural network-based variational Monte Carlo with forward Laplacian"
(arXiv:2307.08214, 2023); Dangel et al., "Collapsing Taylor mode automatic differentiation" (arXiv:2505.13644, 2025).
"""

from typing import Any, NamedTuple

from keras import ops

from keras_gradtools.backend import steps as kinds
from keras_gradtools.transforms.taylor import elementwise, stacks


class Carried(NamedTuple):
    """The derivatives of one value. With `is_uniform`, those in `first` are equal for all examples: batch axis 1.

    `first` is a stack, or None where no later step needs it. With pairs of directions, it holds the derivatives along
    all $v_d$, then along all $w_d$. `summed` is None while it is zero. It is a stack, too, if the second derivatives
    are kept apart.
    """

    first: Any = None
    summed: Any = None
    is_uniform: bool = False


class Sum(NamedTuple):
    """Which second derivatives are summed.

    `order` is 1 if there are none. `weights` is None, or a vector with a factor for each direction. With `pairs`, the
    second half of the directions are the $w_d$. Otherwise $w_d = v_d$. With `apart`, nothing is summed: the second
    derivatives are carried as a stack.
    """

    order: int = 2
    weights: Any = None
    pairs: bool = False
    apart: bool = False

    def summed(self, stack):
        return stack if self.apart else stacks.summed(stack)

    def times(self, summed, factor, rank=0):
        """The product of a sum, or of a stack of second derivatives, and a value. `rank` is that of the product."""
        if self.apart:
            return stacks.stretched(summed, rank) * stacks.against(factor, rank)
        return summed * factor

    def halves(self, stack):
        """The two stacks whose products are summed: the derivatives along $v_d$, and along $w_d$ with the weights."""
        if self.pairs:
            return stacks.halves(stack)
        return stack, stack if self.weights is None else stacks.weighted(stack, self.weights)


def push(steps, slots, carried, total, target):
    """Runs the pass over `steps`, from the `Carried` of each source slot. Returns the `Carried` of the target slot.

    None if the target does not depend on the sources. First derivatives that no sum needs are left out.
    """
    state = dict(zip(slots, carried, strict=True))
    for step, needs_first in _needed(steps, total, target):
        given = [state.get(slot) for slot in step.inputs]
        if any(c is not None for c in given):
            for slot, found in zip(step.outputs, _through(step, given, total, needs_first), strict=True):
                state[slot] = found
    return state.get(target)


def _needed(steps, total, target):
    """The steps that the target depends on, each with whether the first derivatives of its results are needed."""
    is_all = total.apart or total.order == 1
    used, first, found = {target}, {target} if is_all else set(), []
    for step in reversed(steps):
        if used.isdisjoint(step.outputs):
            continue
        needs_first = is_all or not first.isdisjoint(step.outputs)
        used.update(step.inputs)
        if needs_first or _is_curved(step, total):
            first.update(step.inputs)
        found.append((step, needs_first))
    return reversed(found)


def _is_curved(step, total):
    return total.order == 2 and step.kind != kinds.LINEAR and not step.is_piecewise_linear


def _through(step, given, total, needs_first):
    if all(c is not None and c.is_uniform and c.summed is None for c in given):
        if step.kind == kinds.LINEAR and not needs_first:
            return [Carried() for _ in step.outputs]
        if (found := step.push_uniform([c.first for c in given])) is not None:
            return [Carried(first, None, True) for first in found]
        if step.kind == kinds.ELEMENTWISE:
            return [_elementwise(step, given[0], total, needs_first)]
    given = [full(c, x) for c, x in zip(given, step.primals, strict=True)]
    if step.kind == kinds.ELEMENTWISE:
        return [_elementwise(step, given[0], total, needs_first)]
    if step.kind == kinds.PRODUCT:
        return [_product(step, given, total, needs_first)]
    return _general(step, given, total, needs_first)


def full(carried, x):
    """`carried` with derivatives for each example."""
    if carried is None or not carried.is_uniform:
        return carried
    return Carried(stacks.with_examples(carried.first, x), carried.summed)


def _elementwise(step, carried, total, needs_first):
    is_curved = _is_curved(step, total)
    slopes = elementwise.derivatives(step, 2 if is_curved else 1)
    first = stacks.against(slopes[0]) * carried.first if needs_first else None
    summed = [] if carried.summed is None else [total.times(carried.summed, slopes[0])]
    if is_curved:
        left, right = total.halves(carried.first)
        summed.append(total.times(total.summed(left * right), slopes[1]))
    return Carried(first, _added(summed))


def _product(step, given, total, needs_first):
    a, b = given
    x, y = step.primals
    rank = max(len(x.shape), len(y.shape))
    first = [
        stacks.stretched(c.first, rank) * stacks.against(other, rank)
        for c, other in ((a, y), (b, x))
        if c is not None and needs_first
    ]
    summed = [
        total.times(c.summed, other, rank) for c, other in ((a, y), (b, x)) if c is not None and c.summed is not None
    ]
    if total.order == 2 and a is not None and b is not None:
        (a_left, a_right), (b_left, b_right) = total.halves(a.first), total.halves(b.first)
        cross = total.summed(stacks.stretched(a_left, rank) * stacks.stretched(b_right, rank))
        other = cross
        if total.pairs:
            other = total.summed(stacks.stretched(a_right, rank) * stacks.stretched(b_left, rank))
        summed.append(cross + other)
    return Carried(_added(first), _added(summed))


def _added(parts):
    total = None
    for part in parts:
        total = part if total is None else total + part
    return total


def _general(step, given, total, needs_first):
    """Any operation, by derivatives along derivatives of this one operation. Linear ones have no second part."""
    is_curved = _is_curved(step, total)
    if needs_first or is_curved:
        present = next(c.first for c in given if c is not None)
        given = [
            Carried(stacks.zeros(present, x)) if c is None else c for c, x in zip(given, step.primals, strict=True)
        ]
    given = [Carried() if c is None else c for c in given]
    firsts = [c.first for c in given]
    if step.kind == kinds.LINEAR and (found := _linear(step, given, total, needs_first)) is not None:
        return found
    first = step.push_stacks(firsts) if needs_first else [None] * len(step.outputs)
    summed = [None] * len(first)
    if total.order == 2:
        if any(c.summed is not None for c in given):
            summed = _summed_through(
                step, [_summed_or_zeros(c, x, total) for c, x in zip(given, step.primals, strict=True)], total
            )
        if is_curved:
            curved = _curvature(step, [total.halves(s) for s in firsts], total)
            summed = [_added([s for s in pair if s is not None]) for pair in zip(summed, curved, strict=True)]
    return [Carried(f, s) for f, s in zip(first, summed, strict=True)]


def _summed_or_zeros(carried, x, total):
    if carried.summed is not None:
        return carried.summed
    return stacks.zeros(total.halves(carried.first)[0], x) if total.apart else ops.zeros_like(x)


def _summed_through(step, summed, total):
    return step.push_stacks(summed) if total.apart else step.jvp(step.call, step.primals, tuple(summed))


def _linear(step, given, total, needs_first):
    """The results of a linear step that has a faster way than derivatives. None if it has not."""
    first = [None] * len(step.outputs)
    if needs_first and (first := step.push_linear([c.first for c in given])) is None:
        return None
    if all(c.summed is None for c in given):
        return [Carried(f) for f in first]
    summed = [_summed_or_zeros(c, x, total) for c, x in zip(given, step.primals, strict=True)]
    if total.apart:
        return [Carried(f, s) for f, s in zip(first, step.push_linear(summed), strict=True)]
    if (pushed := step.push_one(summed)) is not None:
        return [Carried(f, s) for f, s in zip(first, pushed, strict=True)]
    pushed = step.push_linear([stacks.of_rows([s]) for s in summed])
    return pushed and [Carried(f, stacks.row(s, 0)) for f, s in zip(first, pushed, strict=True)]


def _curvature(step, halves, total):
    """The sum over d of f''[J_d, K_d], for each output."""
    if step.kind == kinds.BILINEAR and not total.apart:
        (a_left, a_right), (b_left, b_right) = halves
        cross = step.sum_of_products(a_left, b_right)
        if cross is not None:
            other = step.sum_of_products(a_right, b_left) if total.pairs else cross
            return [x + y for x, y in zip(cross, other, strict=True)]
    found = step.second_derivatives([left for left, _ in halves], [right for _, right in halves])
    return [total.summed(stack) for stack in found]
