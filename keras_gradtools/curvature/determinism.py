"""Whether the curvature of a model is the same when it is asked for twice, and which layer is the cause if not."""

import keras
import numpy as np
from keras import ops

from keras_gradtools.backend import layer_calls
from keras_gradtools.backend.layer_calls import class_path, path_of
from keras_gradtools.backend.state import has_seeds, layers_of

# Sums in another order differ by rounding, a drawn number by far more.
_TOLERANCE = 1e-3


def check(owner, model, loss, parameters, batch, losses, product):
    """Raises `ValueError` if two products with the first batch differ; `losses` are those of its examples."""
    x, y, _ = batch
    first, second = product(batch), product(batch)
    if _agree(first, second):
        return
    culprit = _first_difference(model, loss, parameters, x)
    again = loss.of_examples(model, parameters.variables_as_tensors(), x, y)
    if not culprit and _agree(losses, ops.convert_to_numpy(again)):
        # Products that are zero but for rounding, those of a vector to which the loss is flat, are that of it alone.
        return
    where = f"the layer {culprit}" if culprit else "the loss, or what the model computes outside of its layers"
    difference = np.linalg.norm(first - second) / (np.linalg.norm(first) or 1.0)
    raise ValueError(
        f"{owner} needs a model that computes the same twice: two products with the same vector and the same weights "
        f"differ by {difference:.1g} of their length. The cause is {where}. Draw random numbers with keras.random and "
        "a keras.random.SeedGenerator, which is replayed, or use training=False if that turns them off."
    )


def check_order(owner, model, training, is_drawn, computed):
    """Raises `ValueError` if functions of all the data return another array each time: the order is another one.

    One that does not is enough: what differs in another is rounding.
    """
    difference = 0.0
    for compute in computed:
        first, second = compute(), compute()
        if _agree(first, second):
            return
        difference = difference or float(np.linalg.norm(first - second) / (np.linalg.norm(first) or 1.0))
    if is_drawn:
        cause = "the labels that are drawn go by the place of an example"
    else:
        cause = _what_goes_by_the_batch(model, training)
    raise ValueError(
        f"{owner} goes through the data at every product, and they come in another order each time, which is not the "
        f"same here: two passes differ by {difference:.1g} of their length. The cause: {cause}. Give the data without "
        "a shuffle, or what one pass has, as `list(data)`."
    )


def _what_goes_by_the_batch(model, training):
    normalizing, drawing = [], []
    for layer in layers_of(model) if training else ():
        named = f"{path_of(layer)!r} of class {class_path(layer)}"
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable:
            normalizing.append(named)
        elif has_seeds(layer):
            drawing.append(named)
    causes = []
    if normalizing:
        causes.append(f"with training=True, an example counts by the others of its batch in {', '.join(normalizing)}")
    if drawing:
        causes.append(f"random numbers go by the place of an example in {', '.join(drawing)}")
    return "; ".join(causes) or (
        "the loss of a batch is no mean over its examples, as with reduction='sum', with weights or a mask by whose "
        "sum it is divided, or where the model mixes examples"
    )


def _agree(first, second):
    if not np.all(np.isfinite(first) == np.isfinite(second)):
        return False
    kept = np.isfinite(first)
    difference = np.linalg.norm((first - second)[kept].astype("float64"))
    return difference <= _TOLERANCE * np.linalg.norm(first[kept].astype("float64"))


def _first_difference(model, loss, parameters, x):
    """The path of the innermost layer that first returns other values for the same input."""
    runs = []
    for _ in range(2):
        with layer_calls.recorded(model) as calls:
            loss.outputs(model, parameters.variables_as_tensors(), x)
        runs.append(calls)
    for a, b in zip(*runs, strict=False):
        if not all(np.array_equal(p, q, equal_nan=True) for p, q in zip(a.outputs, b.outputs, strict=False)):
            return f"{path_of(a.layer)!r} of class {class_path(a.layer)}"
    return None
