"""Tests whether a function mixes the examples of a batch, and finds the layers that are the cause."""

import keras
import numpy as np
from keras import ops

from keras_gradtools import backend, nesting, validation
from keras_gradtools.independence import cross_example_gradients
from keras_gradtools.independence.cross_example_gradients import BatchIndependence, Leak
from keras_gradtools.keras_state import layer_calls
from keras_gradtools.keras_state.layer_state import with_keras_mask_of
from keras_gradtools.keras_state.scopes import StateScope, read

# Relative tolerance for values that are computed twice.
_REPEATED = 1e-5


def examine(name, fun, x, args=(), kwargs=None, seed=0, chosen=None):
    """The `BatchIndependence` of `fun(x, *args, **kwargs)` in `x`, whose leaves have the shape `(batch, ...)`.

    Floating-point leaves are tested by gradients, all others by how the outputs change when examples are exchanged.
    With `chosen`, a `ChosenInputs`, only these leaves are tested.
    """
    kwargs = kwargs or {}
    leaves = [leaf if leaf is None else _tensor(name, leaf) for leaf in nesting.flatten(x)]
    judged = [i for i, leaf in enumerate(leaves) if leaf is not None] if chosen is None else chosen.positions
    if not judged:
        raise ValueError(f"{name} expects examples. Received: x={validation.shown(x)}.")
    cross_example_gradients.require_values(name, [leaves[i] for i in judged])
    batch_size = cross_example_gradients.require_batch(name, "inputs", [leaves[i] for i in judged])
    # Every call must draw the same random numbers. The scope around each call discards the new states of Keras seeds,
    # and this restores the state of the framework's own generator.
    random_state = backend.random_state()

    def called(leaves):
        block = backend.with_random_state(random_state)
        with block, block:
            return fun(nesting.pack_as(x, leaves), *args, **kwargs)

    floats = [i for i in judged if _is_float(leaves[i])]
    others = [i for i in judged if i not in floats]
    leak, dtype, reason = _leak_of(name, called, leaves, (floats, others), batch_size, seed)
    value = leak.value
    independent = False if value > cross_example_gradients.tolerance(dtype) else None if reason else True
    layers = [] if independent else _mixing_layers(called, leaves, batch_size, seed)
    if not layers and independent is False:
        layers = _layers_that_change_others(called, leaves, others, batch_size, seed)
    of = f"the model {fun.name!r}" if isinstance(fun, keras.Layer) else f"the function {validation.name_of(fun)!r}"
    names, classes = zip(*layers, strict=True) if layers else ((), ())
    training = kwargs.get("training")
    return BatchIndependence(independent, value, names, classes, batch_size, of, reason, training)


def _leak_of(name, called, leaves, judged, batch_size, seed):
    """The `Leak`, the dtype that sets its tolerance, and why the test is undecided (empty if it is not)."""
    floats, others = judged
    leak, reason = Leak(), ""
    outputs = []
    if floats:
        tape = backend.Tape(watch_accessed_variables=False)
        aliases = list(leaves)
        scope = StateScope()
        with scope, scope, tape, tape:
            for i in floats:
                aliases[i] = with_keras_mask_of(backend.alias(leaves[i]), leaves[i])
                tape.watch(aliases[i])
            outputs = _float_leaves(called(aliases))
        _require_outputs(name, outputs, batch_size)
        sources = [aliases[i] for i in floats]
        leak = cross_example_gradients.of_tape(tape, outputs, sources, batch_size, seed)
        cross_example_gradients.require_finite(name, leak)
        unreached = _count_unreached(tape, outputs, sources, leak, seed)
        if unreached:
            some = "" if unreached == len(outputs) else f" of {unreached} of the {len(outputs)} outputs"
            reason = f"the gradient{some} is zero everywhere, for instance because a layer's weights are zero"
    if others:
        outputs, repeats = _exchange(name, called, leaves, others, batch_size, seed, leak)
        reason = ""
        if not repeats:
            leak = Leak()
            reason = (
                "two calls with the same examples differ, because random numbers are drawn that cannot be repeated; "
                "those of keras.random with a keras.random.SeedGenerator can"
            )
        elif leak.is_zero:
            reason = "no output changes when examples change places, for instance because a layer's weights are zero"
    dtype = min((validation.dtype_of(y) for y in outputs), key=cross_example_gradients.tolerance, default="float32")
    return leak, dtype, reason


