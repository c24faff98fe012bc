"""Arrays of examples, checked and taken batch by batch, with a progress bar."""

import random

import keras
import numpy as np
from keras import ops

from keras_gradtools import validation
from keras_gradtools.attacks.ascent import called, constant_weights


def checked_examples(owner, model, x, y, clip):
    """Returns `x` and `y` as NumPy arrays; `ValueError` where they cannot be attacked."""
    validation.require_callable_model(owner, model)
    if isinstance(x, (dict, list, tuple)) or not hasattr(x, "shape"):
        raise ValueError(
            f"{owner} expects one array or tensor of shape (batch, ...) as `x`. Received: {validation.describe(x)}. Of "
            "a model with several inputs, attack a function of the one that may be perturbed."
        )
    x = validation.as_array(x, f"{owner} expects one array or tensor of shape (batch, ...) as `x`")
    y = validation.as_array(y, f"{owner} expects an array or tensor of labels as `y`")
    if not keras.backend.is_float_dtype(validation.dtype_of(x)):
        raise ValueError(
            f"{owner} perturbs floating-point examples. Received: x={validation.describe(x)}. Pixels: cast them to "
            "'float32', in the scale that the model is trained on."
        )
    if x.ndim < 2 or not len(x):
        raise ValueError(f"{owner} expects examples of shape (batch, ...). Received: x={validation.describe(x)}.")
    if not y.ndim:
        y = np.repeat(y, len(x))
    if len(y) != len(x):
        raise ValueError(
            f"{owner} expects one label for each example. Received: x={validation.describe(x)} and "
            f"y={validation.describe(y)}."
        )
    if not np.isfinite(x.astype("float64")).all():
        raise ValueError(f"{owner} expects finite examples. Received: x={validation.describe(x)} with NaN or infinity.")
    if clip is not None and (np.any(x < np.asarray(clip[0], x.dtype)) or np.any(x > np.asarray(clip[1], x.dtype))):
        raise ValueError(
            f"{owner} expects examples within the range `clip`. Received: clip={clip}, and `x` from {x.min():g} to "
            f"{x.max():g}. Give the range of your data, or clip=None for none."
        )
    return x, y


def check_batching(owner, batch_size, verbose):
    """Raises `ValueError` for a `batch_size` or `verbose` that no loop over batches has."""
    validation.require_count(owner, "batch_size", batch_size)
    if not validation.is_one_of(verbose, ("auto", 0, 1)):
        raise ValueError(f"{owner} expects 'auto', 0 or 1 as `verbose`. Received: verbose={validation.shown(verbose)}.")


def check_labels(owner, model, x, y):
    """Raises `ValueError` unless `y` are classes of the classifier, or one-hot."""
    with constant_weights(model):
        outputs = called(model, ops.convert_to_tensor(x[:1]))
    if not ops.is_tensor(outputs) or len(outputs.shape) != 2:
        raise ValueError(
            f"{owner} expects a classifier, which returns one score for each class, of shape (batch, classes). "
            f"Received: a model that returns {validation.describe(outputs)}. For another, give your own `loss`, a "
            "function of (y, y_pred) that returns one number for each example."
        )
    count = outputs.shape[1]
    classes = max(count, 2)
    flat = y.reshape(len(y), -1)
    if flat.shape[1] == 1:
        is_right = np.all(flat == np.round(flat)) and flat.min() >= 0 and flat.max() < classes
    else:
        is_right = flat.shape[1] == count and np.all((flat == 0) | (flat == 1)) and np.all(flat.sum(axis=1) == 1)
    if not is_right:
        raise ValueError(
            f"{owner} expects classes from 0 to {classes - 1} as `y`, of shape (batch,), or one-hot rows of {count}. "
            f"Received: y={validation.describe(y)}, from {y.min()} to {y.max()}. For labels of another kind, give your "
            "own `loss`, a function of (y, y_pred) that returns one number for each example."
        )


def seeds_from(seed):
    """A source of seeds. Without a seed it comes from Python's generator, as in Keras."""
    return random.Random(random.randrange(2**31) if seed is None else int(seed))


def map_batches(fun, arrays, batch_size, verbose, title):
    """`fun(*batches)`, NumPy arrays in a tuple, of all batches together. The last one is filled up for `fun`.

    So it needs no program of its own.
    """
    count = len(arrays[0])
    starts = range(0, count, batch_size)
    if verbose:
        bar = keras.utils.Progbar(len(starts), unit_name=title)
    found = []
    for number, start in enumerate(starts, 1):
        places = np.arange(start, min(start + batch_size, count))
        filled = np.resize(places, min(batch_size, count))
        found.append([result[: len(places)] for result in fun(*(a[filled] for a in arrays))])
        if verbose:
            bar.update(number)
    return tuple(np.concatenate(column) for column in zip(*found, strict=True))
