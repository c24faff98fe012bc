"""What layers whose output is a derivative of another one's have in common."""

import keras

from keras_gradtools import validation
from keras_gradtools.backend.state import state_variables


class Derivative(keras.layers.Wrapper):
    """A layer that returns a derivative of the wrapped one, by its input, of each example."""

    def __init__(self, layer, return_outputs=False, **kwargs):
        if not isinstance(layer, keras.Layer):
            raise ValueError(
                f"{type(self).__name__} expects a Keras layer or model. Received: {validation.describe(layer)}."
            )
        if not isinstance(return_outputs, bool):
            raise ValueError(
                f"{type(self).__name__} expects True or False as `return_outputs`. "
                f"Received: {validation.shown(return_outputs)}."
            )
        super().__init__(layer, **kwargs)
        self.return_outputs = return_outputs

    def call(self, inputs, training=None):
        # What the layer assigns, statistics and seeds, is that of this call; inside the derivative it is dropped.
        outputs = None
        if self.return_outputs or (training and state_variables(self.layer)):
            outputs = self._value_at(inputs, training)
        derivative = self.derivative(inputs, training)
        return (outputs, derivative) if self.return_outputs else derivative

    def _value_at(self, inputs, training):
        return self.layer(inputs, training=training) if self.layer._call_has_training_arg else self.layer(inputs)

    def derivative(self, inputs, training):
        """The derivative, by transforms."""
        raise NotImplementedError

    def derivative_spec(self, inputs, outputs):
        """The shape of the derivative."""
        raise NotImplementedError

    def compute_output_spec(self, inputs, training=None):
        outputs = self.layer.compute_output_spec(inputs)
        for role, x in (("input", inputs), ("output of the layer", outputs)):
            if not isinstance(x, keras.KerasTensor):
                raise ValueError(f"{type(self).__name__} expects one tensor as {role}. Received: {type(x).__name__}.")
        derivative = keras.KerasTensor(self.derivative_spec(inputs, outputs), dtype=outputs.dtype)
        return (outputs, derivative) if self.return_outputs else derivative

    def get_config(self):
        return {**super().get_config(), "return_outputs": self.return_outputs}
