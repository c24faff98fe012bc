"""The states of random number generators at one moment, restored for every later call of a model."""

import copy

import numpy as np
from keras import ops

from keras_gradtools import backend
from keras_gradtools.blocks import Block
from keras_gradtools.keras_state import scopes, seeds
from keras_gradtools.transforms.closures import Identity


class Draws:
    """The states of the seeds of a model, of Keras' global seed, and of the framework's own generators.

    In a `lent` block, all random numbers start from these states, and the user's generators do not change. The states
    are variables whose `values` are inputs of a program, so that one program can be used with any dropout mask. A seed
    that belongs to no layer is unknown until a call has used it: see `with_variables`.

    Attributes:
        key: Equal for two instances that have the same variables.
        values: The states of these variables and of the framework's generators, as tensors.
    """

    def __init__(self, model, more=()):
        self._more = list(more)
        # A spare generator replaces Keras' global one, so that the global one is neither created nor advanced here.
        self._global = seeds.spare_seed_generator()
        own = [*seeds.seed_states(model), *self._more]
        self._variables = [*own, self._global.state]
        # The framework's own generators are not variables. Their states come last.
        random_state = backend.random_state() or ()
        self.values = [*map(_copy, own), _tensor(seeds.next_global_seed()), *random_state]
        self.key = tuple(map(Identity, self._variables))

    def anew(self, model):
        """New `Draws` with the current states of the seeds of `model`."""
        return Draws(model, self._more)

    def with_variables(self, variables):
        """Adds the seeds among `variables`, which a call of the model has used. Returns `self` if none is new."""
        known = {id(v) for v in self._variables}
        new = [v for v in variables if id(v) not in known and seeds.is_seed(v)]
        if not new:
            return self
        more = copy.copy(self)
        more._more = [*self._more, *new]
        more._variables = [*new, *self._variables]
        more.values = [*map(_copy, new), *self.values]
        more.key = tuple(map(Identity, more._variables))
        return more

    def with_values(self, values):
        """The same variables with these values, which may be tensors inside a program."""
        given = copy.copy(self)
        given.values = values
        return given

    def have_drawn(self, scope):
        """Inside a `lent` block with this scope: whether any generator that is no variable of the model has drawn."""
        states = self.values[len(self._variables) :]
        current = backend.random_state() or ()
        is_global = any(v is self._global.state for v in scope.variables_read)
        return is_global or not all(bool(ops.all(ops.equal(a, b))) for a, b in zip(states, current, strict=True))

    def lent(self, mapping=()):
        """A block in which random numbers start from these states, and variables have the values in `mapping`.

        Its attribute `scope` is the `StateScope`, which knows the variables that were assigned in the block.
        """
        return _Lent(self, mapping)


class _Lent(Block):
    def __init__(self, draws, mapping):
        count = len(draws._variables)
        self.scope = scopes.StateScope([*mapping, *zip(draws._variables, draws.values[:count], strict=True)])
        self._blocks = (
            self.scope,
            seeds.global_seed_generator_is(draws._global),
            backend.with_random_state(tuple(draws.values[count:])),
        )

    def begin(self):
        for block in self._blocks:
            block.__enter__()

    def end(self):
        for block in reversed(self._blocks):
            block.__exit__(None, None, None)


def _copy(variable):
    return _tensor(np.array(ops.convert_to_numpy(variable)))


def _tensor(array):
    # Converted once, since passing a tensor to a program is faster than passing an array.
    with backend.eagerly():
        return ops.convert_to_tensor(array)
