"""Trying out whether the examples of a batch depend on one another in a function, and which layers are the cause."""

import keras
import numpy as np
from keras import ops

from keras_gradtools import backend, independence, nesting, validation
from keras_gradtools.backend import layer_calls
from keras_gradtools.backend.state import StateScope
from keras_gradtools.independence import BatchIndependence, Leak
from keras_gradtools.transforms.taped_call import read


def examine(name, fun, x, args=(), kwargs=None, seed=0):
    """The `BatchIndependence` of `fun(x, *args, **kwargs)`, in `x`, whose leaves have the shape `(batch, ...)`.

    Floating-point leaves are judged by pullbacks, all others by what comes out when examples change places.
    """
    kwargs = kwargs or {}
    leaves = [_tensor(name, leaf) for leaf in nesting.flatten(x)]
    if not leaves:
        raise ValueError(f"{name} expects examples. Received: x={validation.shown(x)}.")
    independence.require_values(name, leaves)
    batch_size = independence.require_batch(name, "inputs", leaves)

    def called(leaves):
        return fun(nesting.pack_as(x, leaves), *args, **kwargs)

    leak, dtype = _leak_of(name, called, leaves, batch_size, seed)
    value = leak.value
    independent = value <= independence.tolerance(dtype)
    layers = [] if independent else _mixing_layers(called, leaves, batch_size, seed)
    of = f"the model {fun.name!r}" if isinstance(fun, keras.Layer) else f"the function {validation.name_of(fun)!r}"
    names, classes = zip(*layers, strict=True) if layers else ((), ())
    return BatchIndependence(independent, value, names, classes, batch_size, of)


def _leak_of(name, called, leaves, batch_size, seed):
    """What crosses between examples, and the dtype to judge it by."""
    floats = [i for i, leaf in enumerate(leaves) if _is_float(leaf)]
    leak = Leak()
    outputs = []
    if floats:
        record = backend.Tape(watch_accessed_variables=False)
        aliases = list(leaves)
        scope = StateScope()
        with scope, scope, record, record:
            for i in floats:
                aliases[i] = backend.alias(leaves[i])
                record.watch(aliases[i])
            outputs = _float_leaves(called(aliases))
        _require_outputs(name, outputs, batch_size)
        sources = [aliases[i] for i in floats]
        leak = independence.of_record(record, outputs, sources, batch_size, seed)
        independence.require_finite(name, leak)
    if len(floats) < len(leaves):
        others = [i for i in range(len(leaves)) if i not in floats]
        outputs = _exchange(name, called, leaves, others, batch_size, seed, leak)
    return leak, min((validation.dtype_of(y) for y in outputs), key=independence.tolerance, default="float32")


def _exchange(name, called, leaves, others, batch_size, seed, leak):
    """Adds to `leak` what changes in the outputs of a half of the examples when the rest of them is replaced."""

    def outputs_of(leaves):
        scope = StateScope()
        with scope, scope:
            return _float_leaves(called(leaves))

    outputs = outputs_of(leaves)
    _require_outputs(name, outputs, batch_size)
    before = [independence.numbers(y).astype("float64") for y in outputs]
    for half in independence.halves(batch_size, seed):
        replaced = list(leaves)
        rows = np.where(half, np.arange(batch_size), np.roll(np.arange(batch_size), 1)).astype("int32")
        for i in others:
            replaced[i] = ops.take(leaves[i], rows, axis=0)
        for y, old in zip(outputs_of(replaced), before, strict=True):
            leak.add(independence.numbers(y) - old, ~half)
    return outputs


def _mixing_layers(called, leaves, batch_size, seed):
    """The names and classes of the innermost layers in which gradients cross between examples."""
    record = backend.Tape(watch_accessed_variables=False)
    scope, watched = StateScope(), layer_calls.watched(record)
    with scope, scope, record, record, watched, watched:
        called(leaves)
    mixing = []
    for call in watched.calls:
        outputs = _float_leaves(call.outputs)
        if call.inputs and outputs:
            leak = independence.of_record(record, outputs, call.inputs, batch_size, seed)
            if leak.value > independence.tolerance(outputs[0]):
                mixing.append(call)
    # What is around a layer that mixes mixes as well, and is not the cause.
    around = {call.parent for call in mixing}
    found = {call.name: layer_calls.class_path(call.layer) for call in mixing if call.key not in around}
    return list(found.items())


def _tensor(name, leaf):
    leaf = read(leaf)
    try:
        return leaf if ops.is_tensor(leaf) else ops.convert_to_tensor(leaf)
    except (ValueError, TypeError, RuntimeError):
        raise ValueError(f"{name} expects examples as tensors. Received: {validation.describe(leaf)}.") from None


def _is_float(x):
    return ops.is_tensor(x) and keras.backend.is_float_dtype(validation.dtype_of(x))


def _float_leaves(outputs):
    return [y for y in map(read, nesting.flatten(outputs)) if _is_float(y)]


def _require_outputs(name, outputs, batch_size):
    if not outputs:
        raise ValueError(
            f"{name} expects a model that returns floating-point tensors. Received: one that returns none."
        )
    size = independence.require_batch(name, "outputs", outputs)
    if size != batch_size:
        raise ValueError(
            f"{name} expects as many outputs as examples. Received: outputs of batch size {size} for {batch_size} "
            "examples."
        )
