"""What one pass over data had in it: whether another has the same examples, in the same batches."""

import collections
import zlib

import numpy as np
from keras import ops

from keras_gradtools import nesting


class Pass:
    """The checksums of the examples of a pass, and of its batches, of which each is made in their order.

    Attributes:
        examples: how often there was which example.
        batches: the batches, in order.
    """

    def __init__(self):
        self.examples: collections.Counter = collections.Counter()
        self.batches: list[int] = []

    def add(self, batch):
        """Takes in `(x, y, sample_weight)`."""
        arrays = [_rows(leaf) for part in batch for leaf in nesting.flatten(part) if leaf is not None]
        found = [_checksum(rows) for rows in zip(*arrays, strict=True)]
        self.examples.update(found)
        self.batches.append(zlib.crc32(np.array(found, "uint32").tobytes()))

    def is_in_the_order_of(self, other, of_batches):
        """Whether the batches are the same; with `of_batches`, whether they come in the same order, too."""
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
