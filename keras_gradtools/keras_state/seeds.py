"""Keras' seed generators: the global one, and those of layers."""

import random

import keras
import numpy as np
from keras import ops

from keras_gradtools.blocks import Block
from keras_gradtools.keras_internals.scopes import global_seed_generator, global_state, make_default_seed
from keras_gradtools.keras_state import framework
from keras_gradtools.keras_state.layer_state import layers_of
from keras_gradtools.keras_state.scopes import outside_scopes


def global_seeds():
    """A list with the state of Keras' global seed generator. Empty where Keras has none and cannot create one."""
    if not framework.can_make_variables() and global_state.get_global_attribute("global_seed_generator") is None:
        # Keras has one for each thread, and replicas of `tf.distribute` are threads that cannot create variables.
        return []
    before = random.getstate()
    try:
        with framework.eagerly(), outside_scopes():
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
        with framework.eagerly(), outside_scopes():
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
