"""Data as batches that can be gone through again and again."""

import math

import keras
import numpy as np
from keras import ops

from keras_gradtools import nesting, validation
from keras_gradtools.curvature.passes import Pass

# Passes over data that come from elsewhere which are looked at: two may be equal by chance, where they are few.
_PASSES = 8


class Batches:
    """The batches of a data set, as `(x, y, sample_weight)` in tensors.

    With `must_repeat`, the examples have to be the same ones at each pass: the first passes are compared, and others
    are refused. Their order may be another.

    Attributes:
        count: how many they are, None where the data does not say.
        is_reordered: whether examples were seen to be in other batches, or at other places in them, than before.
        counts_order: whether it is also another order, if the same batches come in another one.
    """

    def __init__(self, owner, data, batch_size, must_repeat=False):
        self._owner = owner
        self._data = data
        self._size = batch_size
        self._examples = None
        # Arrays and lists cannot but repeat.
        self._passes_to_see = _PASSES if must_repeat and not isinstance(data, (tuple, list)) else 0
        self._first: Pass | None = None
        self.is_reordered = self.counts_order = False
        if isinstance(batch_size, bool) or not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
            raise ValueError(
                f"{owner} expects a positive integer as `batch_size`. Received: {validation.describe(batch_size)}."
            )
        if isinstance(data, tuple):
            self._data = tuple(nesting.map_structure(self._array, part) for part in data)
            self._examples = self._number_of_examples(self._data)
            self.count = math.ceil(self._examples / batch_size)
        elif isinstance(data, keras.utils.PyDataset):
            self.count = data.num_batches
            if self.count is None:
                raise ValueError(f"{owner} needs a finite data set. Received: a PyDataset without `num_batches`.")
        else:
            self.count = self._checked_length(data)
        if self.count == 0:
            raise ValueError(f"{owner} needs examples. Received: an empty data set, {validation.describe(data)}.")

    def look(self):
        """Goes through the data twice, where they may differ from pass to pass: see `must_repeat`."""
        for _ in range(2 if self._passes_to_see else 0):
            for _ in self:
                pass

    def __iter__(self):
        is_empty = True
        seen = Pass() if self._passes_to_see else None
        for batch in self._raw():
            batch = self._checked(batch)
            if batch_size_of(batch):
                if seen is not None:
                    seen.add(batch)
                yield batch
                is_empty = False
        if seen is not None:
            self._compare(seen)
        if is_empty:
            raise ValueError(
                f"{self._owner} needs examples. Received: an empty data set, {validation.describe(self._data)}."
            )

    def _compare(self, seen):
        first = self._first
        if first is None:
            self._first = seen
            return
        self._passes_to_see -= 1
        if seen.examples != first.examples:
            raise ValueError(
                f"{self._owner} goes through the data at every product, and needs the same examples each time. "
                f"Received: {validation.describe(self._data)}, {self._what_differs(seen, first)}"
            )
        self.is_reordered = self.is_reordered or not seen.is_in_the_order_of(first, self.counts_order)

    def _what_differs(self, seen, first):
        if not seen.batches:
            return "which can be gone through only once. Give a list of its batches, or a keras.utils.PyDataset."
        count, missing = first.examples.total(), seen.count_missing(first)
        if 2 * missing > count:
            return (
                f"of which {missing} of {count} examples are others in another pass: they are drawn, or augmented, at "
                "random. Give what one pass has, as `list(data)`, or draw in the model, which repeats it."
            )
        if missing:
            return (
                f"of which {missing} of {count} examples are missing in another pass: a shuffle with `drop_last=True` "
                "(or `drop_remainder`), a sampler or a filter leaves out others each time. Keep the last batch, or "
                "give the data in one order."
            )
        return f"which has {seen.examples.total() - count} more examples in another pass than the {count} of the first."

    def _raw(self):
        if self._examples is not None:
            for start in range(0, self._examples, self._size):
                places = slice(start, start + self._size)
                yield nesting.map_structure(lambda a: None if a is None else a[places], self._data)  # noqa: B023
        elif isinstance(self._data, keras.utils.PyDataset):
            yield from (self._data[i] for i in range(self.count))
        else:
            yield from self._data

    def _checked(self, batch):
        if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
            what = f"{len(batch)} parts" if isinstance(batch, (tuple, list)) else validation.describe(batch)
            raise ValueError(
                f"{self._owner} expects batches (x, y) or (x, y, sample_weight). Received: a batch of {what}."
            )
        x, y, sample_weight = (*batch, None)[:3]
        tensors = tuple(nesting.map_structure(_tensor, part) for part in (x, y, sample_weight))
        self._number_of_examples(tensors)
        return tensors

    def _number_of_examples(self, parts):
        if len(parts) not in (2, 3):
            raise ValueError(
                f"{self._owner} expects as `data` (x, y) or (x, y, sample_weight), a tf.data.Dataset, a "
                f"keras.utils.PyDataset or a torch DataLoader. Received: a tuple of {len(parts)}."
            )
        shapes = [tuple(a.shape) for a in nesting.flatten(parts) if a is not None]
        sizes = {shape[0] if shape else None for shape in shapes}
        if len(sizes) != 1 or None in sizes:
            raise ValueError(
                f"{self._owner} expects arrays of shape (batch, ...) with the same number of examples. Received: the "
                f"shapes {shapes}."
            )
        return sizes.pop()

    def _array(self, x):
        if x is None or ops.is_tensor(x):
            return x
        array = np.asarray(x)
        if array.dtype.kind not in "fiub" and validation.dtype_of(array) != "bfloat16":
            raise ValueError(f"{self._owner} expects arrays of numbers as `data`. Received: {validation.describe(x)}.")
        return array

    def _checked_length(self, data):
        if hasattr(data, "shape") or isinstance(data, (str, dict, set, frozenset)) or not hasattr(data, "__iter__"):
            hint = " Give the list of the batches that it returns, `list(data())`." if callable(data) else ""
            raise ValueError(
                f"{self._owner} expects as `data` (x, y) or (x, y, sample_weight), a tf.data.Dataset, a "
                f"keras.utils.PyDataset or a torch DataLoader. Received: {validation.describe(data)}.{hint}"
            )
        if hasattr(data, "__next__"):
            raise ValueError(
                f"{self._owner} goes through the data at every product, and cannot go through a generator twice. "
                f"Received: {validation.describe(data)}. Give a list of its batches, or a keras.utils.PyDataset."
            )
        cardinality = getattr(data, "cardinality", None)
        if callable(cardinality):
            known = int(cardinality())
            if known == -1:
                raise ValueError(f"{self._owner} needs a finite data set. Received: an infinite one. Use `take`.")
            return known if known >= 0 else None
        try:
            return len(data)
        except TypeError:
            return None


