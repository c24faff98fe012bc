"""A model as a function of the one input that an attack perturbs; its other inputs stay as they are."""

import contextlib

import keras
from keras import ops

from keras_gradtools.backend import state


class OfOneInput:
    """`model(inputs)` as a function of the chosen one of its inputs, which is how attacks see a model of several.

    Args:
        model: a Keras model or a function.
        chosen: the `ChosenInputs`, of one position.
        inputs: all inputs, nested as the model takes them; that at the position is replaced.
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
    """The activation that the outputs of `model` come from; None where that cannot be seen."""
    model = _whole(model)
    while isinstance(model, keras.Model):
        parts = model.layers if isinstance(model, keras.Sequential) else getattr(model, "operations", None)
        if not parts:
            # What a `call` of its own does after its last layer is not seen, but a sigmoid is mostly the end.
            last = getattr(state.layers_of(model)[-1], "activation", None)
            return last if last is keras.activations.sigmoid else None
        model = parts[-1]
    return getattr(model, "activation", None)


def constant_weights(model):
    """A block in which no gradient reaches the weights of `model`, and what it assigns is dropped."""
    model = _whole(model)
    if not isinstance(model, keras.Layer):
        return contextlib.nullcontext()
    return state.StateScope([(v, ops.stop_gradient(ops.convert_to_tensor(v))) for v in model.trainable_variables])


def _whole(model):
    return model.model if isinstance(model, OfOneInput) else model
