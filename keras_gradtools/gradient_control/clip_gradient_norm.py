"""Clipping the norm of the gradient: a function and a layer."""

from typing import Any

import keras
from keras import ops

from keras_gradtools.annotations import Nested, Tensor
from keras_gradtools.gradient_control.control import GradientControl, constant, require_differentiable, require_limit
from keras_gradtools.gradient_control.custom_gradient import custom_gradient


def clip_gradient_norm(x: Nested, max_norm: float) -> Tensor:
    r"""Returns `x` and clips the norm of its gradient $u$: $u \cdot \min(1, m / \lVert u \rVert_2)$.

    The norm is that of the whole tensor, including the batch axis. For half precision it is computed in float32.

    Args:
        x: A real floating-point tensor, symbolic tensor or variable of any shape.
        max_norm: The largest norm $m$, a positive number.

    Returns:
        A tensor with the values, shape and dtype of `x`. For a symbolic tensor, the output of a layer
        `keras_gradtools.layers.ClipGradientNorm`, which a functional model saves and loads.

    Raises:
        ValueError: If `x` is not a real floating-point tensor, or `max_norm` not a positive finite number.

    Cost:
        None in the forward pass. The backward pass reads the gradient once more.

    Example:

    >>> import keras_gradtools as kg
    >>> from keras import ops
    >>> v = ops.convert_to_tensor(2.0)
    >>> with kg.GradientTape() as tape:
    ...     tape.watch(v)
    ...     y = kg.clip_gradient_norm(v * v, 0.5)
    >>> float(tape.gradient(y, v))
    2.0

    In a functional model:

    >>> import keras
    >>> inputs = keras.Input((3,))
    >>> model = keras.Model(inputs, kg.clip_gradient_norm(inputs, 0.5))
    >>> model.layers[-1].max_norm
    0.5

    Source: TensorFlow's guide "Advanced automatic differentiation", section "Custom gradients";
    Pascanu, Mikolov & Bengio, "On the difficulty of training recurrent neural networks" (2013), algorithm 1.
    """
    x = require_differentiable("clip_gradient_norm", x)
    max_norm = require_limit("clip_gradient_norm", "max_norm", max_norm)
    if isinstance(x, keras.KerasTensor):
        return ClipGradientNorm(max_norm, dtype=x.dtype)(x)
    return _clip_norm(x, constant(max_norm, x))


@custom_gradient
def _clip_norm(x, max_norm):
    def grad_fn(upstream):
        u = ops.cast(upstream, max_norm.dtype)
        # Without this scaling, the squares of large gradients overflow and those of small ones underflow.
        largest = ops.max(ops.abs(u), initial=0)
        unit = ops.where(largest > 1e15, 1e25, ops.where(largest < 1e-15, 1e-25, 1.0))
        unit = ops.cast(unit, u.dtype)
        squares = ops.sum(ops.square(u / unit))
        norm = ops.sqrt(ops.where(squares > 0, squares, 1))  # the derivative of the square root at 0 would be NaN
        return ops.where(norm > max_norm / unit, u / unit * (max_norm / norm), u), None

    return x, grad_fn


@keras.saving.register_keras_serializable(package="keras_gradtools")
class ClipGradientNorm(GradientControl):
    """Passes its inputs on and clips the L2 norm of their gradient, as `clip_gradient_norm` does.

    Args:
        max_norm: The largest norm, a positive number.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: A floating-point tensor of any shape.

    Returns:
        The inputs, unchanged.

    Raises:
        ValueError: If `max_norm` is not a positive finite number.

    Cost:
        None in the forward pass. The backward pass reads the gradient once more.

    Example:

    >>> import keras_gradtools as kg
    >>> from keras import ops
    >>> clip = kg.layers.ClipGradientNorm(0.5)
    >>> v = ops.convert_to_tensor(2.0)
    >>> with kg.GradientTape() as tape:
    ...     tape.watch(v)
    ...     y = clip(v * v)
    >>> float(tape.gradient(y, v))
    2.0

    Source: As for `clip_gradient_norm`.
    """

    def __init__(self, max_norm: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.max_norm = require_limit("ClipGradientNorm", "max_norm", max_norm)

    def call(self, inputs: Nested) -> Nested:
        return clip_gradient_norm(inputs, self.max_norm)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "max_norm": self.max_norm}
