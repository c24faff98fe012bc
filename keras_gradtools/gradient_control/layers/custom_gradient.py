"""A layer with a custom gradient."""

import keras

from keras_gradtools.gradient_control import gradient_ops


@keras.saving.register_keras_serializable(package="keras_gradtools")
class CustomGradient(keras.layers.Layer):
    """Applies a function that has a custom gradient, as `custom_gradient` does.

    Args:
        fun: A function `fun(*tensors) -> (value, grad_fn)` as for `custom_gradient`, without the decorator. To save the
            layer, register the function with `keras.saving.register_keras_serializable`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: The single argument of `fun` if it is a tensor or a dict of tensors. A list or tuple holds the
            arguments of `fun`.

    Returns:
        The value of `fun`.

    Raises:
        ValueError: As `custom_gradient`.

    Cost:
        One call of `fun` in the forward pass, and one of its `grad_fn` in the backward pass.

    Example:

    >>> import keras
    >>> import keras_gradtools as kg
    >>> from keras import ops
    >>> @keras.saving.register_keras_serializable(package="example")
    ... def log1pexp(x):
    ...     e = ops.exp(x)
    ...     return ops.log(1 + e), lambda upstream: upstream * (1 - 1 / (1 + e))
    >>> layer = kg.layers.CustomGradient(log1pexp)
    >>> x = ops.convert_to_tensor(1.0)
    >>> with kg.GradientTape() as tape:
    ...     tape.watch(x)
    ...     y = layer(x)
    >>> round(float(tape.gradient(y, x)), 4)
    0.7311

    Source: As for `custom_gradient`.
    """

    def __init__(self, fun, **kwargs):
        super().__init__(**kwargs)
        self.fun = fun
        self._differentiated = gradient_ops.custom_gradient(fun)
        self.supports_masking = True

    def call(self, inputs):
        return self._differentiated(*inputs) if isinstance(inputs, (list, tuple)) else self._differentiated(inputs)

    def get_config(self):
        return {**super().get_config(), "fun": keras.saving.serialize_keras_object(self.fun)}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "fun": keras.saving.deserialize_keras_object(config["fun"])})
