"""A layer with the values of a function and the gradient of the identity."""

import keras

from keras_gradtools import gradient_ops


@keras.saving.register_keras_serializable(package="keras_gradtools")
class StraightThrough(keras.layers.Layer):
    """Applies a function, and passes the gradient on as if it had not, as `straight_through` does.

    Args:
        fun: a function of one tensor that keeps its shape. For the layer to be saved, it is one of
            `keras.activations` or registered with `keras.saving.register_keras_serializable`.
        **kwargs: those of `keras.layers.Layer`.

    Call arguments:
        inputs: a floating-point tensor of any shape.

    Returns:
        `fun(inputs)`, in the dtype of the inputs.

    Raises:
        ValueError: if `fun` is no function.

    Cost:
        That of `fun`; nothing backwards.

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

    Source: as `straight_through`.
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