class OneBatch:
    """A single batch, already checked."""

    count = 1
    is_reordered = False

    def __init__(self, batch):
        self._batch = batch

    def look(self):
        """Nothing can have changed."""

    def __iter__(self):
        yield self._batch


def refuse_non_finite(owner, batches):
    """Raises `ValueError` if there is NaN or infinity in some batches."""
    for number, batch in enumerate(batches):
        for part, name in zip(batch, ("x", "y", "sample_weight"), strict=True):
            for leaf in nesting.flatten(part):
                array = None if leaf is None else ops.convert_to_numpy(leaf)
                if array is not None and array.dtype.kind == "f" and not np.isfinite(array).all():
                    places = np.unique(np.argwhere(~np.isfinite(array))[:, 0])
                    raise ValueError(
                        f"{owner} expects finite data. Received: NaN or infinity in `{name}`, in batch {number}, of "
                        f"{len(places)} examples, the first of them {places[0]}. The weights were not changed."
                    )


def batch_size_of(batch):
    """The number of examples of a batch."""
    return nesting.flatten(batch[0])[0].shape[0]


def _tensor(x):
    # Other frameworks' tensors, as a DataLoader or a `tf.data.Dataset` has them, are arrays to NumPy.
    return x if x is None or ops.is_tensor(x) else ops.convert_to_tensor(np.asarray(x))
