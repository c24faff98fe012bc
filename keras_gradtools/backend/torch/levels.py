"""Checks what a tape can follow inside transforms of `torch.func`, and inside a vectorized backward pass.

Each running `torch.vmap`, `torch.func.grad` or `jvp` is a level, with its own graph or none. In it, a tensor of a lower
level has no edge, so a tape would take a result that was computed from it for a constant, and silently give zeros.
So a derivative raises an error unless target and source belong to one level that has a graph. A backward pass of many
cotangents at once (`is_grads_batched`) uses an older kind of vectorization, which has no levels.
"""

import contextlib

import torch

from keras_gradtools.blocks import Block

_functorch = torch._C._functorch


class VectorizedPass(Block):
    """A block for a vectorized backward pass, after which torch's count of such passes is always right.

    torch counts these passes. An interrupt between the counting and torch's own `try` would leave the count too high,
    and from then on torch would refuse to draw random numbers.
    """

    _is_inner = True  # until `begin` has run, `end` must do nothing

    def begin(self):
        self._is_inner = is_in_vectorized_pass()

    def end(self):
        while not self._is_inner and is_in_vectorized_pass():
            torch._C._vmapmode_decrement_nesting()


def is_in_vectorized_pass():
    """Whether a vectorized backward pass is running."""
    return torch._C._dispatch_tls_is_dispatch_key_included("VmapMode")


def depth():
    """The number of enclosing transforms of `torch.func`."""
    top = _functorch.peek_interpreter_stack()
    return 0 if top is None else top.level()


def can_watch(tensor, entered):
    """Whether a tape that was entered at the depth `entered` can follow what is computed here from `tensor`."""
    if _functorch.is_legacy_batchedtensor(tensor):
        return False
    top = _functorch.peek_interpreter_stack()
    if top is None:
        return True
    if top.level() > entered:
        # The graph outside of all levels also includes operations inside them.
        return entered == 0 and _functorch.maybe_get_level(tensor) < 0
    if top.key() == _functorch.TransformType.Vmap:
        # Operations on tensors that are not batched run as on the level below.
        has_graph = tensor.requires_grad or _functorch.maybe_get_level(tensor) < 0
        return has_graph and not _functorch.is_batchedtensor(tensor)
    return top.key() == _functorch.TransformType.Grad and _functorch.maybe_get_level(tensor) == top.level()


def check(targets, sources):
    """Raises `RuntimeError` if a level between a source and a target may hide their connection."""
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
        "transform of `torch.func` with respect to tensors that it does not follow: they would see constants. "
        f"Received: a tensor of dtype {tensor.dtype} and shape {tuple(tensor.shape)} inside one. For per-example "
        "gradients, use `keras_gradtools.per_example_grad(fun)` instead of `vmap` around `grad`. For other "
        "derivatives, use `batch_jacobian`, `jacobian` or `hvp`, or use `torch.func.grad` inside as well."
    )


def custom_gradient_error(tensors):
    """The error for a custom gradient inside a level: what `grad_fn` closes over belongs to this level only."""
    shapes = ", ".join(str(tuple(x.shape)) for x in tensors)
    return RuntimeError(
        "A custom gradient of keras_gradtools (also `clip_gradient_norm`, `scale_gradient` and similar functions) "
        "cannot be called inside `torch.vmap` or another transform of `torch.func`. Received: tensors of the shapes "
        f"{shapes} inside one. Differentiate with `keras_gradtools.grad`, `jacobian` or `hvp` instead of "
        "`torch.func`, and use `keras_gradtools.per_example_grad(fun)` instead of `vmap` around `grad`."
    )


def require_grad(tensor, flag):
    """`tensor.requires_grad_(flag)`, also inside transforms of `torch.func`, where torch refuses it."""
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
    """A block outside of all levels, if `tensor` belongs to none."""
    is_outside = depth() and _functorch.maybe_get_level(tensor) < 0
    return torch._C._DisableFuncTorch() if is_outside else contextlib.nullcontext()
