"""The base class of layers that return a derivative of a wrapped layer."""

from typing import Any

import keras

from keras_gradtools import chosen_inputs, validation
from keras_gradtools.annotations import Function, InputNames, Nested
from keras_gradtools.keras_state.layer_state import state_variables


class Derivative(keras.layers.Wrapper):
    """Base class of layers that return, for each example, a derivative with respect to one input of a wrapped layer."""

    def __init__(
        self, layer: keras.Layer, return_outputs: bool = False, inputs: InputNames = None, **kwargs: Any
    ) -> None:
        if not isinstance(layer, keras.Layer):
            raise validation.refused(type(self).__name__, "a Keras layer or model", "layer", layer)
        self.return_outputs: bool = validation.require_flag(type(self).__name__, "return_outputs", return_outputs)
        self._inputs = chosen_inputs.require_names(type(self).__name__, inputs)
        super().__init__(layer, **kwargs)

    def build(self, input_shape: Any = None) -> None:
        # `Wrapper.build` assumes a single input shape.
        if not self.layer.built:
            self.layer.build(input_shape)
            self.layer.built = True
        self.built = True

    def call(self, inputs: Nested, training: bool | None = None) -> Nested:
        # The derivative discards what the layer assigns (statistics, seeds), so this call updates the state.
        outputs = None
        if self.return_outputs or (training and state_variables(self.layer)):
            outputs = self._value_at(inputs, training)
        chosen = self._chosen(inputs)
        (x,) = chosen.parts(inputs)
        derivative = self.derivative(lambda x: self._value_at(chosen.filled(inputs, [x]), training), x)
        if not self.return_outputs:
            return derivative
        return (outputs, *derivative) if isinstance(derivative, tuple) else (outputs, derivative)

    def _value_at(self, inputs, training):
        return self.layer(inputs, training=training) if self.layer._call_has_training_arg else self.layer(inputs)

    def _chosen(self, inputs):
        chosen = chosen_inputs.choose(type(self).__name__, self.layer, inputs, self._inputs)
        if len(chosen.positions) > 1:
            raise ValueError(
                f"{type(self).__name__} differentiates with respect to one input. Received: {len(chosen.positions)} "
                f"floating-point inputs, {', '.join(validation.describe(x) for x in chosen.parts(inputs))}. Choose one "
                "by `inputs`, with its name or its position. The others are passed on unchanged."
            )
        return chosen

    def _require_points(self, x):
        if len(x.shape) != 2 or x.shape[1] is None:
            raise ValueError(
                f"{type(self).__name__} expects an input of shape (batch, n). Received: shape {tuple(x.shape)}."
            )

    def derivative(self, fun: Function, x: Nested) -> Nested:
        """Returns the derivative of `fun`, a function of the input, at `x`."""
        raise NotImplementedError

    def derivative_spec(self, inputs: Nested, outputs: Nested) -> Nested:
        """Returns the shape of the derivative."""
        raise NotImplementedError

    def compute_output_spec(self, inputs: Nested, training: bool | None = None) -> Nested:
        outputs = self.layer.compute_output_spec(inputs)
        if not isinstance(outputs, keras.KerasTensor):
            raise ValueError(
                f"{type(self).__name__} expects one tensor as output of the layer. Received: {type(outputs).__name__}."
            )
        (x,) = self._chosen(inputs).parts(inputs)
        derivative = keras.KerasTensor(self.derivative_spec(x, outputs), dtype=outputs.dtype)
        return (outputs, derivative) if self.return_outputs else derivative

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "return_outputs": self.return_outputs, "inputs": self._inputs}
