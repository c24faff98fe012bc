"""Fused operations of torch as what they are made of, for a block in which torch itself takes the derivatives.

`torch.func.grad` under `torch.vmap` differentiates layer and batch normalization rightly once, and wrongly twice, and
some operations not twice at all. A tape mends its own backward passes (`torch_formulas`), not those. A
`TorchFunctionMode` belongs to a thread, and costs microseconds for each operation, which is little in such a block.
"""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class Unfused(TorchFunctionMode):
    """A block in which they are computed so."""

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
        # The statistics are constants, or to be updated: torch does either.
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
    # Without an axis, -1, the norm is that of all.
    over = [i for i in range(v.dim()) if i != dim]
    return v * (g / torch.sqrt(torch.sum(v * v, over, keepdim=True)))


def _one_at_a_time(*args, **kwargs):
    raise RuntimeError("an operation whose gradient cannot be differentiated inside torch.vmap")


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
