"""The functions of torch that a call uses, as steps of forward passes that carry several derivatives.

A `TorchFunctionMode` notes each function with its arguments and results. Autograd's graph says whether it has seen all
that the targets depend on: a `torch.autograd.Function`, for example, does not pass through the mode.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from keras_gradtools.backend import steps
from keras_gradtools.backend.torch import levels, operations, random_numbers, unfused
from keras_gradtools.blocks import Block


class Operations(Block):
    """A block in which the functions of torch are noted."""

    def __init__(self):
        self.calls = []
        self.is_random = False
        self._mode = None
        self._state = None

    def begin(self):
        self._state = random_numbers.random_state()
        mode = _Mode(self.calls)
        mode.__enter__()
        self._mode = mode

    def end(self):
        mode, self._mode = self._mode, None
        if mode is not None:
            mode.__exit__(None, None, None)
            self.is_random = not _equal(self._state, random_numbers.random_state())


def _equal(a, b):
    leaves = zip(_pytree.tree_leaves(a), _pytree.tree_leaves(b), strict=True)
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in leaves)


class _Mode(TorchFunctionMode):
    def __init__(self, calls):
        super().__init__()
        self._calls = calls

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves, structure = _pytree.tree_flatten((args, kwargs))
        # Noted now: what a tape has borrowed no longer requires gradients after its block.
        given = {i: x for i, x in enumerate(leaves) if isinstance(x, torch.Tensor) and x.requires_grad}
        versions = [x._version for x in leaves if isinstance(x, torch.Tensor)]
        result = func(*args, **kwargs)
        if given:
            results, _ = _pytree.tree_flatten(result)
            found = [x if isinstance(x, torch.Tensor) and x.requires_grad else None for x in results]
            is_in_place = versions != [x._version for x in leaves if isinstance(x, torch.Tensor)]
            if is_in_place or any(x is not None and all(x is not y for y in given.values()) for x in found):
                self._calls.append(_Call(func, leaves, structure, list(given), found, is_in_place))
        return result


class _Call:
    """A call of a function of torch. `differentiable` are the places of the leaves that require gradients."""

    __slots__ = ("_nodes", "differentiable", "func", "is_in_place", "leaves", "results", "structure")

    def __init__(self, func, leaves, structure, differentiable, results, is_in_place):
        self.func, self.leaves, self.structure, self.differentiable = func, leaves, structure, differentiable
        self.results, self.is_in_place = results, is_in_place
        self._nodes = [None if y is None else y.grad_fn for y in results]

    def was_replaced(self):
        """Whether a `torch.autograd.Function` or a hook gives a result another derivative than this function has."""
        pairs = zip(self.results, self._nodes, strict=True)
        return any(y is not None and (y.grad_fn is not node or y._backward_hooks) for y, node in pairs)


def steps_between(tape, recorded, targets, sources):
    if levels.depth() or recorded.is_random:
        return None
    found = _Steps(sources, tape.edges([], sources)[1])
    try:
        for call in recorded.calls:
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
        tensors = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)]
        active = [i for i in call.differentiable if id(leaves[i]) in self.slots]
        if not all(self.knows(leaves[i]) for i in call.differentiable):
            raise _Unknown
        if not active:
            return
        if call.is_in_place or call.was_replaced():
            raise _Unknown
        opened = unfused.OPENED.get(call.func)
        if opened is not None:
            self._open(call, opened)
            return
        places = [tensors.index(i) for i in active]
        outputs = [i for i, y in enumerate(call.results) if y is not None and id(y) not in self.slots]
        step = _Step(call, active, places, outputs)
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
    def __init__(self, call, active, places, outputs):
        self._call, self._active, self._outputs = call, active, outputs
        self._places = places
        self._name = getattr(call.func, "__name__", "")
        self.primals = tuple(call.leaves[i] for i in active)
        self.results = tuple(call.results[i] for i in outputs)
        self.kind = operations.kind_of(self._name, places, self.primals, self.results)
        if self.kind == steps.ELEMENTWISE:
            self.function = operations.CLOSED_FORMS.get(self._name)

    def call(self, *active):
        leaves = list(self._call.leaves)
        for i, x in zip(self._active, active, strict=True):
            leaves[i] = x
        args, kwargs = _pytree.tree_unflatten(leaves, self._call.structure)
        results, _ = _pytree.tree_flatten(self._call.func(*args, **kwargs))
        return [results[i] for i in self._outputs]

    def jvp(self, fun, primals, tangents):
        try:
            return torch.func.jvp(fun, tuple(primals), tuple(tangents))[1]
        except (RuntimeError, NotImplementedError):
            if levels.depth():
                raise
        return _by_two_pullbacks(fun, primals, tangents)

    def slope(self, fun, x):
        return self.jvp(fun, (x,), (torch.ones_like(x),))

    def push_linear(self, stacks):
        rule = _LINEAR.get(self._name)
        return rule and rule(self, stacks)

    def push_uniform(self, stacks):
        if self.kind == steps.LINEAR and self._name in _UNIFORM:
            return self.push_linear(stacks)
        return None

    def _other(self):
        """The second argument of a call whose first one is active. None otherwise."""
        args, kwargs = _pytree.tree_unflatten(self._call.leaves, self._call.structure)
        is_plain = len(args) == 2 and not kwargs and self._active == [0]
        return args[1] if is_plain else None


def _by_two_pullbacks(fun, primals, tangents):
    """The pullback is linear in its cotangents, so its own pullback is the derivative along the tangents."""
    was_multithreaded = torch._C._is_multithreading_enabled()
    torch._C._set_multithreading_enabled(False)
    try:
        with torch.enable_grad():
            aliases = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in primals]
            values = fun(*aliases)
            cotangents = [torch.zeros_like(y, requires_grad=True) for y in values]
            gradients = torch.autograd.grad(values, aliases, cotangents, create_graph=True, allow_unused=True)
            pairs = [(g, t) for g, t in zip(gradients, tangents, strict=True) if g is not None and g.requires_grad]
            if not pairs:
                return [torch.zeros_like(y) for y in values]
            outputs, along = zip(*pairs, strict=True)
            found = torch.autograd.grad(outputs, cotangents, along, create_graph=True, allow_unused=True)
    finally:
        torch._C._set_multithreading_enabled(was_multithreaded)
    return [torch.zeros_like(y) if d is None else d for d, y in zip(found, values, strict=True)]


def map_stacks(fun, stacks):
    try:
        return torch.func.vmap(fun)(*stacks)
    except (RuntimeError, NotImplementedError):
        if levels.depth():
            raise
    rows = [fun(*row) for row in zip(*stacks, strict=True)]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


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
    if len(step._call.leaves) != 2 or any(x.shape != step.results[0].shape for x in step.primals):
        return None
    if any(x.dtype != step.results[0].dtype for x in step.primals):
        return None
    if len(stacks) == 2:
        return [stacks[0] + stacks[1] if sign > 0 else stacks[0] - stacks[1]]
    return [stacks[0] if sign > 0 or step._active == [0] else -stacks[0]]


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
_UNIFORM = set(_LINEAR)
