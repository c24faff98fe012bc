"""A layer that reverses the gradient."""

import keras

from keras_gradtools import gradient_ops


@keras.saving.register_keras_serializable(package="keras_gradtools")
class ReverseGradient(keras.layers.Layer):
    """Passes its inputs on, and multiplies their gradient by `-scale`, as `reverse_gradient` does.

    Between a feature extractor and a classifier of domains, it has the classifier minimize the loss that the
    extractor maximizes.

    The scale is a weight that is not trained: it is saved with the others, and a callback that assigns
    `layer.scale = value` changes it during `fit` without compiling anything again. As with every variable that
    a callback assigns, it must reach the model through `self.model` first, because on JAX that is what brings
    the variables up to date.

    Args:
        scale: a finite number, the scale to start with.
        **kwargs: those of `keras.layers.Layer`.

    Call arguments:
        inputs: a floating-point tensor of any shape.

    Returns:
        The inputs, unchanged.

    Raises:
        ValueError: if `scale` is no finite number.

    Cost:
        None forwards; backwards the gradient is read once more.

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

    Source: as `reverse_gradient`; equation 14 there is a schedule for the scale.
    """

    def __init__(self, scale=1.0, **kwargs):
        super().__init__(**kwargs)
        self._initial_scale = gradient_ops.require_number(scale, "scale")
        # Not in the layer's own dtype, which may be of half precision.
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
        """The `keras.Variable` that holds the scale; a number can be assigned to it."""
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