def _count_unreached(tape, outputs, sources, leak, seed):
    """The number of outputs whose gradient with respect to all sources is zero."""
    if len(outputs) == 1 or leak.is_zero:
        return len(outputs) if leak.is_zero else 0
    random, count = np.random.default_rng(seed), 0
    for y in outputs:
        cotangent = ops.convert_to_tensor(random.uniform(0.5, 1.5, tuple(y.shape)), dtype=y.dtype)
        found = backend.pullback(tape, [y], sources, [cotangent])
        count += not any(g is not None and np.any(cross_example_gradients.known_numbers(g)) for g in found)
    return count


def _exchange(name, called, leaves, others, batch_size, seed, leak):
    """Adds to `leak` how the outputs change when half of the examples keep their inputs and the others are replaced."""

    def outputs_of(leaves):
        scope = StateScope()
        with scope, scope:
            return _float_leaves(called(leaves))

    outputs = outputs_of(leaves)
    _require_outputs(name, outputs, batch_size)
    before = [cross_example_gradients.known_numbers(y) for y in outputs]
    again = [cross_example_gradients.known_numbers(y) for y in outputs_of(leaves)]
    repeats = all(np.allclose(a, b, rtol=_REPEATED, atol=0, equal_nan=True) for a, b in zip(before, again, strict=True))
    for half in cross_example_gradients.halves(batch_size, seed):
        replaced = _with_others_replaced(leaves, others, half)
        for y, old in zip(outputs_of(replaced), before, strict=True):
            leak.add(cross_example_gradients.known_numbers(y) - old, ~half)
    return outputs, repeats


def _with_others_replaced(leaves, others, half):
    """The leaves. In those at the positions `others`, the one before replaces each example outside the half."""
    places = np.arange(len(half))
    rows = np.where(half, places, np.roll(places, 1)).astype("int32")
    return [ops.take(leaf, rows, axis=0) if i in others else leaf for i, leaf in enumerate(leaves)]


def _mixing_layers(called, leaves, batch_size, seed):
    """The names and classes of the innermost layers in which an output has a gradient at another example's input."""
    tape, calls = _watched(called, leaves)
    mixing = []
    for call in calls:
        outputs = _float_leaves(call.outputs)
        if call.inputs and outputs:
            leak = cross_example_gradients.of_tape(tape, outputs, call.inputs, batch_size, seed)
            if leak.value > cross_example_gradients.tolerance(outputs[0]):
                mixing.append(call)
    return _innermost(mixing)


def _layers_that_change_others(called, leaves, others, batch_size, seed):
    """The names and classes of the innermost layers that mix examples without a gradient, for instance by a mask.

    When all examples outside of a half are replaced, such a layer's outputs for the examples of the half change,
    although its inputs for them do not.
    """
    _, before = _watched(called, leaves)
    for half in cross_example_gradients.halves(batch_size, seed):
        _, after = _watched(called, _with_others_replaced(leaves, others, half))
        mixing = [
            b
            for a, b in zip(before, after, strict=False)
            if not _changed(a.given, b.given, half) and _changed(_leaves_of(a.outputs), _leaves_of(b.outputs), half)
        ]
        if mixing:
            return _innermost(mixing)
    return []


def _watched(called, leaves):
    """The tape that has recorded a call, and the layer calls in it."""
    tape = backend.Tape(watch_accessed_variables=False)
    scope, watched = StateScope(), layer_calls.watched(tape, backend.alias)
    with scope, scope, tape, tape, watched, watched:
        called(leaves)
    return tape, watched.calls


def _innermost(mixing):
    # A layer that contains a mixing layer mixes as well, but is not the cause.
    around = {call.parent for call in mixing}
    found = {call.name: layer_calls.class_path(call.layer) for call in mixing if call.key not in around}
    return list(found.items())


def _changed(before, after, half):
    """Whether some tensors differ in the rows of half of the examples, or anywhere if they have no rows per example."""
    for a, b in zip(before, after, strict=False):
        a, b = layer_calls.array_of(a), layer_calls.array_of(b)
        if a is None or b is None or a.shape != b.shape:
            continue
        if a.ndim and a.shape[0] and a.shape[0] % len(half) == 0:
            rows = np.repeat(half, a.shape[0] // len(half))
            a, b = a[rows], b[rows]
        if not np.allclose(a, b, rtol=_REPEATED, atol=_REPEATED * np.abs(a).max(initial=0.0), equal_nan=True):
            return True
    return False


def _leaves_of(outputs):
    return [y for y in nesting.flatten(outputs) if ops.is_tensor(y)]


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
    size = cross_example_gradients.require_batch(name, "outputs", outputs)
    if size != batch_size:
        raise ValueError(
            f"{name} expects as many outputs as examples. Received: outputs of batch size {size} for {batch_size} "
            "examples."
        )
