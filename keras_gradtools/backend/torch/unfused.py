"""Replaces fused operations of torch by basic ones, in a block where `torch.func` takes the derivatives.

For layer and batch normalization, first derivatives by `torch.func.grad` under `torch.vmap` are right, but second ones
are silently wrong. Some operations have no second derivative there. `formulas` corrects these only in backward
passes of a tape. Here a `TorchFunctionMode` replaces the operations, which affects only one thread and costs
microseconds for each operation.
"""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class Unfused(TorchFunctionMode):
    """A block in which fused operations are replaced."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return _UNFUSED.get(func, func)(*args, **(kwargs or {}))


def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):  # noqa: A002
    axes = tuple(range(-len(normalized_shape), 0))
    return _normalized(input, axes, eps, weight, bias, normalized_shape)


def _batch_norm(
    input,  # noqa: A002
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
):
    if not training or running_mean is not None:
        # torch does this: the statistics are constants, or must be updated.
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return _normalized(input, (0, *range(2, input.dim())), eps, weight, bias, (-1, *(1,) * (input.dim() - 2)))


def _instance_norm(
    input,  # noqa: A002
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    use_input_stats=True,
    momentum=0.1,
    eps=1e-5,
):
    if not use_input_stats or running_mean is not None:
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return _normalized(input, tuple(range(2, input.dim())), eps, weight, bias, (-1, *(1,) * (input.dim() - 2)))


def _normalized(x, axes, eps, weight, bias, shape):
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = x.to(dtype)
    y = y - y.mean(axes, keepdim=True)
    y = y * torch.rsqrt(torch.mean(y * y, axes, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.reshape(shape)
    if bias is not None:
        y = y + bias.reshape(shape)
    return y.to(x.dtype)


def _hard_sigmoid(input, inplace=False):  # noqa: A002
    inside = (input > -3) & (input < 3)
    return torch.where(inside, input / 6 + 0.5, (input > 0).to(input.dtype))


def _weight_norm(v, g, dim=0):
    # `dim=-1` means one norm over all axes.
    over = [i for i in range(v.dim()) if i != dim]
    return v * (g / torch.sqrt(torch.sum(v * v, over, keepdim=True)))


def _one_at_a_time(*args, **kwargs):
    raise RuntimeError("an operation whose gradient cannot be differentiated inside torch.vmap")


def _softmax(input, dim, dtype=None, _stacklevel=3):  # noqa: A002
    x = input if dtype is None else input.to(dtype)
    # The same for every shift, so its derivative is left out.
    y = torch.exp(x - x.detach().amax(dim, keepdim=True))
    return y / y.sum(dim, keepdim=True)


def _log_softmax(input, dim, dtype=None, _stacklevel=3):  # noqa: A002
    x = input if dtype is None else input.to(dtype)
    y = x - x.detach().amax(dim, keepdim=True)
    return y - torch.log(torch.exp(y).sum(dim, keepdim=True))


_UNFUSED = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.hardsigmoid: _hard_sigmoid,
    torch._weight_norm: _weight_norm,
    F.ctc_loss: _one_at_a_time,
    torch.ctc_loss: _one_at_a_time,
    F.scaled_dot_product_attention: _one_at_a_time,
    F.multi_head_attention_forward: _one_at_a_time,
}

# What a forward pass by steps replaces by several simpler steps.
OPENED = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.hardsigmoid: _hard_sigmoid,
    torch._weight_norm: _weight_norm,
    torch.softmax: _softmax,
    torch.Tensor.softmax: _softmax,
    F.softmax: _softmax,
    torch.log_softmax: _log_softmax,
    torch.Tensor.log_softmax: _log_softmax,
    F.log_softmax: _log_softmax,
}
