"""Handles Keras variables as the state of a computation: which it reads, which it assigns, and which are seeds.

Transforms and compiled functions must see the variables that a function reads and assigns, and some must discard the
assignments. This file contains the scopes for that, and everything about Keras' stateless scopes, seeds, frozen
statistics and regularization losses.
"""

import random
import threading

import keras
import numpy as np
from keras import ops

from keras_gradtools import backend, validation
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
    """A block that records which variables are read and assigned, and after which the assignments are undone.

    In the block, a variable has the value that was assigned in the block, or else its value in `state_mapping`, or else
    its value outside. Keras' `StatelessScope` has no value for a variable that is not in its mapping, which breaks
    regularizers, and it hides an enclosing scope.
    """

    def __init__(self, state_mapping=()):
        # With `initialize_variables`, Keras would initialize new variables inside a surrounding trace, as tracers.
        super().__init__(list(state_mapping), collect_losses=True, initialize_variables=False)
        self._outside = get_stateless_scope()
        self._read = {}
        self._assigned = {}

    # Like a `Block`, and unlike Keras' scope: it may be left twice, and also after the scope around it was left.

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
            # Created in the block and initialized after it. Until then Keras uses such a placeholder, too.
            value = variable._initializer(variable.shape, dtype=variable.dtype)
        return value


def is_overridden():
    """Whether an enclosing scope gives some variable another value than its own."""
    scope = get_stateless_scope()
    while scope is not None:
        if scope.state_mapping:
            return True
        scope = getattr(scope, "_outside", None)
    return False


def ambient():
    """The global state that Keras' layers read, as a key: precision, the enclosing call's `training`, the seed."""
    autocast = get_autocast_scope()
    return (
        keras.config.floatx(),
        autocast and autocast.dtype,
        training_mode(),
        global_state.get_global_attribute("global_random_seed"),
        id(global_state.get_global_attribute("global_seed_generator")),
    )


def layers_of(layer):
    """`layer` and all layers in it. Empty if `layer` is not a Keras layer but a function."""
    return layer._flatten_layers() if isinstance(layer, Layer) else []


def state_variables(layer):
    """The variables of `layer` that are not weights, whether weights are frozen or not.

    These are the statistics of normalization layers, the states of seeds, and counters.
    """
    layers = layers_of(layer)
    weights = {id(v) for part in layers for v in part._trainable_variables}
    return [v for v in layer.variables if id(v) not in weights] if layers else []


def global_seeds():
    """A list with the state of Keras' global seed generator. Empty where Keras has none and cannot create one."""
    if not backend.can_make_variables() and global_state.get_global_attribute("global_seed_generator") is None:
        # Keras has one for each thread, and replicas of `tf.distribute` are threads that cannot create variables.
        return []
    before = random.getstate()
    try:
        with backend.eagerly(), outside_scopes():
            return [global_seed_generator().state]
    except ValueError:
        # Inside a JAX trace, Keras refuses to draw without a seed.
        return []
    finally:
        # A new generator takes its first state from Python's `random`, which must not change.
        random.setstate(before)


def seed_states(layer):
    """The states of the seed generators of `layer` and of all layers in it."""
    return [generator.state for part in layers_of(layer) for generator in part._seed_generators]


def has_seeds(layer):
    """Whether `layer` itself has seed generators. Those of layers in it do not count."""
    return bool(layer._seed_generators)


def is_seed(variable):
    """Whether a variable is the state of a seed generator."""
    return variable.path.split("/")[-1] == "seed_generator_state"


def next_global_seed():
    """The state that Keras' global seed generator has, or would start from, as a NumPy array. It is not changed."""
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
    """A seed generator of our own that can replace Keras' global one. Every call returns the same one."""
    if not _spare:
        with backend.eagerly(), outside_scopes():
            _spare.append(keras.random.SeedGenerator(0, name="spare_seed_generator"))
    return _spare[0]


class global_seed_generator_is(Block):  # noqa: N801 - said of a block
    """A block in which `generator` is Keras' global seed generator on this thread."""

    def __init__(self, generator):
        self._generator = generator
        self._before = global_state.get_global_attribute("global_seed_generator")

    def begin(self):
        global_state.set_global_attribute("global_seed_generator", self._generator)

    def end(self):
        global_state.set_global_attribute("global_seed_generator", self._before)


class _Thread(threading.local):
    # The ids of the layers whose statistics `frozen_statistics` freezes.
    frozen: frozenset = frozenset()


_thread = _Thread()


class frozen_statistics(Block):  # noqa: N801 - said of a block
    """A block in which BatchNormalization uses its moving statistics even in training mode, on this thread."""

    def __init__(self, layer):
        parts = [part for part in layers_of(layer) if isinstance(part, keras.layers.BatchNormalization)]
        self._frozen, self._before = _thread.frozen | {id(part) for part in parts}, _thread.frozen

    def begin(self):
        _thread.frozen = self._frozen

    def end(self):
        _thread.frozen = self._before


def _is_trainable(self):
    # The layer reads this property to see whether it is frozen. Its own flag would change for all threads.
    return id(self) not in _thread.frozen and keras.Layer.trainable.fget(self)


keras.layers.BatchNormalization.trainable = property(_is_trainable, keras.Layer.trainable.fset)


class undone_by_errors(Block):  # noqa: N801 - said of a block
    """A block that resets `variables` to their former values if it raises. It always resets the framework's modes.

    Code that assigns variables, such as torch's optimizers, also changes modes, and may be interrupted before it has
    changed them back.
    """

    def __init__(self, variables):
        self._variables, self._modes = variables, backend.modes_kept()
        self._before: list = []

    def begin(self):
        self._modes.__enter__()
        if not in_scope():
            # In a stateless scope, assignments are not permanent.
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
    """A block that ignores all enclosing stateless scopes: variables are created and assigned permanently."""

    def __init__(self):
        self._scope = get_stateless_scope()

    def begin(self):
        global_state.set_global_attribute("stateless_scope", None)

    def end(self):
        global_state.set_global_attribute("stateless_scope", self._scope)


def in_scope():
    """Whether a stateless scope is active, so that assignments are not permanent."""
    return get_stateless_scope() is not None


def regularization_losses(layer):
    """The list of the regularization losses of `layer` and of all layers in it."""
    return layer._get_regularization_losses()


def is_assigned_in_scope(variable):
    """Whether `variable` was assigned inside the innermost scope, and that is a `StateScope`."""
    scope = get_stateless_scope()
    return isinstance(scope, StateScope) and id(variable) in scope._assigned


def _clear_losses_of(clear_all):
    def _clear_losses(self):
        """As in Keras, but inside a `StateScope` it clears only losses that were added in this scope."""
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
        """As in Keras, but inside a `StateScope` it reads each variable in a way that tapes see."""
        if not isinstance(get_stateless_scope(), StateScope):
            return all_losses(self)
        return [v.regularizer(v) for v in self.trainable_weights if v.regularizer is not None]

    return _get_regularization_losses


clear_losses.replace(_clear_losses_of)
all_regularization_losses.replace(_regularization_losses_of)

if keras.backend.backend() == "jax":
    # Installed on import, before any training step: models trained by Keras itself may contain our layers.
    from keras_gradtools.backend.jax import training

    training.install()


def read(x):
    """The current value of a variable, which a stateless scope may override. Anything else unchanged."""
    return ops.convert_to_tensor(x.value) if validation.is_variable(x) else x
