"""Everything that the loss of one batch depends on, so that a gradient is known to be still valid."""

import copy

import numpy as np
from keras import ops

from keras_gradtools import backend, nesting
from keras_gradtools.transforms import compiled


class LossState:
    """The weights, the batch, other variables that the loss reads, and the captured values of its functions."""

    def __init__(self, sums, key, variables):
        (batch,) = sums.batches
        # Another operator may have another loss.
        self._reads, self._key = sums.reads, key
        self._weights = _arrays(sums.parameters.variables)
        self._others = _arrays([*(x for x in nesting.flatten(batch) if x is not None), *variables])

    def kept(self, former):
        """A copy, because tensors of torch can be overwritten. It shares what is the same in `former`."""
        other = copy.copy(self)
        is_shared = former is not None and _are_equal(self._others, former._others)
        other._others = former._others if is_shared else [x.copy() for x in self._others]
        other._weights = [x.copy() for x in self._weights]
        return other

    def with_weights(self, variables):
        """The same state with the current weights."""
        other = copy.copy(self)
        other._weights = [x.copy() for x in _arrays(variables)]
        return other

    def is_same(self, former):
        """Whether the loss has the same value and gradient. All processes that train together get the same answer."""
        same = former is not None and self._reads is former._reads and self._key == former._key
        same = same and _are_equal(self._weights, former._weights) and _are_equal(self._others, former._others)
        (agreeing,), count = backend.summed_over_processes([ops.convert_to_tensor(float(same))], 1)
        return float(agreeing) == count


def loss_state(sums):
    """The `LossState` of a `DataSums` of one batch, at the current weights. None if the loss may change by itself."""
    key = _key(sums)
    if key is None:
        return None
    reads = sums.reads
    if reads.get("key") != key:
        (batch,) = sums.batches
        weights = sums.parameters.variables_as_tensors()
        found = sums.loss.drawing(sums.draws).variables_read(sums.model, weights, *batch)
        if found is not None:
            known = {id(v) for v in sums.parameters.variables}
            found = [v for v in found if id(v) not in known]
        reads |= {"key": key, "variables": found}
    return None if reads["variables"] is None else LossState(sums, key, reads["variables"])


def _key(sums):
    """What decides which program computes the loss. None if there is too much to compare."""
    (batch,) = sums.batches
    outline, leaves = nesting.split(batch)
    try:
        captured = tuple(compiled.captured_by(x) for x in (sums.model, *sums.loss.functions()))
    except TypeError:
        return None
    return captured, outline, [None if x is None else tuple(x.shape) for x in leaves]


def _arrays(values):
    return [ops.convert_to_numpy(ops.convert_to_tensor(x)) for x in values]


def _are_equal(arrays, others):
    same = (a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(arrays, others, strict=False))
    return len(arrays) == len(others) and all(same)
