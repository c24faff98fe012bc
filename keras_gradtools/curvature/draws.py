"""What a model draws random numbers from, as it was at one moment, lent to every later call of the model."""

import copy

import numpy as np
from keras import ops

from keras_gradtools import backend
from keras_gradtools.backend import state
from keras_gradtools.backend.blocks import Block
from keras_gradtools.transforms.closures import Identity


class Draws:
    """The states of the seeds that a model draws from, of Keras' global one, and of the framework's own generators.

    In a block of `lent`, whoever draws begins from these, and the user's own generators are left as they are. The
    states are variables, whose `values` are inputs of a program: one program serves all masks. Of a seed that no layer
    has, nothing is known before a call has drawn from it: see `with_variables`.

    Attributes:
        key: equal for two of them that have the same variables.
        values: the states, in tensors.
    """

    def __init__(self, model, more=()):
        self._more = list(more)
        # Keras' global generator is stood in for by one of ours, so that it is neither made here nor moved on.
        self._global = state.spare_seed_generator()
        own = [*state.seed_states(model), *self._more]
        self._variables = [*own, self._global.state]
        self.values = [*map(_copy, own), _tensor(state.next_global_seed())]
        self._random = backend.random_state()
        self.key = tuple(map(Identity, self._variables))

    def anew(self, model):
        """The same for `model` as it is now."""
        return Draws(model, self._more)

    def with_variables(self, variables):
        """The same with more seeds, which the model was seen to draw from; itself, if it has them."""
        known = {id(v) for v in self._variables}
        new = [v for v in variables if id(v) not in known and state.is_seed(v)]
        if not new:
            return self
        more = copy.copy(self)
        more._more = [*self._more, *new]
        more._variables = [*new, *self._variables]
        more.values = [*map(_copy, new), *self.values]
        more.key = tuple(map(Identity, more._variables))
        return more

    def with_values(self, values):
        """The same with these values, which may be tensors of a program."""
        given = copy.copy(self)
        given.values = values
        return given

    def lent(self, mapping=()):
        """A block that draws from these, and in which variables have the values of `mapping`; its `scope` is known."""
        return _Lent(self, mapping)


class _Lent(Block):
    def __init__(self, draws, mapping):
        self.scope = state.StateScope([*mapping, *zip(draws._variables, draws.values, strict=True)])
        self._blocks = (
            self.scope,
            state.global_seed_generator_is(draws._global),
            backend.with_random_state(draws._random),
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
    # Made once, as a program takes a tensor sooner than an array.
    with backend.eagerly():
        return ops.convert_to_tensor(array)
