"""The state of layers besides their weights: statistics, frozen or not, masks, regularization losses, the context."""

import threading

import keras

from keras_gradtools.blocks import Block
from keras_gradtools.keras_internals.attributes import DTYPE_POLICY, TRAINABLE
from keras_gradtools.keras_internals.dtypes import results_of_doubles
from keras_gradtools.keras_internals.layers import Layer, get_keras_mask, set_keras_mask
from keras_gradtools.keras_internals.scopes import global_state, training_mode
from keras_gradtools.keras_internals.variables import get_autocast_scope

__all__ = [
    "DTYPE_POLICY",
    "TRAINABLE",
    "ambient",
    "frozen_statistics",
    "get_keras_mask",
    "has_keras_mask",
    "layers_of",
    "regularization_losses",
    "set_keras_mask",
    "state_variables",
    "with_keras_mask_of",
]


def ambient():
    """The global state that Keras' layers and operations read, as a key.

    This is the precision, the order of the axes of images, the small number that losses add, the enclosing call's
    `training`, and the seed.
    """
    autocast = get_autocast_scope()
    return (
        keras.config.floatx(),
        keras.config.image_data_format(),
        keras.config.epsilon(),
        tuple(results_of_doubles().values()),
        autocast and autocast.dtype,
        training_mode(),
        global_state.get_global_attribute("global_random_seed"),
        id(global_state.get_global_attribute("global_seed_generator")),
    )


def has_keras_mask(x):
    """Whether Keras has set a mask on `x`, which the next layer reads."""
    return get_keras_mask(x) is not None


def with_keras_mask_of(x, original):
    """`x` with the mask of `original`, if that has one. Another tensor in its place would lose it."""
    mask = get_keras_mask(original)
    if mask is not None:
        set_keras_mask(x, mask)
    return x


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


def regularization_losses(layer):
    """The list of the regularization losses of `layer` and of all layers in it."""
    return layer._get_regularization_losses()


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
