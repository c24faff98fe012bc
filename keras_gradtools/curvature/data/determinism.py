"""Checks that two computations of the same curvature agree, and finds the layer that causes a difference."""

import keras
import numpy as np
from keras import ops

from keras_gradtools.keras_state import layer_calls
from keras_gradtools.keras_state.layer_calls import class_path, path_of
from keras_gradtools.keras_state.layer_state import layers_of
from keras_gradtools.keras_state.seeds import has_seeds

# Relative tolerance. Sums in another order differ only by rounding. Other random numbers change a result by far more.
_TOLERANCE = 1e-3


def require_same_twice(owner, model, loss, parameters, batch, losses, product):
    """Raises `ValueError` if two products with the first batch differ. `losses` are the losses of its examples."""
    x, y, _ = batch
    first, second = product(batch), product(batch)
    if _agree(first, second):
        return
    culprit = _first_difference(model, loss, parameters, x)
    again = loss.of_examples(model, parameters.variables_as_tensors(), x, y)
    if not culprit and _agree(losses, ops.convert_to_numpy(again)):
        # If the loss is flat along the vector, both products are rounding noise, so a mismatch proves nothing.
        return
    where = f"the layer {culprit}" if culprit else "the loss, or what the model computes outside of its layers"
    difference = np.linalg.norm(first - second) / (np.linalg.norm(first) or 1.0)
    raise ValueError(
        f"{owner} needs a model that returns the same result twice: two products with the same vector and the same "
        f"weights differ by {difference:.1g} of their length. The cause is {where}. Draw random numbers with "
        "keras.random and a keras.random.SeedGenerator, which is replayed, or use training=False if that turns them "
        "off."
    )


def require_same_in_any_order(owner, model, training, is_drawn, computed):
    """Raises `ValueError` if the order of the examples changes the results of all functions in `computed`.

    Each function goes through all of the data. If one of them returns the same array twice, the differences of the
    others are rounding noise.
    """
    difference = 0.0
    for compute in computed:
        first, second = compute(), compute()
        if _agree(first, second):
            return
        difference = difference or float(np.linalg.norm(first - second) / (np.linalg.norm(first) or 1.0))
    if is_drawn:
        cause = "the labels that are drawn depend on the position of an example in the data"
    else:
        cause = _what_goes_by_the_batch(model, training)
    raise ValueError(
        f"{owner} goes through the data at every product, and the examples come in another order each time, which "
        f"changes the result: two passes differ by {difference:.1g} of their length. The cause: {cause}. Pass the data "
        "without a shuffle, or the batches of one pass, as `list(data)`."
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
        causes.append(f"with training=True, an example depends on the others of its batch in {', '.join(normalizing)}")
    if drawing:
        causes.append(f"the random numbers of {', '.join(drawing)} depend on the position of an example")
    return "; ".join(causes) or (
        "the loss of a batch is not a mean over its examples, as with reduction='sum', a division by the sum of sample "
        "weights or of a mask, or a model that mixes examples"
    )


def _agree(first, second):
    if not np.all(np.isfinite(first) == np.isfinite(second)):
        return False
    is_finite = np.isfinite(first)
    difference = np.linalg.norm((first - second)[is_finite].astype("float64"))
    return difference <= _TOLERANCE * np.linalg.norm(first[is_finite].astype("float64"))


def _first_difference(model, loss, parameters, x):
    """The path and class of the first layer that returns different values in a second run. Inner layers come first."""
    runs = []
    for _ in range(2):
        with layer_calls.recorded(model) as calls:
            loss.outputs(model, parameters.variables_as_tensors(), x)
        runs.append(calls)
    for a, b in zip(*runs, strict=False):
        if not all(np.array_equal(p, q, equal_nan=True) for p, q in zip(a.outputs, b.outputs, strict=False)):
            return f"{path_of(a.layer)!r} of class {class_path(a.layer)}"
    return None
