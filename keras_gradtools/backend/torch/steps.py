"""The functions of torch that a call uses, as steps of forward passes that carry several derivatives.

A `TorchFunctionMode` notes each function with its arguments and results. Autograd's graph says whether it has seen all
that the targets depend on: a `torch.autograd.Function`, for example, does not pass through the mode.
"""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from torch.utils._python_dispatch import _disable_current_modes

from keras_gradtools.backend import steps
from keras_gradtools.backend.torch import levels, pullbacks, unfused
from keras_gradtools.backend.torch.operations import CLOSED_FORMS, PIECEWISE_LINEAR, kind_of
from keras_gradtools.blocks import Block


class Operations(Block):
    """A block in which the functions of torch are noted."""

    def __init__(self):
        self.calls = []
        self.is_random = False
        self.is_whole = True
        self._mode = None
        self._state = None

    def begin(self):
        if levels.depth() or levels.is_in_vectorized_pass():
            # A transform of torch around this call may hide what it does.
            self.is_whole = False
            return
        self._state = _random_state()
        mode = _Mode(self.calls)
        mode.__enter__()
        self._mode = mode

    def end(self):
        mode, self._mode = self._mode, None
        if mode is not None:
            mode.__exit__(None, None, None)
            self.is_random = self._state != _random_state()


def _random_state():
    # Not seen by `kg.jit`, which would not record a comparison of values.
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        states = [torch.get_rng_state()]
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            states.append(torch.cuda.get_rng_state())
        return [state.numpy().tobytes() for state in states]


class _Mode(TorchFunctionMode):
    def __init__(self, calls):
        super().__init__()
        self._calls = calls

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves, structure = _pytree.tree_flatten((args, kwargs))
        # Noted now: what a tape has borrowed no longer requires gradients after its block.
        given = {i: x for i, x in enumerate(leaves) if isinstance(x, torch.Tensor) and x.requires_grad}
        versions = _versions(leaves)
        result = func(*args, **kwargs)
        if given:
            results, _ = _pytree.tree_flatten(result)
            found = [x if isinstance(x, torch.Tensor) and x.requires_grad else None for x in results]
            is_in_place = versions != _versions(leaves)
            if is_in_place or any(x is not None and all(x is not y for y in given.values()) for x in found):
                versions = None if is_in_place else versions
                self._calls.append(_Call(func, leaves, structure, list(given), found, versions, bool(args)))
        return result


def _versions(leaves):
    return [x._version for x in leaves if isinstance(x, torch.Tensor)]


class _Call:
    """A call of a function of torch. `differentiable` are the places of the leaves that require gradients.

    `versions` are those of the tensors among the leaves, None for a call that changed one in place. With `is_ordered`,
    the first leaf is the first argument. Arguments that are all given by name come in any order.
    """

    __slots__ = ("_nodes", "_versions", "differentiable", "func", "is_ordered", "leaves", "results", "structure")

    def __init__(self, func, leaves, structure, differentiable, results, versions, is_ordered):
        self.func, self.leaves, self.structure, self.differentiable = func, leaves, structure, differentiable
        self.results, self._versions, self.is_ordered = results, versions, is_ordered
        self._nodes = [None if y is None else y.grad_fn for y in results]

    def has_changed(self):
        """Whether the values of the leaves are others now than those that the function took."""
        return self._versions != _versions(self.leaves)

    def was_replaced(self):
        """Whether a `torch.autograd.Function` or a hook gives a result another derivative than this function has."""
        pairs = zip(self.results, self._nodes, strict=True)
        return any(y is not None and (y.grad_fn is not node or y._backward_hooks) for y, node in pairs)


def steps_between(tape, operations, targets, sources):
    if not operations.is_whole or operations.is_random:
        return None
    found = _Steps(sources, tape.edges([], sources)[1])
    try:
        for call in operations.calls:
            found.add(call)
        if not all(found.knows(t) for t in targets):
            return None
    except _Unknown:
        return None
    slots = found.slots
    return found.steps, [slots.get(id(t)) for t in targets], [slots[id(s)] for s in sources]


class _Unknown(Exception):
    """Something that the targets depend on was not noted."""


