"""What a tape can follow inside the transforms of `torch.func`, and inside a vectorized backward pass.

Each `torch.vmap`, `torch.func.grad` or `jvp` that runs is a level, with a graph of its own or none. A tensor of a lower
level has no edge there: a tape would take what was computed from both for a constant, and give zeros. So a derivative
is refused, unless target and source are of one level that has a graph. A backward pass of many cotangents at once
(`is_grads_batched`) is vectorized in an older way, which has no levels.
"""

import contextlib

import torch

from keras_gradtools.backend.blocks import Block

_functorch = torch._C._functorch


class VectorizedPass(Block):
    """The time of a backward pass of many cotangents, after which torch knows that it is over.

    torch counts these passes, and an interrupt can come after it has counted one and before the `try` in which it
    would take it back. It then refuses random numbers for good.
    """

    _is_inner = True  # nothing to undo, until it is known

    def begin(self):
        self._is_inner = is_in_vectorized_pass()

    def end(self):
        while not self._is_inner and is_in_vectorized_pass():
            torch._C._vmapmode_decrement_nesting()


def is_in_vectorized_pass():
    """Whether a backward pass of many cotangents is under way."""
    return torch._C._dispatch_tls_is_dispatch_key_included("VmapMode")


def depth():
    """How many transforms of `torch.func` run around."""
    top = _functorch.peek_interpreter_stack()
    return 0 if top is None else top.level()


def can_watch(tensor, entered):
    """Whether a tape that was entered at the depth `entered` can tell what is computed here from `tensor`."""
    if _functorch.is_legacy_batchedtensor(tensor):
        return False
    top = _functorch.peek_interpreter_stack()
    if top is None:
        return True
    if top.level() > entered:
        # The graph outside of all levels goes through them.
        return entered == 0 and _functorch.maybe_get_level(tensor) < 0
    if top.key() == _functorch.TransformType.Vmap:
        # What is not vectorized is computed as on the level below.
        has_graph = tensor.requires_grad or _functorch.maybe_get_level(tensor) < 0
        return has_graph and not _functorch.is_batchedtensor(tensor)
    return top.key() == _functorch.TransformType.Grad and _functorch.maybe_get_level(tensor) == top.level()


def check(targets, sources):
    """Raises `RuntimeError` if a source may be hidden from a target by a level in between."""
    for target in targets:
        if _functorch.is_legacy_batchedtensor(target):
            raise error(target)
    top = _functorch.peek_interpreter_stack()
    if top is None:
        return
    lowest = min(map(_functorch.maybe_get_level, sources), default=-1)
    for target in targets:
        level = _functorch.maybe_get_level(target)
        has_no_graph = level == top.level() and not all(can_watch(s, top.level()) for s in sources)
        if level > lowest or has_no_graph or _functorch.is_batchedtensor(target):
            raise error(target)


def error(tensor):
    return RuntimeError(
        "A GradientTape, and every transform of keras_gradtools, cannot differentiate inside `torch.vmap` or another "
        "transform of `torch.func` by what that transform does not follow: it would see constants. Received: a "
        f"tensor of dtype {tensor.dtype} and shape {tuple(tensor.shape)} inside one. For the gradients of examples use "
        "`keras_gradtools.per_example_grad(fun)` in place of `vmap` around `grad`, for other derivatives "
        "`batch_jacobian`, `jacobian` or `hvp`, or `torch.func.grad` inside as well."
    )


def custom_gradient_error(tensors):
    """The error where a custom gradient is called on a level: what its `grad_fn` closes over is of that level alone."""
    shapes = ", ".join(str(tuple(x.shape)) for x in tensors)
    return RuntimeError(
        "A custom gradient of keras_gradtools (and `clip_gradient_norm`, `scale_gradient` and its other kin) cannot be "
        "called inside `torch.vmap` or another transform of `torch.func`. Received: tensors of the shapes "
        f"{shapes} inside one. Differentiate by `keras_gradtools.grad`, `jacobian` or `hvp`, in place of "
        "`torch.func`, and use `keras_gradtools.per_example_grad(fun)` in place of `vmap` around `grad`."
    )


def require_grad(tensor, flag):
    """`tensor.requires_grad_(flag)`, which torch refuses on every level: there it is meant for one alone."""
    if not depth():
        tensor.requires_grad_(flag)
        return
    before = _functorch.get_inplace_requires_grad_allowed()
    _functorch.set_inplace_requires_grad_allowed(True)
    try:
        tensor.requires_grad_(flag)
    finally:
        _functorch.set_inplace_requires_grad_allowed(before)


def outside(tensor):
    """A block that computes with `tensor` on no level, if it is of none."""
    is_outside = depth() and _functorch.maybe_get_level(tensor) < 0
    return torch._C._DisableFuncTorch() if is_outside else contextlib.nullcontext()
