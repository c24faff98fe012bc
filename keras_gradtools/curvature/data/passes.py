"""A summary of one pass over data, to compare the examples and batches of two passes."""

import collections
import zlib

import numpy as np
from keras import ops

from keras_gradtools import nesting


class Pass:
    """The checksums of the examples and of the batches of a pass.

    Attributes:
        examples: A counter of the checksums of the examples.
        batches: The checksums of the batches, in order. They depend on the order of the examples in a batch.
    """

    def __init__(self):
        self.examples: collections.Counter = collections.Counter()
        self.batches: list[int] = []

    def add(self, batch):
        """Adds a batch `(x, y, sample_weight)`."""
        arrays = [_rows(leaf) for part in batch for leaf in nesting.flatten(part) if leaf is not None]
        if len({len(rows) for rows in arrays}) > 1:
            # Sets of points of different sizes are compared as a whole.
            arrays = [rows.reshape(1, -1) for rows in arrays]
        found = [_checksum(rows) for rows in zip(*arrays, strict=True)]
        self.examples.update(found)
        self.batches.append(zlib.crc32(np.array(found, "uint32").tobytes()))

    def is_in_the_order_of(self, other, of_batches):
        """Whether the batches are the same. With `of_batches`, whether they also come in the same order."""
        return self.batches == other.batches if of_batches else sorted(self.batches) == sorted(other.batches)

    def count_missing(self, other):
        """How many examples of `other` are not in this pass."""
        return (other.examples - self.examples).total()


def _checksum(parts):
    number = 0
    for part in parts:
        number = zlib.crc32(part, number)
    return number


def _rows(x):
    array = np.asarray(ops.convert_to_numpy(ops.stop_gradient(x)) if ops.is_tensor(x) else x)
    if array.dtype.hasobject:
        return [repr(row).encode() for row in array.tolist()]
    return np.ascontiguousarray(array).reshape(len(array), -1).view("uint8")
