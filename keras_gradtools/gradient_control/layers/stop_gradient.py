"""A layer that stops the gradient."""

import keras

from keras_gradtools.gradient_control import gradient_ops


@keras.saving.register_keras_serializable(package="keras_gradtools")
class StopGradient(keras.layers.Layer):
    """Passes its inputs on as constants, as `stop_gradient` does.

    The layers before it receive no gradient through it.

    Call arguments:
        inputs: Tensors of any shape and dtype, in any nested structure.

    Returns:
        The inputs, unchanged.

    Cost:
        None.

    Example:

    >>> import keras
    >>> import keras_gradtools as kg
    >>> from keras import ops
    >>> stop = kg.layers.StopGradient()
    >>> x = ops.convert_to_tensor(3.0)
    >>> with kg.GradientTape() as tape:
    ...     tape.watch(x)
    ...     y = x * x * stop(x)
    >>> float(tape.gradient(y, x))
    18.0

    Source: As for `stop_gradient`.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True

    def call(self, inputs):
        return gradient_ops.stop_gradient(inputs)

    def compute_output_spec(self, inputs):
        return keras.tree.map_structure(lambda x: keras.KerasTensor(x.shape, dtype=x.dtype), inputs)
