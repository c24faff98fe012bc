"""Keras variables as the state of a computation: what it reads, and what it assigns."""

import random
import threading

import keras
import numpy as np
from keras import ops

from keras_gradtools import backend
from keras_gradtools.backend.blocks import Block
from keras_gradtools.keras_internals.layers import Layer, clear_losses, get_keras_mask, set_keras_mask
from keras_gradtools.keras_internals.layers import regularization_losses as all_regularization_losses
from keras_gradtools.keras_internals.scopes import (
    StatelessScope,
    get_stateless_scope,
    global_seed_generator,
    global_state,
    make_default_seed,
    training_mode,
)
from keras_gradtools.keras_internals.variables import get_autocast_scope, initialize_all_variables

__all__ = [
    "StateScope",
    "ambient",
    "frozen_statistics",
    "get_keras_mask",
    "global_seed_generator_is",
    "global_seeds",
    "has_seeds",
    "in_scope",
    "is_assigned_in_scope",
    "is_overridden",
    "is_seed",
    "layers_of",
    "next_global_seed",
    "outside_scopes",
    "regularization_losses",
    "seed_states",
    "set_keras_mask",
    "spare_seed_generator",
    "state_variables",
    "undone_by_errors",
]


class StateScope(StatelessScope):
    """A block in which assignments to variables are seen, and after which they are gone.

    Inside, a variable has the value that was assigned to it in the block, else the one that `state_mapping`
    gives it, else the one that it has outside. Keras' own scope knows no outside: it has no value for a
    variable that it was not given, which breaks regularizers, and it hides an enclosing scope.
    """

    def __init__(self, state_mapping=()):
        # Keras would initialize what was made in the block inside whatever trace surrounds it.
        super().__init__(list(state_mapping), collect_losses=True, initialize_variables=False)
        self._outside = get_stateless_scope()
        self._read = {}
        self._assigned = {}

    # As a `Block`, which Keras' own is not: it may be left twice, and late, after the one around it.

    _is_open = False

    def __enter__(self):
        if self._is_open:
            return self
        try:
            self._is_open = True
            return super().__enter__()
        except BaseException:
            global_state.set_global_attribute("stateless_scope", self._outside)
            self._is_open = False
            raise

    def __exit__(self, *exception):
        if not self._is_open or not self._is_around():
            return
        try:
            super().__exit__(*exception)
            if self._outside is None:
                with backend.eagerly():
                    initialize_all_variables()
        except BaseException:
            global_state.set_global_attribute("stateless_scope", self._outside)
            raise
        finally:
            self._is_open = False

    def _is_around(self):
        scope = get_stateless_scope()
        while scope is not None and scope is not self:
            scope = getattr(scope, "original_scope", None)
        return scope is self

    @property
    def variables_read(self):
        return list(self._read.values())

    @property
    def variables_assigned(self):
        return list(self._assigned.values())

    def add_update(self, update):
        variable, _ = update
        self._assigned[id(variable)] = variable
        super().add_update(update)

    def get_current_value(self, variable):
        self._read.setdefault(id(variable), variable)
        value = super().get_current_value(variable)
        if value is None and self._outside is not None:
            value = self._outside.get_current_value(variable)
        if value is None:
            value = variable._value
        if value is None:
            # Made inside the block, and initialized after it; until then Keras, too, uses a placeholder.
            value = variable._initializer(variable.shape, dtype=variable.dtype)
        return value


def is_overridden():
    """Whether some variable stands for another value here than for its own."""
    scope = get_stateless_scope()
    while scope is not None:
        if scope.state_mapping:
            return True
        scope = getattr(scope, "_outside", None)
    return False


def ambient():
    """What Keras' layers go by besides their arguments, as a key: precision, the mode of the call around, the seed."""
    autocast = get_autocast_scope()
    return (
        keras.config.floatx(),
        autocast and autocast.dtype,
        training_mode(),
        global_state.get_global_attribute("global_random_seed"),
        id(global_state.get_global_attribute("global_seed_generator")),
    )


def layers_of(layer):
    """`layer` and all layers in it; none of what is only a function."""
    return layer._flatten_layers() if isinstance(layer, Layer) else []


def state_variables(layer):
    """The variables that a call of `layer` reads and assigns besides its weights, frozen or not.

    They are the statistics of normalization layers, the states of seeds, and counters.
    """
    layers = layers_of(layer)
    weights = {id(v) for part in layers for v in part._trainable_variables}
    return [v for v in layer.variables if id(v) not in weights] if layers else []


def global_seeds():
    """The state of Keras' generator of seeds where none is given, in a list; empty where Keras gives none."""
    if not backend.can_make_variables() and global_state.get_global_attribute("global_seed_generator") is None:
        # Keras keeps it for each thread, and replicas are threads: there, it cannot draw without a seed.
        return []
    before = random.getstate()
    try:
        with backend.eagerly(), outside_scopes():
            return [global_seed_generator().state]
    except ValueError:
        # Inside a trace of JAX, Keras refuses to draw without a seed.
        return []
    finally:
        # Made here, it takes its first state from Python's generator.
        random.setstate(before)


def seed_states(layer):
    """The states of the seeds that belong to `layer` and to all layers in it."""
    return [generator.state for part in layers_of(layer) for generator in part._seed_generators]


