"""Rules for operations that torch's backward pass for many cotangents would run once for each of them.

`torch.autograd.grad(is_grads_batched=True)` runs on torch's older kind of batched tensors, for which most derivatives
of activations, softmax and pooling have no rule: torch then takes the rows apart. Each rule here calls the same
operation once, on tensors whose first axis is that of the rows.
"""

import functools
import threading
from typing import Any

import torch
from torch._C import _functorch

aten = torch.ops.aten

# Each entry of the result depends on the entries of the arguments at the same place, which are broadcast.
ELEMENTWISE = (
    "addcmul", "elu", "elu_backward", "erf", "fmod.Tensor", "full_like", "gelu", "hardsigmoid",
    "hardsigmoid_backward", "hardswish", "hardswish_backward", "hardtanh", "hardtanh_backward", "leaky_relu",
    "leaky_relu_backward", "masked_fill.Scalar", "maximum", "minimum", "mish", "mish_backward", "ones_like", "silu",
    "silu_backward", "softplus", "softplus_backward", "tanh_backward", "where.ScalarOther",
    "where.ScalarSelf", "where.self", "zeros_like",
)  # fmt: skip
# The positions of the axes among the arguments. The other arguments are one tensor or more of the same shape.
ALONG_AXES = {
    "_log_softmax": 1,
    "_log_softmax_backward_data": 2,
    "_softmax": 1,
    "_softmax_backward_data": 2,
    "amax": 1,
    "cumsum": 1,
    "flip": 1,
    "gather": 1,
    "logsumexp": 1,
    "mean.dim": 1,
    "scatter_add": 1,
}
# Without axes, these are along all of them.
REDUCTIONS = ("amax", "logsumexp", "mean.dim")
# They are of the last axes, or take no axes and broadcast nothing.
OF_LAST_AXES = ("constant_pad_nd", "gelu_backward", "log_sigmoid_backward", "tril", "triu")
# Pooling: the batch is the fourth axis from the end, or there is none.
OF_IMAGES = ("avg_pool2d", "avg_pool2d_backward", "max_pool2d_with_indices_backward")

_library: Any = None
_lock = threading.Lock()


def install():
    """Enters the rules. A second call does nothing."""
    global _library  # noqa: PLW0603 - as long as it exists, the rules do
    with _lock:
        if _library is None:
            _library = torch.library.Library("aten", "IMPL")
            _enter(_library)


def _enter(library):
    rules: dict[str, Any] = {
        **dict.fromkeys(ELEMENTWISE, _elementwise),
        **dict.fromkeys(OF_LAST_AXES, _of_last_axes),
        **dict.fromkeys(ALONG_AXES, _along_axes),
        **dict.fromkeys(OF_IMAGES, _of_images),
        "convolution_backward": _convolution_backward,
        "masked_fill_.Scalar": _in_place,
        "native_layer_norm_backward": _layer_norm_backward,
        "type_as": _type_as,
    }
    for name, rule in rules.items():
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "Batched"):
            packet, _, overload = name.partition(".")
            function = getattr(getattr(aten, packet), overload or "default")
            library.impl(name, functools.partial(rule, name, function), "Batched")


def _level():
    level = torch._C._vmapmode_increment_nesting()
    torch._C._vmapmode_decrement_nesting()
    return level - 1


def _is_batched(x):
    return isinstance(x, torch.Tensor) and _functorch.is_legacy_batchedtensor(x)


def _physical(x, level):
    return torch._remove_batch_dim(x, level, 1, 0)


def _batched(result, level):
    if isinstance(result, torch.Tensor):
        return torch._add_batch_dim(result, 0, level)
    return tuple([x if x is None else torch._add_batch_dim(x, 0, level) for x in result])


def _rank(args):
    return max(x.dim() for x in args if isinstance(x, torch.Tensor))


def _aligned(x, rank, level):
    """A batched tensor with its rows along the first of `rank + 1` axes. Other arguments broadcast with it."""
    if not _is_batched(x):
        return x
    missing = rank - x.dim()
    x = _physical(x, level)
    return x.reshape(x.shape[0], *[1] * missing, *x.shape[1:]) if missing else x


def _elementwise(name, function, *args, **kwargs):
    level, rank = _level(), _rank(args)
    return _batched(function(*[_aligned(x, rank, level) for x in args], **kwargs), level)


