"""Custom gradients on torch that can be differentiated to any order.

The gradient of a `torch.autograd.Function` can only be differentiated again if everything that its backward pass uses
is connected to the graph. So `fun` runs in the ordinary graph, outside of the `Function`, which only replaces the
gradient by `grad_fn`.
"""

import torch

from keras_gradtools.backend.torch import levels
from keras_gradtools.keras_state import recording


def custom_gradient(fun):
    def differentiated(*tensors):
        if levels.depth():
            raise levels.custom_gradient_error(tensors)
        # Aliases, so that a value that `fun` returns unchanged is not the argument itself. They stay connected to the
        # graph, and so does what `grad_fn` closes over. This makes its result differentiable again.
        with recording.ReadLog() as log:
            values, grad_fn = fun(*[t.view_as(t) for t in tensors])
        versions = [(v._value, v._value._version) for v in log.variables if v._value is not None]
        outputs = _CustomGradient.apply(grad_fn, versions, values, *tensors)
        return list(outputs)

    return differentiated


class _CustomGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad_fn, versions, values, *tensors):
        # Saved only so that torch checks that they were not overwritten.
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.grad_fn, ctx.versions = grad_fn, versions
        # Aliases without a graph; `detach` cannot be vectorized.
        values = [v.view_as(v) for v in values]
        ctx.outputs = [(v.shape, v.dtype, v.device) for v in values]
        ctx.mark_non_differentiable(*[v for v in values if not v.is_floating_point()])
        return tuple(values)

    @staticmethod
    def backward(ctx, *upstream):
        if all(u is None for u in upstream):
            return None, None, None, *[None] * len(ctx.saved_tensors)
        if any(value._version != version for value, version in ctx.versions):
            raise RuntimeError("a variable that a custom gradient has read was modified by an inplace operation")
        _ = ctx.saved_tensors
        given = [
            torch.zeros(shape, dtype=dtype, device=device) if u is None else u
            for u, (shape, dtype, device) in zip(upstream, ctx.outputs, strict=True)
        ]
        return None, None, None, *ctx.grad_fn(*given)
