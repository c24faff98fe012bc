"""What the models that train another model have in common."""

import contextlib

import keras

from keras_gradtools import backend, validation
from keras_gradtools.backend.state import state_variables, undone_by_errors


class WrappedModel(keras.Model):
    """A model that trains `model`, shared and not copied, in a way of its own; `owner` is the public class's name."""

    def __init__(self, owner, model, **kwargs):
        _check_model(owner, model)
        kwargs.setdefault("dtype", model.dtype_policy)
        # Without autocasting the gradient is by the inputs as they come, not by a copy in half precision.
        super().__init__(autocast=False, **kwargs)
        self.model = model
        self._forward = self._call_model
        self.built = True

    @property
    def wrapped_model(self):
        """The model whose weights are trained."""
        return self.model

    @property
    def output_names(self):
        # What losses and metrics that are given by name go by.
        return self.model.output_names

    @keras.Model.jit_compile.setter
    def jit_compile(self, value):
        keras.Model.jit_compile.fset(self, value)
        self._forward = backend.compiled(self._call_model) if value else self._call_model

    def _should_torch_compile(self):
        # Keras would compile the whole step, and stumble over the tape in it.
        return False

    def train_step(self, *args):
        block = self._whole()
        with block, block:
            return super().train_step(*args)

    def test_step(self, *args):
        block = self._whole()
        with block, block:
            return super().test_step(*args)

    def _whole(self):
        """The time of a step that, if it fails, has changed no statistics, no seeds and no metrics."""
        if not backend.assigns_at_once():
            return contextlib.nullcontext()
        return undone_by_errors([*state_variables(self), *self.metrics_variables])

    def _call_model(self, inputs, training):
        return self.model(inputs, training=training)

    def export(self, *args, **kwargs):
        """Exports the wrapped model, as `keras.Model.export` does."""
        return self.model.export(*args, **kwargs)

    def get_config(self):
        return {**super().get_config(), "model": keras.saving.serialize_keras_object(self.model)}


def _check_model(owner, model):
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"{owner} expects a keras.Model as `model`. Received: {validation.describe(model)}. Put layers into a "
            "keras.Sequential with a keras.Input first."
        )
    if not model.built:
        raise ValueError(
            f"{owner} expects a built model. Received: the unbuilt model {model.name!r}. Give it a keras.Input, call "
            "`model.build(input_shape)`, or call it on data once."
        )
