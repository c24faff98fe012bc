"""What each layer of a model returned, in the order in which the calls ended."""

import contextlib
import threading
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops
from keras.src.layers.layer import Layer


class LayerCall(NamedTuple):
    """One call of a layer: what it was given, and what it returned as NumPy arrays, flat."""

    layer: Any
    args: tuple
    kwargs: dict
    outputs: list


class _Thread(threading.local):
    calls: list | None = None


_thread = _Thread()
_one_at_a_time = threading.RLock()


@contextlib.contextmanager
def recorded(model):
    """A block whose calls of layers of `model`, run eagerly in this thread, are put into a list as they end."""
    inside = {id(layer) for layer in model._flatten_layers()}
    original = Layer.__call__

    def __call__(self, *args, **kwargs):
        outputs = original(self, *args, **kwargs)
        calls = _thread.calls
        if calls is not None and id(self) in inside:
            found = [_array(y) for y in keras.tree.flatten(outputs) if y is not None]
            # What a loop of the framework traces, the cell of a recurrent layer for example, has no values.
            if all(y is not None for y in found):
                calls.append(LayerCall(self, args, kwargs, found))
        return outputs

    with _one_at_a_time:
        Layer.__call__ = __call__
        _thread.calls = calls = []
        try:
            yield calls
        finally:
            _thread.calls = None
            Layer.__call__ = original


def path_of(layer):
    """The path of a layer in its model, or its name where Keras has given it none."""
    return layer.path or layer.name


def class_path(layer):
    """The name of a layer's class, with its module where it is not one of Keras' own."""
    cls = type(layer)
    own = cls.__module__.split(".")[0] == "keras"
    return f"keras.layers.{cls.__name__}" if own else f"{cls.__module__}.{cls.__qualname__}"


def _array(x):
    try:
        return ops.convert_to_numpy(ops.stop_gradient(x)) if ops.is_tensor(x) else np.asarray(x)
    except Exception:  # each framework has its own for this
        return None
