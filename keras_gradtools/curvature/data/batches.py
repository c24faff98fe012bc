"""Data as batches that can be iterated repeatedly."""

import math

import keras
import numpy as np
from keras import ops

from keras_gradtools import nesting, validation
from keras_gradtools.curvature.data.passes import Pass

# Number of passes that are compared with the first one. A single one may agree by chance if there are few examples.
_PASSES = 8


class Batches:
    """The batches of a data set, as `(x, y, sample_weight)` of tensors.

    With `must_repeat`, every pass must have the same examples, in any order. The first passes are compared, and a
    difference raises `ValueError`.

    Attributes:
        count: The number of batches. None if it is not known.
        is_reordered: Whether a pass had examples in other batches, or at other positions in a batch, than the first
            one.
        counts_order: Whether the same batches in another order also count as reordered.
    """

    def __init__(self, owner, data, batch_size, must_repeat=False):
        validation.require_data(owner, data)
        self._owner = owner
        self._data = data
        self._size = validation.require_count(owner, "batch_size", batch_size)
        self._examples = None
        # Arrays and lists always repeat.
        self._passes_to_see = _PASSES if must_repeat and not isinstance(data, (tuple, list)) else 0
        self._first: Pass | None = None
        self.is_reordered = self.counts_order = False
        if isinstance(data, tuple):
            self._data = tuple(nesting.map_structure(self._array, part) for part in data)
            self._examples = self._number_of_examples(self._data)
            self.count = math.ceil(self._examples / self._size)
        elif isinstance(data, keras.utils.PyDataset):
            self.count = data.num_batches
            if self.count is None:
                raise ValueError(f"{owner} needs a finite data set. Received: a PyDataset without `num_batches`.")
        else:
            self.count = self._count_of(data)
        if self.count == 0:
            raise ValueError(f"{owner} needs examples. Received: an empty data set, {validation.describe(data)}.")

    def look(self):
        """Iterates over the data twice to compare the passes, if they may differ: see `must_repeat`."""
        for _ in range(2 if self._passes_to_see else 0):
            for _ in self:
                pass

    def __iter__(self):
        is_empty = True
        seen = Pass() if self._passes_to_see else None
        for batch in self._raw():
            batch = self._require_batch(batch)
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
            return "which can be iterated only once. Pass a list of its batches, or a keras.utils.PyDataset."
        count, missing = first.examples.total(), seen.count_missing(first)
        if 2 * missing > count:
            return (
                f"in which {missing} of {count} examples differ in another pass: they are drawn or augmented at "
                "random. Pass the batches of one pass, as `list(data)`, or draw random numbers in the model, which "
                "repeats them."
            )
        if missing:
            return (
                f"in which {missing} of {count} examples are missing in another pass: a shuffle with `drop_last=True` "
                "(or `drop_remainder`), a sampler or a filter leaves out different examples each time. Keep the last "
                "batch, or pass the data in a fixed order."
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

    def _require_batch(self, batch):
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

    def _count_of(self, data):
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
    """A single batch that was already checked."""

    count = 1
    is_reordered = False

    def __init__(self, batch):
        self._batch = batch

    def look(self):
        """Does nothing, since a single batch cannot change."""

    def __iter__(self):
        yield self._batch


def refuse_non_finite(owner, batches):
    """Raises `ValueError` if a batch has NaN or infinity."""
    for number, batch in enumerate(batches):
        for part, name in zip(batch, ("x", "y", "sample_weight"), strict=True):
            for leaf in nesting.flatten(part):
                array = None if leaf is None else ops.convert_to_numpy(leaf)
                if array is not None and array.dtype.kind == "f" and not np.isfinite(array).all():
                    places = np.unique(np.argwhere(~np.isfinite(array))[:, 0])
                    raise ValueError(
                        f"{owner} expects finite data. Received: NaN or infinity in `{name}`, in batch {number}, in "
                        f"{len(places)} examples, the first at index {places[0]}. The weights did not change."
                    )


def batch_size_of(batch):
    """The number of examples in a batch."""
    return nesting.flatten(batch[0])[0].shape[0]


def _tensor(x):
    # Tensors of other frameworks, from a DataLoader or a `tf.data.Dataset`, are converted to NumPy arrays first.
    return x if x is None or ops.is_tensor(x) else ops.convert_to_tensor(np.asarray(x))
