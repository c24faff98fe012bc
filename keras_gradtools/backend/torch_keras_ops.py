"""Keras operations that `torch.vmap` cannot carry out as Keras writes them."""

import functools

from keras.src.backend.torch import nn as keras_nn


def install():
    # Not in every supported Keras.
    if hasattr(keras_nn, "_maybe_convert_to_channels_last"):
        keras_nn._maybe_convert_to_channels_last = _where_it_can(keras_nn._maybe_convert_to_channels_last)


def _where_it_can(convert):
    @functools.wraps(convert)
    def call(tensor):
        try:
            return convert(tensor)
        except RuntimeError:
            # The layout in memory changes the speed and no value, and `vmap` knows none.
            return tensor

    return call
