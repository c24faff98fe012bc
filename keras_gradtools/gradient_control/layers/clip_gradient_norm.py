"""A layer that clips the norm of the gradient."""

import keras

from keras_gradtools.gradient_control import gradient_ops


@keras.saving.register_keras_serializable(package="keras_gradtools")
class ClipGradientNorm(keras.layers.Layer):
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

    def __init__(self, max_norm, **kwargs):
        super().__init__(**kwargs)
        self.max_norm = gradient_ops.require_limit(max_norm, "max_norm")
        self.supports_masking = True

    def call(self, inputs):
        return gradient_ops.clip_gradient_norm(inputs, self.max_norm)

    def compute_output_spec(self, inputs):
        return keras.KerasTensor(inputs.shape, dtype=inputs.dtype)

    def get_config(self):
        return {**super().get_config(), "max_norm": self.max_norm}
