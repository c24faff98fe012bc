"""Observes the calls of layers while a model runs, with their outputs or under a tape.

Keras has no hook for that, so `Layer.__call__` and `Operation.__call__` are replaced while a block here is open.
Checks and diagnostics use it to find the layer that causes a problem.
"""

import contextlib
import itertools
import threading
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_gradtools import nesting
from keras_gradtools.blocks import Block
from keras_gradtools.keras_internals.attributes import DTYPE_POLICY
from keras_gradtools.keras_internals.layers import Layer, Operation, get_keras_mask
from keras_gradtools.keras_state.layer_state import with_keras_mask_of


class LayerCall(NamedTuple):
    """One call of a layer: its arguments, and its outputs as a flat list of NumPy arrays."""

    layer: Any
    args: tuple
    kwargs: dict
    outputs: list


class WatchedCall(NamedTuple):
    """One call of a layer under a tape.

    `layer`: The layer, or an operation in the graph of a functional model.
    `name`: The names of the enclosing layers except the outermost, and of this one, joined by "/".
    `inputs`: Aliases of the floating-point inputs. Only this call received them.
    `outputs`: What the layer returned.
    `key`: A number for this call. `parent`: The key of the enclosing call, or -1.
    `given`: All tensors in the arguments, and their masks.
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
    """Yields a list to which each eager call of a layer of `model` on this thread is added when it ends."""
    calls: list = []

    def see(layer, args, kwargs, outputs):
        found = [array_of(y) for y in keras.tree.flatten(outputs) if y is not None]
        # Inside a loop that the framework traces, as for the cell of a recurrent layer, tensors have no values.
        if all(y is not None for y in found):
            calls.append(LayerCall(layer, args, kwargs, found))

    block = seen(model, see)
    with block, block:
        yield calls


class seen(Block):  # noqa: N801 - said of a block
    """A block in which `see(layer, args, kwargs, outputs)` is called after each call of a layer of `model`.

    Only calls on this thread are seen. If `see` keeps no outputs, the block takes no more memory than the model.
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
    """A block in which each eager call of a layer on this thread is added to the list `calls` when it ends.

    `record`, a tape that is recording, watches an alias of each floating-point input, made by `alias(x)`. The layer
    receives the alias, so a derivative with respect to it includes only the paths through this layer.
    """

    def __init__(self, record, alias):
        self.calls: list = []
        self._record = record, alias
        self._before = _thread.calls, _thread.record, _thread.around

    def begin(self):
        _Hooks.lay(self)
        _thread.calls, _thread.record, _thread.around = self.calls, self._record, ()

    def end(self):
        _thread.calls, _thread.record, _thread.around = self._before
        _Hooks.lift(self)


class _Hooks:
    """Replaces Keras' `__call__` as long as a block on any thread needs it.

    The replacement reads the thread-local `_thread`, so on threads without a block it only calls the original.
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
            # A layer is an operation, too, and calls this method through `super()`.
            if _thread.calls is None or isinstance(self, Layer):
                return original(self, *args, **kwargs)
            return _watched_call(original, self, args, kwargs)

        return __call__


class in_single_precision(Block):  # noqa: N801 - said of a block
    """A block in which layers with a half-precision policy compute in single precision, on this thread."""

    _lock = threading.Lock()
    _blocks: set = set()

    def begin(self):
        with self._lock:
            self._blocks.add(id(self))
            # Keras reads this attribute. The layers stay unchanged, because other threads may be calling them.
            setattr(Layer, DTYPE_POLICY, property(_policy, _set_policy))
        _thread.is_single = True

    def end(self):
        _thread.is_single = False
        with self._lock:
            self._blocks.discard(id(self))
            if not self._blocks and DTYPE_POLICY in vars(Layer):
                delattr(Layer, DTYPE_POLICY)


def _policy(layer):
    own = vars(layer)[DTYPE_POLICY]
    return keras.DTypePolicy("float32") if _thread.is_single and _is_half(own, layer) else own


def _set_policy(layer, value):
    vars(layer)[DTYPE_POLICY] = value


def _is_half(policy, layer):
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        policy = policy[layer.path]
    return policy.compute_dtype in ("float16", "bfloat16") and not policy.quantization_mode


def _watched_call(original, layer, args, kwargs):
    calls, (record, alias) = _thread.calls, _thread.record
    leaves, inputs = nesting.flatten((args, kwargs)), []
    given = [x for x in leaves if ops.is_tensor(x)]
    given += [mask for mask in map(get_keras_mask, given) if mask is not None]
    for i, leaf in enumerate(leaves):
        if _is_float_tensor(leaf) and len(leaf.shape):
            # Inside a loop that the framework traces, tensors have no values.
            if array_of(leaf) is None:
                return original(layer, *args, **kwargs)
            leaves[i] = with_keras_mask_of(alias(leaf), leaf)
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
    """The path of a layer in its model, or its name if it has no path."""
    return layer.path or layer.name


def class_path(layer):
    """The class of a layer or operation: `keras.layers.Dense`, or module and name if it is not part of Keras."""
    cls = type(layer)
    kind = "layers" if isinstance(layer, Layer) else "ops"
    return f"keras.{kind}.{cls.__name__}" if is_keras_own(layer) else f"{cls.__module__}.{cls.__qualname__}"


def is_keras_own(layer):
    """Whether the class of a layer or operation is part of Keras."""
    return type(layer).__module__.split(".")[0] == "keras"


def array_of(x):
    """A tensor as a NumPy array. None for a tensor without a value, inside a trace."""
    try:
        return ops.convert_to_numpy(ops.stop_gradient(x)) if ops.is_tensor(x) else np.asarray(x)
    except Exception:  # each framework raises its own error for a tensor without a value
        return None