class _Steps:
    def __init__(self, sources, edges):
        self.steps = []
        self.slots = {id(s): slot for slot, s in enumerate(sources)}
        self._alive = list(sources)
        self._source_nodes = {edge[0] for edge in edges if edge is not None}
        self._unconnected = set()

    def knows(self, x):
        """Whether `x` is the result of a step, or does not depend on the sources."""
        return id(x) in self.slots or x.grad_fn is None or not self._depends(x)

    def _depends(self, x):
        seen, stack = {x.grad_fn}, [x.grad_fn]
        while stack:
            node = stack.pop()
            if node in self._source_nodes:
                return True
            for following, _ in node.next_functions:
                if following is not None and following not in seen and following not in self._unconnected:
                    seen.add(following)
                    stack.append(following)
        self._unconnected |= seen
        return False

    def add(self, call):
        leaves = call.leaves
        active = [i for i in call.differentiable if id(leaves[i]) in self.slots]
        if not all(self.knows(leaves[i]) for i in call.differentiable):
            raise _Unknown
        if not active:
            return
        if call.has_changed() or call.was_replaced():
            raise _Unknown
        opened = unfused.OPENED.get(call.func)
        if opened is not None:
            self._open(call, opened)
            return
        outputs = [i for i, y in enumerate(call.results) if y is not None and id(y) not in self.slots]
        step = _Step(call, active, outputs)
        if step.kind is None:
            raise _Unknown
        step.inputs = tuple(self.slots[id(leaves[i])] for i in active)
        step.outputs = tuple(self._slot(call.results[i]) for i in outputs)
        self.steps.append(step)

    def _open(self, call, fun):
        """Adds the steps of a function that does the same by basic operations."""
        inner = Operations()
        args, kwargs = _pytree.tree_unflatten(call.leaves, call.structure)
        with torch.enable_grad(), inner, inner:
            result = fun(*args, **kwargs)
        for each in inner.calls:
            self.add(each)
        (outer,) = call.results
        if not self.knows(result):
            raise _Unknown
        if id(result) in self.slots:
            self.slots[id(outer)] = self.slots[id(result)]
            self._alive.append(outer)

    def _slot(self, x):
        self._alive.append(x)
        return self.slots.setdefault(id(x), len(self.slots))


class _Step(steps.Step):
    def __init__(self, call, active, outputs):
        self._call, self._active, self._outputs = call, active, outputs
        self._name = getattr(call.func, "__name__", "")
        self.primals = tuple(call.leaves[i] for i in active)
        self.results = tuple(call.results[i] for i in outputs)
        # `torch.divide(2.0, x)` is not linear in x, its first tensor.
        is_first = call.is_ordered and active == [0]
        is_complex = any(x.is_complex() for x in (*self.primals, *self.results))
        self.kind = kind_of(self._name, self.primals, self.results, is_first, is_complex)
        # Moduli and directions of complex numbers are curved.
        self.is_piecewise_linear = self._name in PIECEWISE_LINEAR and not is_complex
        if self.kind == steps.ELEMENTWISE:
            self.function = CLOSED_FORMS.get(self._name)

    def call(self, *active):
        leaves = list(self._call.leaves)
        for i, x in zip(self._active, active, strict=True):
            leaves[i] = x
        args, kwargs = _pytree.tree_unflatten(leaves, self._call.structure)
        results, _ = _pytree.tree_flatten(self._call.func(*args, **kwargs))
        return [results[i] for i in self._outputs]

    def jvp(self, fun, primals, tangents):
        return _jvp(fun, primals, tangents)

    def slope(self, fun, x):
        block = differentiating()
        with block, block:
            alias = _alias(x)
            (y,) = fun(alias)
            found = None
            if y.requires_grad:
                (found,) = torch.autograd.grad(y, alias, torch.ones_like(y), create_graph=True, allow_unused=True)
        return [torch.zeros_like(x) if found is None else found]

    def push_stacks(self, stacks):
        if self.kind != steps.LINEAR:
            return _jvp(self._call_rows, self._repeated(stacks), stacks)
        return _jvp(self.call, self.primals, stacks, is_batched=True)

    def second_derivatives(self, left, right):
        primals = self._repeated(left)
        return _jvp(lambda *x: _jvp(self._call_rows, x, left), primals, right)

    def _repeated(self, stacks):
        return [x.expand(len(s), *x.shape) for x, s in zip(self.primals, stacks, strict=True)]

    def _call_rows(self, *stacks):
        """`call` for each row of stacks of active inputs."""
        try:
            return torch.func.vmap(self.call)(*stacks)
        except (RuntimeError, NotImplementedError):
            rows = [self.call(*row) for row in zip(*stacks, strict=True)]
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    def push_linear(self, stacks):
        rule = _LINEAR.get(self._name)
        return rule and rule(self, stacks)

    def push_one(self, tangents):
        # None of the rules asks for the axis of the directions.
        return self.push_linear(tangents)

    def push_uniform(self, stacks):
        # All of the rules keep what is equal for all examples equal.
        return self.push_linear(stacks)

    def _other(self):
        """The second argument of a call whose first one is active. None otherwise."""
        args, kwargs = _pytree.tree_unflatten(self._call.leaves, self._call.structure)
        is_plain = len(args) == 2 and not kwargs and self._active == [0]
        return args[1] if is_plain else None


