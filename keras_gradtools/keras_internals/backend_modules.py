"""The modules that Keras' operations call on the current backend."""

import keras

from keras_gradtools.keras_internals import patches
from keras_gradtools.keras_internals.lookup import find


def module(name):
    """Keras' module `core`, `nn`, `numpy` or `rnn` of the current backend."""
    home = f"keras.src.backend.{keras.config.backend()}"
    # From Keras 3.16 on, all but `rnn` are in a folder of their own.
    return find(f"{home}.ops.{name}", f"{home}.{name}")


def function(where, name):
    """The function `name` of one of these modules."""
    return find(f"{module(where).__name__}:{name}")


def replace(where, name, make, user):
    """Puts `make(original)` in the place of a function of the module `where`, which `user` must look up there.

    `user` is a function of Keras, or the name of one of the same module.
    """
    owner = module(where)
    patches.replace(owner, name, make, [function(where, user) if isinstance(user, str) else user])
