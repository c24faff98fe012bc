"""The calls of layers while a model runs: what each returned, and what a tape knows of it."""

import contextlib
import itertools
import threading
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_gradtools import backend, nesting
from keras_gradtools.backend.blocks import Block
from keras_gradtools.keras_internals.layers import Layer, Operation, get_keras_mask


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
    calls: Any = None
    record: Any = None
    around: tuple = ()
    is_single: bool = False


_thread = _Thread()


@contextlib.contextmanager
def recorded(model):
    """A block whose calls of layers of `model`, run eagerly in this thread, are put into a list as they end."""
    calls: list = []

    def see(layer, args, kwargs, outputs):
        found = [array_of(y) for y in keras.tree.flatten(outputs) if y is not None]
        # What a loop of the framework traces, the cell of a recurrent layer for example, has no values.
        if all(y is not None for y in found):
            calls.append(LayerCall(layer, args, kwargs, found))

    block = seen(model, see)
    with block, block:
        yield calls


class seen(Block):  # noqa: N801 - said of a block
    """A block in which `see(layer, args, kwargs, outputs)` is called as each call of a layer of `model` ends.

    Only calls in this thread are seen. Keeping nothing of the outputs keeps the memory that of a call of the model.
    """

    def __init__(self, model, see):
        inside = {id(layer) for layer in model._flatten_layers()}

        def see_inside(layer, *call):
            if id(layer) in inside:
                see(layer, *call)

        self._see, self._before = see_inside, _thread.see

    def begin(self):
        _Hooks.lay(self)
        _thread.see = self._see

    def end(self):
        _thread.see = self._before
        _Hooks.lift(self)


class watched(Block):  # noqa: N801 - said of a block
    """A block whose calls of layers, run eagerly in this thread, are put into the list `calls` as they end.

    `record` is recording, and watches the floating-point inputs of each of them: an alias is passed on, so that what
    comes out of the layer depends on it by way of the layer alone.
    """

    def __init__(self, record):
        self.calls: list = []
        self._record = record
        self._before = _thread.calls, _thread.record, _thread.around

    def begin(self):
        _Hooks.lay(self)
        _thread.calls, _thread.record, _thread.around = self.calls, self._record, ()

    def end(self):
        _thread.calls, _thread.record, _thread.around = self._before
        _Hooks.lift(self)


class _Hooks:
    """What stands in the place of Keras' `__call__` as long as some block, on whatever thread, needs it.

    Each thread goes by its own `_thread`, so that for the others it does what Keras does.
    """

    _lock = threading.Lock()
    _blocks: set = set()
    _originals: Any = None

    @classmethod
    def lay(cls, block):
        with cls._lock:
            cls._blocks.add(id(block))
            if cls._originals is None:
                cls._originals = Layer.__call__, Operation.__call__
            Layer.__call__, Operation.__call__ = cls._of_layer(*cls._originals), cls._of_operation(*cls._originals)

    @classmethod
    def lift(cls, block):
        with cls._lock:
            cls._blocks.discard(id(block))
            if not cls._blocks and cls._originals is not None:
                Layer.__call__, Operation.__call__ = cls._originals
                cls._originals = None

    @staticmethod
    def _of_layer(original, _):
        def __call__(self, *args, **kwargs):
            if _thread.calls is not None:
                return _watched_call(original, self, args, kwargs)
            outputs = original(self, *args, **kwargs)
            if _thread.see is not None:
                _thread.see(self, args, kwargs, outputs)
            return outputs

        return __call__

    @staticmethod
    def _of_operation(_, original):
        def __call__(self, *args, **kwargs):
            # A layer's call comes by here as well.
            if _thread.calls is None or isinstance(self, Layer):
                return original(self, *args, **kwargs)
            return _watched_call(original, self, args, kwargs)

        return __call__


class in_single_precision(Block):  # noqa: N801 - said of a block
    """A block in which layers that compute in half precision compute in single precision, in this thread."""

    _NAME = "_dtype_policy"
    _lock = threading.Lock()
    _blocks: set = set()

    def begin(self):
        with self._lock:
            self._blocks.add(id(self))
            # What Keras asks; in the layers themselves, which other threads may be calling, nothing changes.
            setattr(Layer, self._NAME, property(_policy, _set_policy))
        _thread.is_single = True

    def end(self):
        _thread.is_single = False
        with self._lock:
            self._blocks.discard(id(self))
            if not self._blocks and self._NAME in vars(Layer):
                delattr(Layer, self._NAME)


def _policy(layer):
    own = vars(layer)[in_single_precision._NAME]
    return keras.DTypePolicy("float32") if _thread.is_single and _is_half(own, layer) else own


def _set_policy(layer, value):
    vars(layer)[in_single_precision._NAME] = value


def _is_half(policy, layer):
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        policy = policy[layer.path]
    return policy.compute_dtype in ("float16", "bfloat16") and not policy.quantization_mode


def _watched_call(original, layer, args, kwargs):
    calls, record = _thread.calls, _thread.record
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
    kind = "layers" if isinstance(layer, Layer) else "ops"
    return f"keras.{kind}.{cls.__name__}" if is_keras_own(layer) else f"{cls.__module__}.{cls.__qualname__}"


def is_keras_own(layer):
    """Whether a layer's or operation's class comes with Keras."""
    return type(layer).__module__.split(".")[0] == "keras"


def array_of(x):
    """A tensor as a NumPy array, without its gradient; None where a trace has no value for it."""
    try:
        return ops.convert_to_numpy(ops.stop_gradient(x)) if ops.is_tensor(x) else np.asarray(x)
    except Exception:  # each framework has its own for this
        return None
