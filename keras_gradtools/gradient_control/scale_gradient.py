"""Scaling the gradient: a function and a layer."""

import math
from typing import Any

import keras
from keras import ops

from keras_gradtools import validation
from keras_gradtools.annotations import Nested, Tensor
from keras_gradtools.gradient_control.control import GradientControl, constant, require_differentiable
from keras_gradtools.gradient_control.custom_gradient import custom_gradient


def scale_gradient(x: Nested, scale: float | Tensor) -> Tensor:
    r"""Returns `x` and multiplies its gradient $u$ by a factor, $s \cdot u$.

    Args:
        x: A real floating-point tensor, symbolic tensor or variable of any shape.
        scale: The factor $s$, a finite number, or a scalar tensor or `keras.Variable`, which a schedule can change. It
            has no gradient itself. For a symbolic tensor `x`, a finite number.

    Returns:
        A tensor with the values, shape and dtype of `x`. For a symbolic tensor, the output of a layer
        `keras_gradtools.layers.ScaleGradient`, which a functional model saves and loads.

    Raises:
        ValueError: If `x` is not a real floating-point tensor, or `scale` not a real scalar.

    Cost:
        None in the forward pass. The backward pass reads the gradient once more.

    Example:

    >>> import keras_gradtools as kg
    >>> from keras import ops
    >>> x = ops.convert_to_tensor(3.0)
    >>> with kg.GradientTape() as tape:
    ...     tape.watch(x)
    ...     y = ops.square(kg.scale_gradient(x, 0.5))
    >>> float(tape.gradient(y, x))
    3.0

    Source: Silver et al., "A general reinforcement learning algorithm that masters chess, shogi, and Go"
    (2018) and its successor MuZero (Schrittwieser et al. 2020, appendix G), which scale gradients in this way.
    """
    x = require_differentiable("scale_gradient", x)
    if isinstance(x, keras.KerasTensor):
        return ScaleGradient(scale, dtype=x.dtype)(x)
    return scaled(x, constant(require_scale("scale_gradient", scale), x))


@custom_gradient
def scaled(x, scale):
    """`x`, with `scale` times its gradient."""
    return x, lambda upstream: (scale * ops.cast(upstream, scale.dtype), None)


def require_scale(owner, scale):
    """Returns `scale`. Raises `ValueError` unless it is a finite number, or a real scalar tensor or variable."""
    if validation.is_number(scale) and math.isfinite(scale):
        return float(scale)
    if ops.is_tensor(scale) or validation.is_variable(scale):
        dtype = validation.dtype_of(scale)
        if len(scale.shape) == 0 and dtype != "bool" and not dtype.startswith("complex"):
            return scale
    expected = "a finite number, or a real scalar tensor or keras.Variable,"
    advice = "For a different factor per element, write a custom_gradient."
    raise validation.refused(owner, expected, "scale", scale, advice)


def require_scale_of_layer(owner, scale):
    """Returns `scale` as a float. Raises `ValueError` unless it is a finite number."""
    advice = "To change the scale later, assign to the attribute `scale` of a keras_gradtools.layers.ReverseGradient."
    return validation.require_number(owner, "scale", scale, advice=advice)


@keras.saving.register_keras_serializable(package="keras_gradtools")
class ScaleGradient(GradientControl):
    """Passes its inputs on and multiplies their gradient by a constant, as `scale_gradient` does.

    Args:
        scale: The factor, a finite number.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: A floating-point tensor of any shape.

    Returns:
        The inputs, unchanged.

    Raises:
        ValueError: If `scale` is not a finite number.

    Cost:
        None in the forward pass. The backward pass reads the gradient once more.

    Example:

    >>> import keras_gradtools as kg
    >>> from keras import ops
    >>> half = kg.layers.ScaleGradient(0.5)
    >>> x = ops.convert_to_tensor(3.0)
    >>> with kg.GradientTape() as tape:
    ...     tape.watch(x)
    ...     y = ops.square(half(x))
    >>> float(tape.gradient(y, x))
    3.0

    Source: As for `scale_gradient`.
    """

    def __init__(self, scale: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scale = require_scale_of_layer("ScaleGradient", scale)

    def call(self, inputs: Nested) -> Nested:
        return scale_gradient(inputs, self.scale)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "scale": self.scale}
