"""One call of a model, recorded as a function of its inputs, that can be made again with other inputs."""

from keras import ops

from keras_gradtools import backend, nesting
from keras_gradtools.backend import state
from keras_gradtools.regularization.masks import with_mask_of


class Snapshot:
    """What the next call of `layer` goes by besides its inputs and weights: seeds, statistics, random generators.

    In what is `replayed` it is so again: dropout draws the same mask. What is assigned there is dropped.
    """

    def __init__(self, layer):
        variables = [*state.state_variables(layer), *state.global_seeds()]
        self._mapping = [(v, ops.copy(v)) for v in variables]
        self._random = backend.random_state()

    def replayed(self, fun):
        """What `fun()` returns when it is so again."""
        scope, random_state = state.StateScope(self._mapping), backend.with_random_state(self._random)
        with scope, scope, random_state, random_state:
            return fun()


class RecordedCall:
    """The call `fun(inputs)`, as a function of the inputs at the positions `chosen` among all, flat.

    Args:
        fun: what is called; with `snapshot`, it can be called again.
        inputs: tensors in any nesting.
        chosen: the positions of those to differentiate by.
        snapshot: a `Snapshot` from before the call.
        keeps_state: whether what the call assigns (statistics, seeds) stays, and the losses that it adds.

    Attributes:
        sources: the chosen inputs, as the record knows them.
        outputs: what `fun` returned.
        record: the backend's tape.
    """

    def __init__(self, fun, inputs, chosen, snapshot=None, keeps_state=True):
        self._fun, self._snapshot = fun, snapshot
        self._inputs, self._chosen = inputs, chosen
        flat = nesting.flatten(inputs)
        # The same tensor given as two inputs is two inputs.
        self.sources = [backend.alias(flat[i]) for i in chosen]
        self.record = backend.Tape(watch_accessed_variables=False)
        with self.record, self.record:
            for x in self.sources:
                self.record.watch(x)
            self.outputs = fun(self._with(self.sources)) if keeps_state else self.again(self.sources)

    def recorded(self, fun):
        """What `fun()` returns, recorded with the call."""
        with self.record, self.record:
            return fun()

    @property
    def batch_size(self):
        return ops.shape(self.sources[0])[0]

    def pull(self, targets, cotangents):
        """The gradient by each of the sources, None where nothing is connected."""
        return backend.pullback(self.record, targets, self.sources, cotangents)

    def pull_constant(self, targets, cotangents):
        """The same, held constant: no second derivative will pass through it."""
        return backend.constant_pullback(self.record, targets, self.sources, cotangents)

    def pull_batch(self, targets, cotangents):
        """The same for a stack of cotangents on axis 0."""
        return backend.pullback_batch(self.record, targets, self.sources, cotangents)

    def again(self, sources):
        """The outputs for other values of the sources, everything else being as it was before the call."""
        return self._snapshot.replayed(lambda: self._fun(self._with(sources)))

    def recorded_again(self):
        """The same call, made and recorded once more."""
        return RecordedCall(self._fun, self._inputs, self._chosen, self._snapshot, keeps_state=False)

    def _with(self, sources):
        flat = nesting.flatten(self._inputs)
        for i, x in zip(self._chosen, sources, strict=True):
            flat[i] = with_mask_of(x, flat[i])
        return nesting.pack_as(self._inputs, flat)
