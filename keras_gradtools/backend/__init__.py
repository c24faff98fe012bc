"""The interface to TensorFlow, JAX and torch: this folder is the only one that imports a framework.

`base.Backend` lists and describes the kernels. Each framework has a folder whose `backend.py` holds a subclass, and the
other files what that needs. `keras_gradtools.backend.pullback` and so on are the kernels of the current backend.
"""

import importlib

import keras

from keras_gradtools import nesting
from keras_gradtools.backend.base import Backend
from keras_gradtools.keras_state import framework, numpy_calls

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
    # Kept in the module, where the next use finds it without a call of this function. Any other name is a file of this
    # folder that Python is about to import.
    if kernel.startswith("_") or not hasattr(Backend, kernel):
        raise AttributeError(f"{kernel!r} is not a kernel, see `keras_gradtools.backend.base.Backend`.")
    found = globals()[kernel] = getattr(_current, kernel)
    return found


# On import, not at the first use: a backend corrects operations of the framework, also in what is traced before a tape
# records it, and in what Keras itself trains.
_current = _load()
# The folders below import no adapter, and get what they need of it here.
nesting.use_registry(_current.containers)
framework.use(_current)
numpy_calls.install_for_variables()
