"""A layer that applies a function and passes the gradient through unchanged."""

import keras

from keras_gradtools.gradient_control import gradient_ops


@keras.saving.register_keras_serializable(package="keras_gradtools")
class StraightThrough(keras.layers.Layer):
    """Applies a function and passes the gradient through unchanged, as `straight_through` does.

    Args:
        fun: A function of one tensor that keeps its shape. To save the layer, use one of `keras.activations` or a
            function registered with `keras.saving.register_keras_serializable`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: A floating-point tensor of any shape.

    Returns:
        `fun(inputs)` in the dtype of the inputs.

    Raises:
        ValueError: If `fun` is not a function.

    Cost:
        One call of `fun` in the forward pass. The backward pass costs nothing.

    Example:

    >>> import keras_gradtools as kg
    >>> from keras import ops
    >>> quantize = kg.layers.StraightThrough(ops.round)
    >>> x = ops.convert_to_tensor(2.7)
    >>> with kg.GradientTape() as tape:
    ...     tape.watch(x)
    ...     y = ops.square(quantize(x))
    >>> float(y), float(tape.gradient(y, x))
    (9.0, 6.0)

    Source: As for `straight_through`.
    """

    def __init__(self, fun, **kwargs):
        super().__init__(**kwargs)
        self.fun = fun
        self._forward = gradient_ops.straight_through(fun)
        self.supports_masking = True

    def call(self, inputs):
        return self._forward(inputs)

    def compute_output_spec(self, inputs):
        return keras.KerasTensor(inputs.shape, dtype=inputs.dtype)

    def get_config(self):
        return {**super().get_config(), "fun": keras.saving.serialize_keras_object(self.fun)}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "fun": keras.saving.deserialize_keras_object(config["fun"])})
