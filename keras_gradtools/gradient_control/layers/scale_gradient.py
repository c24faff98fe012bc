"""A layer that scales the gradient."""

import keras

from keras_gradtools.gradient_control import gradient_ops


@keras.saving.register_keras_serializable(package="keras_gradtools")
class ScaleGradient(keras.layers.Layer):
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

    def __init__(self, scale, **kwargs):
        super().__init__(**kwargs)
        self.scale = gradient_ops.require_number(scale, "scale")
        self.supports_masking = True

    def call(self, inputs):
        return gradient_ops.scale_gradient(inputs, self.scale)

    def compute_output_spec(self, inputs):
        return keras.KerasTensor(inputs.shape, dtype=inputs.dtype)

    def get_config(self):
        return {**super().get_config(), "scale": self.scale}
