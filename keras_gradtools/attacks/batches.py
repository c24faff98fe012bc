"""Checks arrays of examples, and maps a function over their batches with a progress bar."""

import random
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_gradtools import chosen_inputs, nesting, validation
from keras_gradtools.attacks.perturbed_input import OfOneInput, called, constant_weights
from keras_gradtools.display.progress import Progress


class Examples(NamedTuple):
    """Checked examples and labels, in NumPy arrays.

    Attributes:
        x: The input to perturb.
        y: The labels.
        inputs: All inputs, in the nested structure in which they were given.
        chosen: The `ChosenInputs` that says which of them is `x`. None if `x` is the only input; `inputs` then is `x`.
    """

    x: np.ndarray
    y: np.ndarray
    inputs: Any
    chosen: Any

    @property
    def arrays(self):
        """The arrays to split into batches: `x`, `y`, and the inputs that are not perturbed."""
        return (self.x, self.y, *([] if self.chosen is None else self.chosen.rest(self.inputs)))

    def carried(self, x, rest):
        """All inputs of a batch as tensors, from its `x` and the `rest` of `arrays`; None if `x` is the only input."""
        if self.chosen is None:
            return None
        rest = iter([a if a is None else ops.convert_to_tensor(a) for a in rest])
        count, positions = self.chosen.total, self.chosen.positions
        return nesting.pack_as(self.inputs, [x if i in positions else next(rest) for i in range(count)])

    def with_perturbed(self, x):
        """The inputs with `x` in place of the input to perturb."""
        return x if self.chosen is None else self.chosen.filled(self.inputs, [x])

    def first(self, model):
        """`model` as a function of the input to perturb, and the first example of that input."""
        x = ops.convert_to_tensor(self.x[:1])
        if self.chosen is None:
            return model, x
        rest = [a[:1] if a is not None and a.ndim else a for a in self.chosen.rest(self.inputs)]
        return OfOneInput(model, self.chosen, self.carried(x, rest)), x


def require_examples(owner, model, x, y, clip, names=None):
    """Returns the `Examples`, and raises `ValueError` if they do not fit. `names` is what `require_names` returned."""
    validation.require_callable_model(owner, model)
    expected = f"{owner} expects arrays or tensors of shape (batch, ...) as `x`"
    if nesting.is_nested(x) and len(nesting.flatten(x)):
        given = nesting.map_structure(lambda a: a if a is None else validation.as_array(a, expected), x)
        chosen = chosen_inputs.choose_one(owner, model, given, names)
        chosen_inputs.require_batch_size(owner, chosen, given, rank=2)
        (x,) = chosen.parts(given)
    else:
        given = x = validation.as_array(x, expected)
        if names is not None:
            chosen_inputs.choose_one(owner, model, given, names)
        chosen = None
    y = validation.as_array(y, f"{owner} expects an array or tensor of labels as `y`")
    if not keras.backend.is_float_dtype(validation.dtype_of(x)):
        raise ValueError(
            f"{owner} perturbs floating-point examples. Received: x={validation.describe(x)}. If these are pixels, "
            "cast them to 'float32', in the scale that the model is trained on."
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
            f"{x.max():g}. Pass the range of your data, or clip=None for no range."
        )
    return Examples(x, y, given, chosen)


def require_labels(owner, model, examples):
    """Raises `ValueError` unless the model is a classifier and the labels are its classes, or one-hot."""
    y, outputs = examples.y, first_outputs(model, examples)
    if not ops.is_tensor(outputs) or len(outputs.shape) != 2:
        raise ValueError(
            f"{owner} expects a classifier, which returns one score for each class, of shape (batch, classes). "
            f"Received: a model that returns {validation.describe(outputs)}. For other models, pass your own `loss`, a "
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
            f"Received: y={validation.describe(y)}, from {y.min()} to {y.max()}. For labels of another kind, pass your "
            "own `loss`, a function of (y, y_pred) that returns one number for each example."
        )


def first_outputs(model, examples):
    """The outputs of the model for the first example."""
    model, x = examples.first(model)
    scope = constant_weights(model)
    with scope, scope:
        return called(model, x)


def seeds_from(seed):
    """A generator of seeds. Without a seed, it is seeded from Python's global generator, as in Keras."""
    return random.Random(random.randrange(2**31) if seed is None else int(seed))


def map_batches(fun, arrays, batch_size, verbose, title):
    """Applies `fun(*batch)` to all batches, and returns a tuple of NumPy arrays, concatenated over the batches.

    The last batch is padded with repeated examples to the size of the others, so that compiled functions see only one
    shape. Scalars and None are passed to every call unchanged.
    """
    count = len(arrays[0])
    starts = range(0, count, batch_size)
    found = []
    with Progress(len(starts), title, verbose, "batch") as progress:
        for start in starts:
            places = np.arange(start, min(start + batch_size, count))
            filled = np.resize(places, min(batch_size, count))
            results = fun(*(a if a is None or not a.ndim else a[filled] for a in arrays))
            found.append([result[: len(places)] for result in results])
            progress.update()
    return tuple(np.concatenate(column) for column in zip(*found, strict=True))
