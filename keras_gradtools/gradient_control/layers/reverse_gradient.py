"""A layer that reverses the gradient."""

import keras

from keras_gradtools.gradient_control import gradient_ops


@keras.saving.register_keras_serializable(package="keras_gradtools")
class ReverseGradient(keras.layers.Layer):
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

    def __init__(self, scale=1.0, **kwargs):
        super().__init__(**kwargs)
        self._initial_scale = gradient_ops.require_number(scale, "scale")
        # The layer's own dtype may be half precision.
        self._scale = self.add_weight(
            shape=(),
            initializer=keras.initializers.Constant(self._initial_scale),
            dtype="float32",
            trainable=False,
            autocast=False,
            name="scale",
        )
        self.supports_masking = True

    @property
    def scale(self):
        """The `keras.Variable` that holds the scale. A number can be assigned to this attribute."""
        return self._scale

    @scale.setter
    def scale(self, value):
        self._scale.assign(gradient_ops.require_scale(value, "ReverseGradient"))

    def call(self, inputs):
        return gradient_ops.reverse_gradient(inputs, self._scale)

    def compute_output_spec(self, inputs):
        return keras.KerasTensor(inputs.shape, dtype=inputs.dtype)

    def get_config(self):
        return {**super().get_config(), "scale": self._initial_scale}
