"""The calls of layers while a model runs: what each returned, and what a tape knows of it."""

import contextlib
import itertools
import threading
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops
from keras.src.backend.common.masking import get_keras_mask
from keras.src.layers.layer import Layer
from keras.src.ops.operation import Operation

from keras_gradtools import backend, nesting


class LayerCall(NamedTuple):
    """One call of a layer: what it was given, and what it returned as NumPy arrays, flat."""

    layer: Any
    args: tuple
    kwargs: dict
    outputs: list


class WatchedCall(NamedTuple):
    """One call of a layer under a tape: aliases of its inputs, which no other layer has, and its outputs.

    `given` are all the tensors that it was given, and their masks.
    `layer` may also be an operation in the graph of a functional model. `name` has the names of the layers around it,
    but for the outermost. `key` stands for this call, and `parent` for the one around it.
    """

    layer: Any
    name: str
    inputs: list
    outputs: Any
    key: int
    parent: int
    given: list


class _Thread(threading.local):
    see: Any = None
    calls: list | None = None
    record: Any = None
    around: tuple = ()


_thread = _Thread()
_one_at_a_time = threading.RLock()


@contextlib.contextmanager
def recorded(model):
    """A block whose calls of layers of `model`, run eagerly in this thread, are put into a list as they end."""
    calls: list = []

    def see(layer, args, kwargs, outputs):
        found = [array_of(y) for y in keras.tree.flatten(outputs) if y is not None]
        # What a loop of the framework traces, the cell of a recurrent layer for example, has no values.
        if all(y is not None for y in found):
            calls.append(LayerCall(layer, args, kwargs, found))

    with seen(model, see):
        yield calls


@contextlib.contextmanager
def seen(model, see):
    """A block in which `see(layer, args, kwargs, outputs)` is called as each call of a layer of `model` ends.

    Only calls in this thread are seen. Keeping nothing of the outputs keeps the memory that of a call of the model.
    """
    inside = {id(layer) for layer in model._flatten_layers()}
    original = Layer.__call__

    def __call__(self, *args, **kwargs):
        outputs = original(self, *args, **kwargs)
        if _thread.see is not None and id(self) in inside:
            _thread.see(self, args, kwargs, outputs)
        return outputs

    with _one_at_a_time:
        Layer.__call__ = __call__
        _thread.see = see
        try:
            yield
        finally:
            _thread.see = None
            Layer.__call__ = original


@contextlib.contextmanager
def watched(record):
    """A block whose calls of layers, run eagerly in this thread, are put into a list as they end.

    `record` is recording, and watches the floating-point inputs of each of them: an alias is passed on, so that what
    comes out of the layer depends on it by way of the layer alone.
    """
    originals = Layer.__call__, Operation.__call__

    def layer_call(self, *args, **kwargs):
        return _watched_call(originals[0], self, args, kwargs)

    def operation_call(self, *args, **kwargs):
        # A layer's call comes by here as well.
        original = originals[1]
        is_counted = isinstance(self, Layer)
        return original(self, *args, **kwargs) if is_counted else _watched_call(original, self, args, kwargs)

    with _one_at_a_time:
        Layer.__call__, Operation.__call__ = layer_call, operation_call
        _thread.calls, _thread.record, _thread.around = [], record, ()
        try:
            yield _thread.calls
        finally:
            _thread.calls, _thread.record, _thread.around = None, None, ()
            Layer.__call__, Operation.__call__ = originals


def _watched_call(original, layer, args, kwargs):
    calls, record = _thread.calls, _thread.record
    if calls is None or record is None:
        return original(layer, *args, **kwargs)
    leaves, inputs = nesting.flatten((args, kwargs)), []
    given = [x for x in leaves if ops.is_tensor(x)]
    given += [mask for mask in map(get_keras_mask, given) if mask is not None]
    for i, leaf in enumerate(leaves):
        if _is_float_tensor(leaf) and len(leaf.shape):
            # What a loop of the framework traces has no values.
            if array_of(leaf) is None:
                return original(layer, *args, **kwargs)
            leaves[i] = backend.alias(leaf)
            record.watch(leaves[i])
            inputs.append(leaves[i])
    args, kwargs = nesting.pack_as((args, kwargs), leaves)
    around = _thread.around
    key = next(_keys)
    _thread.around = (*around, (key, layer.name))
    try:
        outputs = original(layer, *args, **kwargs)
    finally:
        _thread.around = around
    name = "/".join(name for _, name in (*around, (key, layer.name))[1:]) or layer.name
    calls.append(WatchedCall(layer, name, inputs, outputs, key, around[-1][0] if around else -1, given))
    return outputs


_keys = itertools.count()


def _is_float_tensor(x):
    return ops.is_tensor(x) and keras.backend.is_float_dtype(keras.backend.standardize_dtype(x.dtype))


def path_of(layer):
    """The path of a layer in its model, or its name where Keras has given it none."""
    return layer.path or layer.name


def class_path(layer):
    """The name of a layer's or operation's class, with its module where it is not one of Keras' own."""
    cls = type(layer)
    own = cls.__module__.split(".")[0] == "keras"
    kind = "layers" if isinstance(layer, Layer) else "ops"
    return f"keras.{kind}.{cls.__name__}" if own else f"{cls.__module__}.{cls.__qualname__}"


def array_of(x):
    """A tensor as a NumPy array, without its gradient; None where a trace has no value for it."""
    try:
        return ops.convert_to_numpy(ops.stop_gradient(x)) if ops.is_tensor(x) else np.asarray(x)
    except Exception:  # each framework has its own for this
        return None
