"""One call of a model, recorded as a function of its inputs, that can be repeated with other inputs."""

from keras import ops

from keras_gradtools import backend, nesting
from keras_gradtools.input_gradients.masks import with_mask_of
from keras_gradtools.keras_state import layer_state, scopes, seeds


class Snapshot:
    """The state that a call of `layer` depends on besides its inputs and weights: seeds, statistics, random generators.

    `replayed` restores it for one function: dropout draws the same mask, for example.
    """

    def __init__(self, layer):
        variables = [*layer_state.state_variables(layer), *seeds.global_seeds()]
        self._mapping = [(v, ops.copy(v)) for v in variables]
        self._random = backend.random_state()

    def replayed(self, fun):
        """The result of `fun()` in the saved state. Assignments in `fun` are dropped."""
        scope, random_state = scopes.StateScope(self._mapping), backend.with_random_state(self._random)
        with scope, scope, random_state, random_state:
            return fun()


class RecordedCall:
    """The call `fun(inputs)`, recorded as a function of some of the inputs.

    Args:
        fun: The function to call. It can be called again only with a `snapshot`.
        inputs: Tensors in any nested structure.
        chosen: The positions, among the flattened inputs, of those to differentiate with respect to.
        snapshot: A `Snapshot` from before the call.
        keeps_state: Whether assignments in the call (statistics, seeds) and the losses that it adds are kept.

    Attributes:
        sources: The chosen inputs, as the tape watches them.
        outputs: The result of `fun`.
        tape: The backend's tape.
    """

    def __init__(self, fun, inputs, chosen, snapshot=None, keeps_state=True):
        self._fun, self._snapshot = fun, snapshot
        self._inputs, self._chosen = inputs, chosen
        flat = nesting.flatten(inputs)
        # Aliases, so that the same tensor passed as two inputs counts as two inputs.
        self.sources = [backend.alias(flat[i]) for i in chosen]
        self.tape = backend.Tape(watch_accessed_variables=False)
        with self.tape, self.tape:
            for x in self.sources:
                self.tape.watch(x)
            self.outputs = fun(self._with(self.sources)) if keeps_state else self.again(self.sources)

    def recorded(self, fun):
        """The result of `fun()`, recorded on the tape of the call."""
        with self.tape, self.tape:
            return fun()

    @property
    def batch_size(self):
        return ops.shape(self.sources[0])[0]

    def vjp(self, targets, cotangents):
        """The vjp of `targets` for each of the sources, or None for unconnected ones."""
        return backend.pullback(self.tape, targets, self.sources, cotangents)

    def constant_vjp(self, targets, cotangents):
        """`vjp` with a constant result, which cannot be differentiated again."""
        return backend.constant_pullback(self.tape, targets, self.sources, cotangents)

    def vjp_batch(self, targets, cotangents):
        """`vjp` for a stack of cotangents along axis 0."""
        return backend.pullback_batch(self.tape, targets, self.sources, cotangents)

    def again(self, sources):
        """The outputs for other values of the sources, with everything else as before the call."""
        return self._snapshot.replayed(lambda: self._fun(self._with(sources)))

    def recorded_again(self):
        """The same call, repeated and recorded again."""
        return RecordedCall(self._fun, self._inputs, self._chosen, self._snapshot, keeps_state=False)

    def _with(self, sources):
        flat = nesting.flatten(self._inputs)
        for i, x in zip(self._chosen, sources, strict=True):
            flat[i] = with_mask_of(x, flat[i])
        return nesting.pack_as(self._inputs, flat)
