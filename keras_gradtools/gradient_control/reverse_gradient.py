"""Reversing the gradient: a function and a layer."""

from typing import Any

import keras

from keras_gradtools.annotations import Nested, Tensor
from keras_gradtools.gradient_control.control import GradientControl, constant, require_differentiable
from keras_gradtools.gradient_control.scale_gradient import require_scale, require_scale_of_layer, scaled


def reverse_gradient(x: Nested, scale: float | Tensor = 1.0) -> Tensor:
    r"""Returns `x` and reverses its gradient $u$ to $-s \cdot u$.

    Placed between a feature extractor and a domain classifier, it makes the extractor maximize the loss that the
    classifier minimizes.

    Args:
        x: A real floating-point tensor, symbolic tensor or variable of any shape.
        scale: The factor $s$, as for `scale_gradient`.

    Returns:
        A tensor with the values, shape and dtype of `x`. For a symbolic tensor, the output of a layer
        `keras_gradtools.layers.ReverseGradient`, which a functional model saves and loads.

    Raises:
        ValueError: As `scale_gradient`.

    Cost:
        None in the forward pass. The backward pass reads the gradient once more.

    Example:

    >>> import keras_gradtools as kg
    >>> from keras import ops
    >>> x = ops.convert_to_tensor(3.0)
    >>> with kg.GradientTape() as tape:
    ...     tape.watch(x)
    ...     y = ops.square(kg.reverse_gradient(x, 0.5))
    >>> float(y), float(tape.gradient(y, x))
    (9.0, -3.0)

    Source: Ganin & Lempitsky, "Unsupervised domain adaptation by backpropagation" (2015), equations 11-12.
    """
    x = require_differentiable("reverse_gradient", x)
    if isinstance(x, keras.KerasTensor):
        return ReverseGradient(scale, dtype=x.dtype)(x)
    return scaled(x, -constant(require_scale("reverse_gradient", scale), x))


@keras.saving.register_keras_serializable(package="keras_gradtools")
class ReverseGradient(GradientControl):
    """Passes its inputs on and multiplies their gradient by `-scale`, as `reverse_gradient` does.

    Placed between a feature extractor and a domain classifier, it makes the extractor maximize the loss that the
    classifier minimizes.

    The scale is a non-trainable weight, so it is saved with the model, and a callback can change it during `fit` with
    `layer.scale = value`, without recompilation. As for any variable that a callback assigns, the callback must access
    `self.model` first, because on JAX that brings the variables up to date.

    Args:
        scale: The initial scale, a finite number.
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
    >>> reverse = kg.layers.ReverseGradient()
    >>> reverse.scale = 0.5
    >>> x = ops.convert_to_tensor(3.0)
    >>> with kg.GradientTape() as tape:
    ...     tape.watch(x)
    ...     y = ops.square(reverse(x))
    >>> float(tape.gradient(y, x))
    -3.0

    Source: As for `reverse_gradient`. Equation 14 there is a schedule for the scale.
    """

    def __init__(self, scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._initial_scale = require_scale_of_layer("ReverseGradient", scale)
        value = keras.initializers.Constant(self._initial_scale)
        # The layer's own dtype may be half precision.
        self._scale = self.add_weight((), value, "float32", trainable=False, autocast=False, name="scale")

    @property
    def scale(self) -> Any:
        """The `keras.Variable` that holds the scale. A number can be assigned to this attribute."""
        return self._scale

    @scale.setter
    def scale(self, value: Any) -> Any:
        self._scale.assign(require_scale("ReverseGradient", value))

    def call(self, inputs: Nested) -> Nested:
        return reverse_gradient(inputs, self._scale)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "scale": self._initial_scale}
