"""A model as an attack sees it: a function of one input, in inference mode, with constant weights."""

import contextlib

import keras
from keras import ops

from keras_gradtools.keras_state import layer_state, scopes


class OfOneInput:
    """`model(inputs)` as a function of one of its inputs.

    Args:
        model: A Keras model or a function.
        chosen: The `ChosenInputs` with the position of that input.
        inputs: All inputs, in the nested structure that the model takes. The one at that position is replaced.
    """

    def __init__(self, model, chosen, inputs):
        self.model, self._chosen, self._inputs = model, chosen, inputs

    def __call__(self, x, training=False):
        inputs = self._chosen.filled(self._inputs, [x])
        return self.model(inputs, training=training) if isinstance(self.model, keras.Layer) else self.model(inputs)


def called(model, x):
    """The outputs of a model in inference mode, or of a function."""
    return model(x, training=False) if isinstance(model, keras.Layer) else model(x)


def output_activation(model):
    """The activation of the last layer of `model`, or None if it cannot be determined."""
    model = _whole(model)
    while isinstance(model, keras.Model):
        parts = model.layers if isinstance(model, keras.Sequential) else getattr(model, "operations", None)
        if not parts:
            # A custom `call` may do more after the last layer. A sigmoid, however, is nearly always the last step.
            last = getattr(layer_state.layers_of(model)[-1], "activation", None)
            return last if last is keras.activations.sigmoid else None
        model = parts[-1]
    return getattr(model, "activation", None)


def constant_weights(model):
    """A context in which no gradient reaches the weights of `model`, and whose assignments are dropped at its end."""
    model = _whole(model)
    if not isinstance(model, keras.Layer):
        return contextlib.nullcontext()
    return scopes.StateScope([(v, ops.stop_gradient(ops.convert_to_tensor(v))) for v in model.trainable_variables])


def _whole(model):
    return model.model if isinstance(model, OfOneInput) else model
