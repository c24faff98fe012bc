"""A layer that clips the elements of the gradient."""

import keras

from keras_gradtools.gradient_control import gradient_ops


@keras.saving.register_keras_serializable(package="keras_gradtools")
class ClipGradientValue(keras.layers.Layer):
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

    def __init__(self, max_value, **kwargs):
        super().__init__(**kwargs)
        self.max_value = gradient_ops.require_limit(max_value, "max_value")
        self.supports_masking = True

    def call(self, inputs):
        return gradient_ops.clip_gradient_value(inputs, self.max_value)

    def compute_output_spec(self, inputs):
        return keras.KerasTensor(inputs.shape, dtype=inputs.dtype)

    def get_config(self):
        return {**super().get_config(), "max_value": self.max_value}
