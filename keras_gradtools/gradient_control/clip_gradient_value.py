"""Clipping the elements of the gradient: a function and a layer."""

from typing import Any

import keras
from keras import ops

from keras_gradtools.annotations import Nested, Tensor
from keras_gradtools.gradient_control.control import GradientControl, constant, require_differentiable, require_limit
from keras_gradtools.gradient_control.custom_gradient import custom_gradient


def clip_gradient_value(x: Nested, max_value: float) -> Tensor:
    r"""Returns `x` and clips each element of its gradient $u$: $\min(\max(u, -m), m)$.

    Args:
        x: A real floating-point tensor, symbolic tensor or variable of any shape.
        max_value: The largest absolute value $m$, a positive number.

    Returns:
        A tensor with the values, shape and dtype of `x`. For a symbolic tensor, the output of a layer
        `keras_gradtools.layers.ClipGradientValue`, which a functional model saves and loads.

    Raises:
        ValueError: If `x` is not a real floating-point tensor, or `max_value` not a positive finite number.

    Cost:
        None in the forward pass. The backward pass reads the gradient once more.

    Example:

    >>> import keras_gradtools as kg
    >>> from keras import ops
    >>> x = ops.convert_to_tensor([1.0, 2.0, -3.0])
    >>> with kg.GradientTape() as tape:
    ...     tape.watch(x)
    ...     y = ops.square(kg.clip_gradient_value(x, 4.5))
    >>> [float(g) for g in tape.gradient(y, x)]
    [2.0, 4.0, -4.5]

    Source: Mikolov, "Statistical language models based on neural networks" (2012), section 3.2.2.
    """
    x = require_differentiable("clip_gradient_value", x)
    max_value = require_limit("clip_gradient_value", "max_value", max_value)
    if isinstance(x, keras.KerasTensor):
        return ClipGradientValue(max_value, dtype=x.dtype)(x)
    return _clip_value(x, constant(max_value, x))


@custom_gradient
def _clip_value(x, limit):
    def grad_fn(upstream):
        u = ops.cast(upstream, limit.dtype)
        # Not `ops.clip`: its derivative at the limit differs between backends.
        return ops.where(u > limit, limit, ops.where(u < -limit, -limit, u)), None

    return x, grad_fn


@keras.saving.register_keras_serializable(package="keras_gradtools")
class ClipGradientValue(GradientControl):
    """Passes its inputs on and clips each element of their gradient, as `clip_gradient_value` does.

    Args:
        max_value: The largest absolute value, a positive number.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: A floating-point tensor of any shape.

    Returns:
        The inputs, unchanged.

    Raises:
        ValueError: If `max_value` is not a positive finite number.

    Cost:
        None in the forward pass. The backward pass reads the gradient once more.

    Example:

    >>> import keras_gradtools as kg
    >>> from keras import ops
    >>> clip = kg.layers.ClipGradientValue(4.5)
    >>> x = ops.convert_to_tensor([1.0, 2.0, -3.0])
    >>> with kg.GradientTape() as tape:
    ...     tape.watch(x)
    ...     y = ops.square(clip(x))
    >>> [float(g) for g in tape.gradient(y, x)]
    [2.0, 4.0, -4.5]

    Source: As for `clip_gradient_value`.
    """

    def __init__(self, max_value: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.max_value = require_limit("ClipGradientValue", "max_value", max_value)

    def call(self, inputs: Nested) -> Nested:
        return clip_gradient_value(inputs, self.max_value)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "max_value": self.max_value}