class differentiating(Block):  # noqa: N801 - said of a block
    """A block for backward passes of single operations, which run on this thread, so that tapes see their order."""

    def __init__(self):
        self._grad_mode = torch.is_grad_enabled()
        self._was_multithreaded = torch._C._is_multithreading_enabled()

    def begin(self):
        torch._C._set_grad_enabled(True)
        torch._C._set_multithreading_enabled(False)

    def end(self):
        torch._C._set_multithreading_enabled(self._was_multithreaded)
        torch._C._set_grad_enabled(self._grad_mode)


def _alias(x):
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()


def _jvp(fun, primals, tangents, is_batched=False):
    """The derivative of `fun` along the tangents, or along each row of them.

    The pullback is linear in its cotangents, so its own pullback is the derivative. Not by `torch.func.jvp`, whose
    second derivatives are wrong for some operations.
    """
    block = differentiating()
    with block, block:
        aliases = [_alias(x) for x in primals]
        values = fun(*aliases)
        cotangents = [torch.zeros_like(y, requires_grad=True) for y in values]
        connected = [i for i, y in enumerate(values) if y.requires_grad]
        gradients: Any = [None] * len(aliases)
        if connected:
            pulled = [values[i] for i in connected], aliases, [cotangents[i] for i in connected]
            gradients = torch.autograd.grad(*pulled, create_graph=True, allow_unused=True)
        pairs = [(g, t) for g, t in zip(gradients, tangents, strict=True) if g is not None and g.requires_grad]
        shapes = [(len(tangents[0]), *y.shape) if is_batched else y.shape for y in values]
        if not pairs:
            return [y.new_zeros(shape) for y, shape in zip(values, shapes, strict=True)]
        run = pullbacks.batched_pass if is_batched else pullbacks.single_pass
        found = run([g for g, _ in pairs], cotangents, [t for _, t in pairs], True)
    return [y.new_zeros(shape) if d is None else d for d, y, shape in zip(found, values, shapes, strict=True)]


def _matrix_product(step, stacks):
    other = step._other()
    if other is None or step.primals[0].dim() < 2 or other.dim() != 2:
        return None
    return [torch.matmul(stacks[0], other)]


def _linear_layer(step, stacks):
    args, _ = _pytree.tree_unflatten(step._call.leaves, step._call.structure)
    if step._active != [0] or len(args) < 2:
        return None
    return [torch.nn.functional.linear(stacks[0], args[1])]


def _sum(step, stacks, sign=1):
    (y,) = step.results
    if len(step._call.leaves) != 2 or not step._call.is_ordered:
        return None
    if any(x.shape != y.shape or x.dtype != y.dtype for x in step.primals):
        return None
    return steps.of_sum(stacks, step._active == [1], sign)


def _difference(step, stacks):
    return _sum(step, stacks, sign=-1)


_LINEAR = {
    "matmul": _matrix_product,
    "__matmul__": _matrix_product,
    "linear": _linear_layer,
    "add": _sum,
    "__add__": _sum,
    "sub": _difference,
    "__sub__": _difference,
}
