"""Replaces backward passes of torch that cannot be differentiated, or whose derivatives are wrong.

torch differentiates the backward pass of layer and batch normalization by a formula that takes the mean and the
deviation for constants. Second derivatives are right, but third ones are silently wrong. Other operations have no
second derivative.

If the backward pass of a tape will be differentiated again, the gradients of such a node are computed again by
differentiable operations, from the tensors that it has saved. The forward pass remains fused, and so do all other
backward passes.
"""

import functools
import math

import torch

from keras_gradtools.backend.torch import ctc, graph, levels


def of(nodes):
    """Yields `(node, formula)` for each node whose own backward pass must be replaced.

    `formula(upstream, gradients)` returns what replaces the `gradients` of the node, for the cotangents `upstream`. The
    saved tensors are read here, before the pass, because during the pass a checkpoint provides each tensor only once.
    """
    for node in nodes:
        kind = type(node)
        read = _FORMULAS.get(kind.__name__) or hasattr(kind, "_forward_cls") and _of_a_function(kind)
        if not read:
            continue
        try:
            formula = read(node)
        except RuntimeError:
            # The saved tensors are freed, overwritten, or differ when recomputed. If the pass reaches the node, torch
            # raises the error.
            continue
        if formula is not None:
            yield node, formula


def _layer_normalization(node):
    x, weight, shape = node._saved_input, node._saved_weight, node._saved_normalized_shape
    backward = functools.partial(_normalized, shape=_layer_shape(x, shape), deviation=node._saved_result2)
    return lambda upstream, _: backward(upstream[0], x, weight)


def _layer_normalization_twice(node):
    u, x, weight, shape = node._saved_grad_out, node._saved_input, node._saved_weight, node._saved_normalized_shape
    backward = functools.partial(_normalized, shape=_layer_shape(x, shape), deviation=node._saved_rstd)

    def twice(upstream, _):
        by_u, by_x, by_weight = _pulled_back(backward, (u, x, weight), upstream)
        return by_u, by_x, None, None, by_weight, None

    return twice


def _layer_shape(x, shape):
    # The axes to normalize over, those to sum over for the gradient of the weight, and the weight's broadcast shape.
    own = x.dim() - len(shape)
    return tuple(range(own, x.dim())), tuple(range(own)), (*(1,) * own, *shape)


def _batch_normalization(node):
    if not node._saved_training:
        # With constant statistics, the operation is linear, and torch's derivatives are right.
        return None
    x, weight = node._saved_input, node._saved_weight
    eps = node._saved_eps if hasattr(node, "_saved_eps") else node._saved_epsilon
    backward = functools.partial(_normalized, shape=_batch_shape(x), eps=eps)
    return lambda upstream, _: backward(upstream[0], x, weight)


def _batch_normalization_twice(node):
    if not node._saved_train:
        return None
    u, x, weight = node._saved_grad_out, node._saved_input, node._saved_weight
    backward = functools.partial(_normalized, shape=_batch_shape(x), eps=node._saved_eps)

    def twice(upstream, _):
        return (*_pulled_back(backward, (u, x, weight), upstream), None, None)

    return twice


def _batch_shape(x):
    axes = (0, *range(2, x.dim()))
    return axes, axes, (1, -1, *(1,) * (x.dim() - 2))


def _normalized(u, x, weight, shape, deviation=None, eps=None):
    """The vjp of w (x - mean) / deviation + b with respect to x, w and b, for the cotangent u."""
    if u is None:
        return None, None, None
    over, by_weight, weight_shape = shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    u, x_given, x = u.to(dtype), x, x.to(dtype)
    x = x - x.mean(over, keepdim=True)
    variance = torch.mean(x * x, over, keepdim=True)
    if eps is None:
        # The node saves 1 / deviation but not eps, so eps is computed from it.
        eps = (deviation.to(dtype) ** -2 - variance).detach()
    deviation = torch.rsqrt(variance + eps)
    x = x * deviation
    scaled = u if weight is None else u * weight.to(dtype).reshape(weight_shape)
    by_x = deviation * (scaled - scaled.mean(over, keepdim=True) - x * torch.mean(scaled * x, over, keepdim=True))
    by_x = by_x.to(x_given.dtype)
    if weight is None:
        summed = _summed(u, by_weight)
        return by_x, None, summed.to(x_given.dtype)
    by_w = _summed(u * x, by_weight).reshape(weight.shape).to(weight.dtype)
    return by_x, by_w, _summed(u, by_weight).reshape(weight.shape).to(weight.dtype)


def _summed(x, axes):
    return x.sum(axes) if axes else x


def _weight_normalization(node):
    """The weight g v / |v|, with one norm for each index along the axis."""
    v, g, axis = node._saved_v, node._saved_g, node._saved_dim

    def backward(upstream, _):
        (u,) = upstream
        if u is None:
            return None, None
        over = [i for i in range(v.dim()) if i != axis]
        norm = torch.sqrt(torch.sum(v * v, over, keepdim=True))
        along = torch.sum(u * v, over, keepdim=True) / norm
        return g / norm * (u - v * along / norm), along.reshape(g.shape)

    return backward


