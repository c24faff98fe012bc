"""The interface to TensorFlow, JAX and torch: this folder is the only one that imports a framework.

`base.Backend` lists and describes the kernels. Each framework has a folder whose `backend.py` holds a subclass, and the
other files what that needs. `keras_gradtools.backend.pullback` and so on are the kernels of the current backend.
"""

import importlib
import sys

import keras

from keras_gradtools import nesting
from keras_gradtools.keras_state import framework

_CLASSES = {"tensorflow": "TensorFlowBackend", "jax": "JaxBackend", "torch": "TorchBackend"}


def _load():
    name = keras.backend.backend()
    if name not in _CLASSES:
        raise RuntimeError(
            "keras_gradtools needs a Keras backend that can differentiate: 'tensorflow', 'jax' or 'torch'. "
            f"Received: the backend {name!r}, which has no gradients. Set the environment variable "
            "KERAS_BACKEND to one of the three before Keras is imported."
        )
    module = importlib.import_module(f"keras_gradtools.backend.{name}.backend")
    return getattr(module, _CLASSES[name])()


def name():
    """The name of the backend, for messages only. No code may branch on it."""
    return keras.backend.backend()


def __getattr__(kernel):
    # Loaded at the first use of a kernel, so that the package can be imported under every Keras backend.
    if kernel.startswith("__"):
        raise AttributeError(kernel)
    # Kept in the module, where the next use finds it without a call of this function.
    found = globals()[kernel] = getattr(_load(), kernel)
    return found


# The folders below import no adapter, and get what they need of it here.
nesting.use_registry(lambda: __getattr__("containers")())
framework.use(sys.modules[__name__])

if keras.backend.backend() == "jax":
    # On import, before any training step: models trained by Keras itself may contain our layers.
    from keras_gradtools.backend.jax import training

    training.install()
