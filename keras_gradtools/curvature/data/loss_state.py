"""Everything that the loss of one batch depends on, so that a gradient is known to be still valid."""

import copy

import numpy as np
from keras import ops

from keras_gradtools import backend, nesting
from keras_gradtools.keras_state.layer_state import has_keras_mask
from keras_gradtools.transforms import compiled
from keras_gradtools.transforms.guards import Guards


class LossState:
    """The weights, the batch, other variables that the loss reads, and the captured values of its functions."""

    def __init__(self, sums, key, variables):
        (batch,) = sums.batches
        # Another operator may have another loss.
        self._reads, self._key = sums.reads, key
        self._weights = [backend.held(v) for v in sums.parameters.variables]
        self._others = _tensors([*(x for x in nesting.flatten(batch) if x is not None), *variables])

    def kept(self, former):
        """A copy without the weights, if tensors can be overwritten. It shares what is the same in `former`."""
        if backend.HAS_IMMUTABLE_TENSORS:
            return self
        other = copy.copy(self)
        is_shared = former is not None and _are_equal(self._others, former._others)
        other._others = former._others if is_shared else _copies(self._others)
        return other

    def with_weights(self, variables):
        """The same state with the current weights."""
        other = copy.copy(self)
        other._weights = [backend.held(v) for v in variables]
        return other

    def is_same(self, former):
        """Whether the loss has the same value and gradient. All processes that train together get the same answer."""
        same = former is not None and self._reads is former._reads and self._key == former._key
        same = same and _are_equal(self._weights, former._weights) and _are_equal(self._others, former._others)
        return backend.is_true_in_all_processes(same)


def loss_state(sums):
    """The `LossState` of a `DataSums` of one batch, at the current weights. None if the loss may change by itself."""
    key = program_key(sums)
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


def program_key(sums):
    """What decides which program computes the loss. None if there is too much to compare."""
    captured = _captured(sums)
    if captured is None:
        return None
    (batch,) = sums.batches
    outline, leaves = nesting.split(batch)
    if any(map(has_keras_mask, leaves)):
        # A program does not see the mask of its arguments.
        return None
    return captured, outline, [None if x is None else (tuple(x.shape), x.dtype) for x in leaves]


def _captured(sums):
    """What the model and the functions of the loss have captured. It is quickly known if nothing has changed."""
    known = sums.reads.get("captured")
    if known is not None and known[0].hold():
        return known[1]
    guards = Guards()
    try:
        found = tuple(compiled.captured_by(x, guards) for x in (sums.model, *sums.loss.functions()))
    except TypeError:
        return None
    sums.reads["captured"] = guards, found
    return found


def _tensors(values):
    return [ops.convert_to_tensor(x) for x in values]


def _copies(values):
    return [np.array(x) for x in map(ops.convert_to_numpy, values)]


def _are_equal(values, others):
    return len(values) == len(others) and all(map(_is_equal, values, others))


def _is_equal(a, b):
    if not backend.has_values(b):
        return False
    if a is b and backend.HAS_IMMUTABLE_TENSORS:
        return True
    a, b = ops.convert_to_numpy(a), ops.convert_to_numpy(b)
    return a.dtype == b.dtype and np.array_equal(a, b)