def _hard_sigmoid(node):
    x = node._saved_self

    def backward(upstream, _):
        (u,) = upstream
        return (None if u is None else torch.where((x > -3) & (x < 3), u / 6, torch.zeros_like(u)),)

    return backward


def _log_cumulative_sum(node):
    """The sum over j >= i of u_j exp(x_i - y_j). torch computes with the logarithm of u, whose derivatives are NaN."""
    x, y, axis = node._saved_self, node._saved_result, _signed(node._saved_dim)

    def backward(upstream, _):
        (u,) = upstream
        if u is None:
            return (None,)
        rows, columns = torch.movedim(x, axis, -1)[..., :, None], torch.movedim(y, axis, -1)[..., None, :]
        follows = torch.ones(x.shape[axis], x.shape[axis], dtype=torch.bool, device=x.device).triu()
        shares = torch.exp(torch.where(follows, rows - columns, -math.inf))
        return (torch.movedim(torch.matmul(shares, torch.movedim(u, axis, -1)[..., None])[..., 0], -1, axis),)

    return backward


def _signed(number):
    # Nodes return negative integers as unsigned ones.
    return number - 2**64 if number >= 2**63 else number


_ONCE = torch.autograd.function.once_differentiable(lambda ctx: None).__code__


def _of_a_function(kind):
    """For a `torch.autograd.Function` without a second derivative: an error where torch would give zeros."""
    function = kind._forward_cls
    if function.__name__ == "CompiledFunction" and function.__module__.startswith("torch._functorch."):
        return _compiled
    return _once if getattr(function.backward, "__code__", None) is _ONCE else None


def _once(node):
    # torch raises this error itself if the cotangent requires gradients. If the cotangent is a constant, torch ignores
    # that the gradient also depends on the saved tensors.
    refuse = _refusal(b"trying to differentiate twice a function that was marked with @once_differentiable")
    return lambda _, gradients: [g if g is None or g.requires_grad else refuse(g) for g in gradients]


def _compiled(node):
    # torch raises an error only for the path through the cotangent, or through a saved argument that is not a view. It
    # ignores that the gradient also depends on the other saved tensors.
    refuse = _refusal(graph.COMPILED.encode())
    return lambda _, gradients: [g if g is None else refuse(g) for g in gradients]


def _refusal(words):
    """Returns a function that gives a gradient a derivative which raises an error with `words`."""
    delayed = torch._C._functions.DelayedError(words, 1)

    def refuse(gradient):
        if levels.is_in_vectorized_pass():
            # Its batched tensors would crash `DelayedError`. After this error, the rows are computed one by one.
            raise RuntimeError(words.decode())
        return delayed(gradient if gradient.requires_grad else gradient.view_as(gradient).requires_grad_())

    return refuse


def _attention(node):
    """Softmax attention by its definition. Not possible with dropout, because only the fused kernel knows the mask."""
    if node._saved_dropout_p:
        return None
    tensors = node._saved_query, node._saved_key, node._saved_value
    mask, is_causal, scale = node._saved_attn_mask, node._saved_is_causal, node._saved_scale

    def attention(query, key, value):
        factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        scores = torch.matmul(query * factor, key.transpose(-2, -1))
        if is_causal:
            visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~visible, -math.inf)
        if mask is not None:
            scores = scores + mask
        return (torch.matmul(torch.softmax(scores, -1), value),)

    return lambda upstream, _: _pulled_back(attention, tensors, upstream[:1])


def _pulled_back(fun, tensors, gradients):
    """The vjp of `fun` at `tensors`, for the cotangents `gradients`.

    It uses aliases, so that it does not include paths from one of the tensors to another in the graph.
    """
    with torch.enable_grad():
        followed = [t is not None and t.requires_grad for t in tensors]
        aliases = [t.view_as(t) if f else t for t, f in zip(tensors, followed, strict=True)]
        pairs = [
            (y, u)
            for y, u in zip(fun(*aliases), gradients, strict=False)
            if y is not None and y.requires_grad and u is not None
        ]
        wanted = [a for a, f in zip(aliases, followed, strict=True) if f]
        if not pairs or not wanted:
            return [None] * len(tensors)
        outputs, upstream = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, upstream, create_graph=True, allow_unused=True))
    return [next(found) if f else None for f in followed]


_FORMULAS = {
    "NativeLayerNormBackward0": _layer_normalization,
    "NativeLayerNormBackwardBackward0": _layer_normalization_twice,
    "NativeBatchNormBackward0": _batch_normalization,
    "NativeBatchNormBackwardBackward0": _batch_normalization_twice,
    "CudnnBatchNormBackward0": _batch_normalization,
    "MiopenBatchNormBackward0": _batch_normalization,
    "WeightNormInterfaceBackward0": _weight_normalization,
    "HardsigmoidBackward0": _hard_sigmoid,
    "LogcumsumexpBackward0": _log_cumulative_sum,
    "CtcLossBackward0": ctc.backward,
    "CtcLossBackward1": ctc.backward,
    "ScaledDotProductFlashAttentionForCpuBackward0": _attention,
}
