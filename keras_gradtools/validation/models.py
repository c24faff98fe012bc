"""Checks of models, losses, data and variables."""

import keras

from keras_gradtools import nesting
from keras_gradtools.validation.descriptions import describe, shown
from keras_gradtools.validation.kinds import is_variable
from keras_gradtools.validation.options import refused


def require_callable_model(owner, model):
    """Raises `ValueError` unless `model` can be called."""
    if not callable(model) or isinstance(model, keras.KerasTensor):
        raise ValueError(f"{owner} expects a Keras model or a function as `model`. Received: {describe(model)}.")


def require_built(owner, model):
    """Raises `ValueError` unless the Keras model or layer `model` has its weights."""
    if not model.built:
        raise ValueError(
            f"{owner} expects a built model. Received: the unbuilt model {model.name!r}. Give it a keras.Input, or "
            "call it on data once."
        )


# Loss names that are not functions: `compile` chooses the cross-entropy that fits the labels.
LOSSES_BY_THE_LABELS = ("crossentropy", "ce")


def require_loss(owner, loss):
    """Raises `ValueError` unless `keras.Model.compile` accepts `loss`. None stands for the loss of the model."""
    for each in keras.tree.flatten(loss) if isinstance(loss, (dict, list, tuple)) else [loss]:
        is_loss = each is None or (callable(each) and not isinstance(each, keras.KerasTensor))
        if isinstance(each, str):
            try:
                is_loss = each in LOSSES_BY_THE_LABELS or callable(keras.losses.get(each))
            except ValueError:
                is_loss = False
        if not is_loss:
            raise ValueError(
                f"{owner} expects a `loss` as for `compile`: the name of a Keras loss, a keras.losses.Loss, or a "
                f"function (y_true, y_pred). Received: loss={shown(each)}."
            )


DATA = "(x, y) or (x, y, sample_weight), a tf.data.Dataset, a keras.utils.PyDataset or a torch DataLoader"


def require_data(owner, data):
    """Raises `ValueError` unless `data` is a tuple of two or three arrays or an iterable of batches."""
    is_array = hasattr(data, "shape") or isinstance(data, (str, bytes, dict, set, frozenset))
    is_batches = hasattr(data, "__iter__") or isinstance(data, keras.utils.PyDataset)
    if is_array or not is_batches or (isinstance(data, tuple) and len(data) not in (2, 3)):
        advice = "Give the list of the batches that it returns, `list(data())`." if callable(data) else ""
        raise refused(owner, DATA, "data", data, advice)


def require_variables(owner, variables):
    """Raises `ValueError` unless `variables` is a nested structure of Keras variables, a layer, or None."""
    if variables is None or isinstance(variables, keras.Layer):
        return
    leaves = nesting.flatten(variables)
    wrong = [x for x in leaves if not is_variable(x)]
    if wrong or not leaves:
        raise ValueError(
            f"{owner} expects as `variables` keras.Variables of the model, in any nested structure, or one of its "
            "layers. "
            f"Received: {describe(wrong[0]) if wrong else describe(variables)}."
        )