def _type_as(name, function, x, other):
    level = _level()
    other = _physical(other, level) if _is_batched(other) else other
    return _batched(function(_physical(x, level), other), level) if _is_batched(x) else function(x, other)


def _in_place(name, function, x, *args):
    level = _level()
    if not _is_batched(x):
        raise NotImplementedError(f"torch cannot give a tensor without rows those of {name}.")
    function(*[_aligned(y, x.dim(), level) for y in (x, *args)])
    return x


def _rows(args, level):
    return next(_physical(x, level).shape[0] for x in args if _is_batched(x))


def _expanded(args, level):
    """All tensors with their rows along the first axis. Those without rows are repeated, as views."""
    rows = _rows(args, level)
    found = []
    for x in args:
        if _is_batched(x):
            x = _physical(x, level)
        elif isinstance(x, torch.Tensor):
            x = x.expand(rows, *x.shape)
        found.append(x)
    return found


def _of_last_axes(name, function, *args, **kwargs):
    level = _level()
    return _batched(function(*_expanded(args, level), **kwargs), level)


def _along_axes(name, function, *args, **kwargs):
    level, rank, place = _level(), _rank(args), ALONG_AXES[name]
    given = _expanded(args, level)
    if rank == 0:
        # The one value is the whole axis.
        given = [x.unsqueeze(1) if isinstance(x, torch.Tensor) else x for x in given]
    if place < len(args):
        axes = args[place]
        given[place] = [_moved(a, rank) for a in axes] if isinstance(axes, (list, tuple)) else _moved(axes, rank)
        if name in REDUCTIONS and not given[place]:
            given[place] = list(range(1, max(rank, 1) + 1))
    else:
        given.append(list(range(1, max(rank, 1) + 1)))
    result = function(*given, **kwargs)
    keeps_rank = result.dim() == max(rank, 1) + 1
    return _batched(result.squeeze(1) if rank == 0 and keeps_rank else result, level)


def _moved(axis, rank):
    return None if axis is None else axis % max(rank, 1) + 1


def _of_images(name, function, *args, **kwargs):
    level, rank = _level(), _rank(args)
    given = _expanded(args, level)
    rows = _rows(args, level)
    if rank == 4:
        given = [x.reshape(-1, *x.shape[2:]) if isinstance(x, torch.Tensor) else x for x in given]
    result = function(*given, **kwargs)
    return _batched(result.reshape(rows, -1, *result.shape[1:]) if rank == 4 else result, level)


def _convolution_backward(name, function, *args):
    """The gradient with respect to the input takes the rows as further examples."""
    level = _level()
    gradient, x, kernel, *others, wanted = args
    if wanted[1] or wanted[2] or not _is_batched(gradient) or _is_batched(x) or _is_batched(kernel):
        return _row_by_row(function, args, level)
    gradient = _physical(gradient, level)
    rows = gradient.shape[0]
    # Only the shape of the input counts.
    like = x.new_empty(()).expand(rows * x.shape[0], *x.shape[1:])
    found, _, _ = function(gradient.reshape(-1, *gradient.shape[2:]), like, kernel, *others, wanted)
    return _batched((found.reshape(rows, *x.shape), None, None), level)


def _layer_norm_backward(name, function, gradient, x, axes, mean, factor, scale, bias, wanted):
    """The gradient with respect to the input takes the rows as a further axis of the batch."""
    level = _level()
    args = gradient, x, axes, mean, factor, scale, bias, wanted
    if wanted[1] or wanted[2] or _is_batched(scale) or _is_batched(bias):
        return _row_by_row(function, args, level)
    # The kernel takes the memory of the last two in order, whatever their strides.
    given = [y.contiguous() for y in _expanded((gradient, x, mean, factor), level)]
    found, _, _ = function(*given[:2], axes, *given[2:], scale, bias, wanted)
    return _batched((found, None, None), level)


def _row_by_row(function, args, level):
    given = _expanded(args, level)
    rows = [function(*[x[i] if isinstance(x, torch.Tensor) else x for x in given]) for i in range(_rows(args, level))]
    columns = zip(*rows, strict=True)
    return _batched(tuple([None if column[0] is None else torch.stack(column) for column in columns]), level)