def has_seeds(layer):
    """Whether there are seeds that belong to `layer` itself."""
    return bool(layer._seed_generators)


def is_seed(variable):
    """Whether a variable is the state of a seed."""
    return variable.path.split("/")[-1] == "seed_generator_state"


def next_global_seed():
    """What Keras' global generator of seeds draws from next, in NumPy; it is neither made nor changed."""
    generator = global_state.get_global_attribute("global_seed_generator")
    if generator is not None:
        return np.array(ops.convert_to_numpy(generator.state))
    before = random.getstate()
    try:
        return np.array([make_default_seed(), 0], spare_seed_generator().state.dtype)
    finally:
        random.setstate(before)


_spare: list = []


def spare_seed_generator():
    """A generator of seeds that belongs to nobody, to stand in for Keras' global one: the same one at each call."""
    if not _spare:
        with backend.eagerly(), outside_scopes():
            _spare.append(keras.random.SeedGenerator(0, name="spare_seed_generator"))
    return _spare[0]


class global_seed_generator_is(Block):  # noqa: N801 - said of a block
    """A block in which whoever draws without a seed draws from `generator`, in this thread."""

    def __init__(self, generator):
        self._generator = generator
        self._before = global_state.get_global_attribute("global_seed_generator")

    def begin(self):
        global_state.set_global_attribute("global_seed_generator", self._generator)

    def end(self):
        global_state.set_global_attribute("global_seed_generator", self._before)


class _Thread(threading.local):
    # By `id`, the layers that `frozen_statistics` holds for frozen.
    frozen: frozenset = frozenset()


_thread = _Thread()


class frozen_statistics(Block):  # noqa: N801 - said of a block
    """A block in which, on this thread, BatchNormalization goes by its moving statistics in training mode, too."""

    def __init__(self, layer):
        parts = [part for part in layers_of(layer) if isinstance(part, keras.layers.BatchNormalization)]
        self._frozen, self._before = _thread.frozen | {id(part) for part in parts}, _thread.frozen

    def begin(self):
        _thread.frozen = self._frozen

    def end(self):
        _thread.frozen = self._before


def _is_trainable(self):
    # What the layer itself asks to know whether it was frozen. Its own flag is that of all threads.
    return id(self) not in _thread.frozen and keras.Layer.trainable.fget(self)


keras.layers.BatchNormalization.trainable = property(_is_trainable, keras.Layer.trainable.fset)


class undone_by_errors(Block):  # noqa: N801 - said of a block
    """A block that, if it raises, leaves `variables` as they were before it, and the framework's modes in any case.

    What assigns variables, torch's optimizers for example, changes modes as well, and may be interrupted in between.
    """

    def __init__(self, variables):
        self._variables, self._modes = variables, backend.modes_kept()
        self._before: list = []

    def begin(self):
        self._modes.__enter__()
        if not in_scope():
            # Elsewhere nothing is assigned for good.
            self._before = [(v, ops.copy(v)) for v in self._variables]

    def end(self):
        self._modes.__exit__()

    def __exit__(self, kind=None, *error):
        try:
            if kind is not None and self._is_open:
                for v, value in self._before:
                    v.assign(value)
        finally:
            super().__exit__(kind, *error)


class outside_scopes(Block):  # noqa: N801 - said of a block
    """A block in which variables are made and assigned for good, whatever scope is around it."""

    def __init__(self):
        self._scope = get_stateless_scope()

    def begin(self):
        global_state.set_global_attribute("stateless_scope", None)

    def end(self):
        global_state.set_global_attribute("stateless_scope", self._scope)


def in_scope():
    """Whether what is assigned here will be dropped, or taken over by whoever opened the scope."""
    return get_stateless_scope() is not None


def regularization_losses(layer):
    """What the regularizers of the weights of `layer`, and of all layers in it, add to the loss."""
    return layer._get_regularization_losses()


def is_assigned_in_scope(variable):
    """Whether the value that `variable` has here was assigned to it inside the scope around."""
    scope = get_stateless_scope()
    return isinstance(scope, StateScope) and id(variable) in scope._assigned


def _clear_losses_of(clear_all):
    def _clear_losses(self):
        """As Keras does it; but the losses of a call outside the scope are not those of the calls in it."""
        scope = get_stateless_scope()
        if not isinstance(scope, StateScope):
            return clear_all(self)
        scope.losses[:] = [x for x in scope.losses if id(x) not in self._loss_ids]
        self._loss_ids.clear()
        for layer in self._layers:
            layer._clear_losses()

    return _clear_losses


def _regularization_losses_of(all_losses):
    def _get_regularization_losses(self):
        """As Keras does it; but the variable is read in the way that tapes see."""
        if not isinstance(get_stateless_scope(), StateScope):
            return all_losses(self)
        return [v.regularizer(v) for v in self.trainable_weights if v.regularizer is not None]

    return _get_regularization_losses


clear_losses.replace(_clear_losses_of)
all_regularization_losses.replace(_regularization_losses_of)

if keras.backend.backend() == "jax":
    # Before any step, whoever's: ours are parts of models that Keras itself trains.
    from keras_gradtools.backend import jax_training

    jax_training.install()
