"""Keras operations that `torch.vmap` cannot carry out as Keras writes them."""

import functools

from keras_gradtools.keras_internals import backend_modules


def install():
    # Not in every supported Keras.
    convert = backend_modules.hooks["nn"].get("_maybe_convert_to_channels_last")
    if convert is not None:
        convert.replace(_where_it_can)


def _where_it_can(convert):
    @functools.wraps(convert)
    def call(tensor):
        try:
            return convert(tensor)
        except RuntimeError:
            # The layout in memory changes the speed and no value, and `vmap` knows none.
            return tensor

    return call
