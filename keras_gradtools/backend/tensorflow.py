"""The kernels on TensorFlow, built on `tf.GradientTape`.

TensorFlow's tape ignores changes of Keras' `trainable` flags, and some of TensorFlow's gradients are wrong or missing.
This file makes the tape follow the flags, and installs the corrections of the other `tensorflow_*` files.
`keras_gradtools.backend` lists what each kernel does.
"""

import contextlib
import functools
import logging
import threading
import time
import warnings

import keras
import tensorflow as tf
from tensorflow.python import pywrap_tfe
from tensorflow.python.eager import tape as tape_module

from keras_gradtools import nesting
from keras_gradtools.backend import (
    chunks,
    keras_formulas,
    recording,
    tensorflow_ctc,
    tensorflow_custom_gradients,
    tensorflow_elementwise,
    tensorflow_gradients,
    tensorflow_resizing,
    tensorflow_variables,
)
from keras_gradtools.backend.blocks import Block
from keras_gradtools.backend.tensorflow_containers import containers
from keras_gradtools.backend.tensorflow_jit import depends_on_values, jit
from keras_gradtools.keras_internals import backend_modules

__all__ = [
    "COMPILES_SECOND_ORDER",
    "HESSIAN_MODE",
    "LINEARIZES_ONCE",
    "Tape",
    "alias",
    "assigns_at_once",
    "can_make_variables",
    "compiled",
    "constant_pullback",
    "containers",
    "custom_gradient",
    "depends_on_values",
    "eagerly",
    "is_shared_by_replicas",
    "jit",
    "linearize",
    "map_chunks",
    "may_compile",
    "modes_kept",
    "per_example_gradients",
    "pullback",
    "pullback_batch",
    "pushforward",
    "pushforward_batch",
    "random_state",
    "replica_results",
    "settled",
    "spread",
    "summed_over_processes",
    "summed_over_replicas",
    "train_function",
    "tried",
    "with_random_state",
]

COMPILES_SECOND_ORDER = True
HESSIAN_MODE = "reverse"
LINEARIZES_ONCE = False


class Tape(recording.Recording):
    """A `tf.GradientTape` that watches the variables that are trainable in Keras.

    The native tape is always persistent: `tape/gradient_tape.py` decides whether a second derivative is allowed. It
    also watches accessed variables by itself, because a `tf.function` that was traced earlier reads them without
    calling Keras.
    """

    def __init__(self, watch_accessed_variables):
        super().__init__(watch_accessed_variables)
        self.native = self._new_native()
        self._notes: list = []
        self.custom_gradients = []
        self._watch_later = []
        self._seen_by_native = []

    def _new_native(self):
        watch = self._watch_accessed_variables
        native = tf.GradientTape(persistent=True, watch_accessed_variables=watch)
        # A native tape that was never entered has no `_tape`, and `gradient` would raise the error for a second call.
        made: list = []
        try:
            made.extend(map(pywrap_tfe.TFE_Py_TapeSetNew, (True,), (watch,)))
        finally:
            for one in made:
                pywrap_tfe.TFE_Py_TapeSetRemove(one)
        native._tape = tape_module.Tape(made[0])
        return native

    # TensorFlow does not say which tapes are in its set of recording tapes, and removing one that is not in the set
    # crashes the process. So each change of the set is noted: an odd number of notes means that the tape is in the set.
    # `extend` with `map` runs in C, so an interrupt cannot come between a change and its note.

    def _push(self):
        if len(self._notes) % 2 == 0:
            self._notes.clear()
            self._notes.extend(map(pywrap_tfe.TFE_Py_TapeSetAdd, (self.native._tape._tape,)))
        self.native._recording = True

    def _pop(self):
        if len(self._notes) % 2:
            self._notes.extend(map(pywrap_tfe.TFE_Py_TapeSetRemove, (self.native._tape._tape,)))
        self.native._recording = False

    def begin(self):
        super().begin()
        self._push()
        for tensor in self._watch_later:
            self.native.watch(tensor)
        self._watch_later = []

    def end(self):
        super().end()
        self._pop()

    def pause(self):
        self.end()

    def resume(self):
        self.begin()

    def reset(self):
        super().reset()
        self.custom_gradients = []
        self._watch_later = []
        self._seen_by_native = []
        recording_now = self in recording.active_tapes()
        self._pop()
        self.native = self._new_native()
        if recording_now:
            self._push()

    def release(self):
        self._pop()
        self._seen_by_native += self.native.watched_variables()
        self.native = self._new_native()
        self.custom_gradients = []

    def watched_variables(self):
        """The variables that Keras reported, in the order of their reads, then those that only the native tape saw."""
        watched = super().watched_variables()
        others = tensorflow_variables.owners((*self._seen_by_native, *self.native.watched_variables()))
        known = set(map(id, watched))
        for variable in others:
            # The native tape reads TensorFlow's `trainable` flag, which may be out of date for a Keras variable.
            if id(variable) not in known and not (isinstance(variable, keras.Variable) and not self.wants(variable)):
                watched.append(variable)
                known.add(id(variable))
        return watched

    def watch(self, tensor):
        if self in recording.active_tapes():
            self.native.watch(tensor)
        else:
            # The native tape ignores `watch` while it is paused.
            self._watch_later.append(tensor)

    def watch_variable(self, variable):
        super().watch_variable(variable)
        self.watch(variable._value)

    def depends(self, value, others):
        return any(g is not None for g in self.native.gradient(value, others))

    def values_read(self, variable):
        values = super().values_read(variable)
        if not values and self.wants(variable) and variable._value is not None:
            # Read by a `tf.function` that was traced earlier: only the native tape has seen it.
            return [variable._value]
        return values


def _watch_read(variable, value, tapes):
    if not value.dtype.is_floating:
        return value
    for tape in tapes:
        # The native tape reads TensorFlow's `trainable` flag, which is set when the variable is created. Without this,
        # it would not watch a layer that was unfrozen later.
        tape.native.watch(value)
        tape.note_read(variable, value, recording.is_lent(variable, value))
    return value


recording.install_read_hook(_watch_read, tensorflow_variables.meet)
tensorflow_custom_gradients.install()
tensorflow_elementwise.install()
tensorflow_resizing.install()
tensorflow_gradients.install()


def _differentiable_moments(to_first_order):
    return functools.partial(_moments, to_first_order)


def _moments(to_first_order, x, axes, keepdims):
    """Mean and variance, differentiable to any order.

    `tf.nn.moments`, which Keras' normalization layers use, takes the mean inside the variance for a constant. First
    derivatives are right, but all higher ones are silently wrong.
    """
    if tf.executing_eagerly() and not recording.active_tapes():
        # The original is not used in a graph, because a tape may record a call of the graph later.
        return to_first_order(x, axes, keepdims)
    mean = tf.reduce_mean(x, axes, keepdims=True)
    variance = tf.reduce_mean(tf.math.squared_difference(x, mean), axes, keepdims=keepdims)
    return (mean if keepdims else tf.squeeze(mean, axes)), variance


backend_modules.hooks["nn"]["_compute_moments"].replace(_differentiable_moments)
backend_modules.hooks["nn"]["ctc_loss"].replace(tensorflow_ctc.differentiable)
backend_modules.hooks["nn"]["celu"].replace(tensorflow_elementwise.celu)
for _name in ("i0", "ldexp", "logaddexp", "logaddexp2", "nextafter", "sinc"):
    if _name in backend_modules.hooks["numpy"]:
        backend_modules.hooks["numpy"][_name].replace(tensorflow_elementwise.followed(getattr(keras_formulas, _name)))


def _dense(gradients):
    return [None if g is None else tf.convert_to_tensor(g) for g in gradients]


def _gradients(tape, targets, values, cotangents):
    gradients = tape.native.gradient(targets, values, output_gradients=cotangents)
    if tape.custom_gradients:
        tensorflow_custom_gradients.require_connected(tape, targets, values, gradients)
    return _dense(gradients)


def pullback(tape, targets, sources, cotangents):
    return tape.gather(sources, lambda values: _gradients(tape, targets, values, cotangents))


def constant_pullback(tape, targets, sources, cotangents):
    return [None if g is None else tf.stop_gradient(g) for g in pullback(tape, targets, sources, cotangents)]


def pushforward(tape, targets, sources, tangents):
    return linearize(tape, targets, sources)(tangents)


def linearize(tape, targets, sources, is_symmetric=False):
    # A pullback is linear in its cotangents, so its own pullback is the pushforward. A `ForwardAccumulator` cannot be
    # used: it would have to be active while the block runs, and nested ones are silently wrong.
    _, values, places = tape.spread(sources, range(len(sources)))
    if not values:
        return lambda tangents: [None] * len(targets)
    cotangents = [tf.zeros_like(t) for t in targets]
    with tf.GradientTape(persistent=True) as transposed:
        transposed.watch(cotangents)
        gradients = _gradients(tape, targets, values, cotangents)
    connected = [(g, place) for g, place in zip(gradients, places, strict=True) if g is not None]

    def push(tangents):
        if not connected:
            return [None] * len(targets)
        upstream = [tangents[place] for _, place in connected]
        return _dense(transposed.gradient([g for g, _ in connected], cotangents, output_gradients=upstream))

    def push_as_a_graph(tangents):
        # The recorded values are inputs of the graph, so it computes only what depends on the tangents.
        return linearize(tape, targets, sources)(tangents)

    return _CompiledWhenItPays(push, push_as_a_graph) if tf.executing_eagerly() and connected else push


class _CompiledWhenItPays:
    """Runs a function eagerly until its calls have taken `TRACING` seconds in total, and as a graph from then on.

    A graph omits operations that eager backpropagation computes unnecessarily, but tracing takes as long as many small
    products. `TRACING` is about that time.
    """

    TRACING = 0.3

    def __init__(self, eager, traced):
        self._eager = eager
        self._traced = tf.function(traced, autograph=False)
        # There is one for each linearization, so TensorFlow's warning would be of no use.
        self._traced._omit_frequent_tracing_warning = True
        self._seconds = 0.0

    def __call__(self, tensors):
        if recording.active_tapes() or not tf.executing_eagerly():
            return self._eager(tensors)
        if self._seconds > self.TRACING:
            return self._traced(tensors)
        start = time.perf_counter()
        result = self._eager(tensors)
        self._seconds += time.perf_counter() - start
        return result


def pullback_batch(tape, targets, sources, cotangents):
    return _map_connected(lambda rows: pullback(tape, targets, sources, rows), cotangents)


def pushforward_batch(tape, targets, sources, tangents):
    return _map_connected(lambda rows: pushforward(tape, targets, sources, rows), tangents)


def spread(x):
    return x


def summed_over_replicas(fun, batch, variable):
    strategy = _sharing_strategy(batch, variable)
    if strategy is None:
        return fun(batch)
    with strategy.scope():
        return strategy.reduce(tf.distribute.ReduceOp.SUM, _on_replicas(strategy, fun, batch), axis=None)


def is_shared_by_replicas(batch, variable):
    return _sharing_strategy(batch, variable) is not None


def replica_results(fun, batch, variable):
    strategy = _sharing_strategy(batch, variable)
    if strategy is None:
        return [fun(batch)]
    with strategy.scope():
        found = _on_replicas(strategy, fun, batch)
    leaves = [strategy.experimental_local_results(x) for x in nesting.flatten(found)]
    return [nesting.pack_as(found, list(of_replica)) for of_replica in zip(*leaves, strict=True)]


def _sharing_strategy(batch, variable):
    """The strategy whose replicas share a batch. None if the batch is not shared."""
    strategy = getattr(variable._value, "distribute_strategy", None)
    if strategy is None or (tf.distribute.has_strategy() and not tf.distribute.in_cross_replica_context()):
        return None
    count, size = strategy.num_replicas_in_sync, nesting.flatten(batch)[0].shape[0]
    return None if count == 1 or size is None or size < count else strategy


def _on_replicas(strategy, fun, batch):
    count, size = strategy.num_replicas_in_sync, nesting.flatten(batch)[0].shape[0]

    def on_replica():
        i = int(tf.get_static_value(tf.distribute.get_replica_context().replica_id_in_sync_group))
        places = slice(i * size // count, (i + 1) * size // count)
        return fun(nesting.map_structure(lambda x: x if x is None else x[places], batch))

    return strategy.run(on_replica)


def train_function(model, step):
    """Joins a batch that Keras has split between replicas, and passes it to `step`."""
    strategy = model.distribute_strategy

    def whole(x):
        if isinstance(x, tf.experimental.Optional):
            return None
        parts = strategy.experimental_local_results(x)
        return parts[0] if len(parts) == 1 else tf.concat(parts, 0)

    def function(iterator):
        logs = None
        for _, batch in zip(range(model.steps_per_execution), iterator, strict=False):
            logs = step(keras.tree.map_structure(whole, batch))
        if logs is None:
            raise StopIteration
        return logs

    return function


def summed_over_processes(totals, count):
    return totals, count


def random_state():
    return None


def with_random_state(state):
    # On TensorFlow, the variables of Keras' seeds are the whole random state.
    return contextlib.nullcontext()


def compiled(fun):
    # Keras compiles the whole training step, which includes `fun`.
    return fun


def assigns_at_once():
    return tf.executing_eagerly() and not tf.distribute.has_strategy()


def can_make_variables():
    # Each replica would create a variable of its own.
    return tf.distribute.get_strategy().num_replicas_in_sync == 1 or tf.distribute.in_cross_replica_context()


def eagerly():
    # Lifts the block out of the graph that is being built.
    return tf.init_scope()


def tried(fun):
    def without_result():
        fun()

    tf.function(without_result, autograph=False).get_concrete_function()


def modes_kept():
    # TensorFlow has no modes that outlive an error: a graph context ends with the function that is traced.
    return Block()


def may_compile():
    return tf.executing_eagerly()


def map_chunks(fun, count, chunk_size):
    if tf.executing_eagerly():
        return chunks.loop(fun, count, chunk_size)
    number = -(-count // chunk_size)
    if not isinstance(count, int):
        # With unknown shapes, `tf.map_fn` cannot loop over nothing. Indices past the last one only add rows to cut off.
        number = tf.maximum(number, 2)
    index = tf.reshape(tf.range(number * chunk_size), (number, chunk_size))
    # The first chunk shows which results are None, and the shapes of the others. The rest must not run before it ends.
    first = fun(index[0])
    present = chunks.Present(fun)
    connected = [r for r in first if r is not None]
    with tf.control_dependencies(connected):
        signature = [tf.TensorSpec(r.shape, r.dtype) for r in connected]
        rest = tf.map_fn(present, index[1:], fn_output_signature=signature, parallel_iterations=1)
    joined = [tf.concat([a, _merged(b)], 0)[:count] for a, b in zip(connected, rest, strict=True)]
    return present.restore(joined)


def _merged(chunks_of_rows):
    return tf.reshape(chunks_of_rows, tf.concat([[-1], tf.shape(chunks_of_rows)[2:]], 0))


def per_example_gradients(fun, weights, examples, must_vectorize=False):
    def gradients(example):
        tape = Tape(watch_accessed_variables=False)
        with tape, tape:
            for weight in weights:
                tape.watch(weight)
            value, aux = fun(weights, example)
        found = pullback(tape, [value], weights, [tf.ones_like(value)])
        return [tf.zeros_like(w) if g is None else g for g, w in zip(found, weights, strict=True)] + [
            tf.identity(x)
            for x in aux  # without `identity`, a tensor from outside would not be in the vectorizer's graph
        ]

    if not must_vectorize:
        found = _map_rows(gradients, examples)
    else:
        with _without_the_log_of_the_vectorizer():
            found = _vectorize(gradients, examples)
    return found[: len(weights)], found[len(weights) :]


def _map_connected(fun, stacks):
    """Maps `fun` over axis 0 of `stacks`, vectorized. A result that is None stays None."""
    connected = []

    def present(rows):
        results = fun(rows)
        connected[:] = [r is not None for r in results]
        # The map must return something, even if nothing is connected.
        return [r for r in results if r is not None] or [rows[0]]

    mapped = iter(_map_rows(present, stacks))
    return [next(mapped) if c else None for c in connected]


def _map_rows(fun, stacks):
    if stacks[0].shape[0] == 1:
        return _row_by_row(fun, stacks)
    try:
        with _without_the_log_of_the_vectorizer():
            return _vectorize(fun, stacks)
    except Exception as error:
        # The vectorizer has no error class of its own: it raises `TypeError`, `KeyError` and others.
        if stacks[0].shape[0] is None:
            raise
        reason = str(error).strip() or type(error).__name__
    # If the error came from `fun` itself, it is raised again here.
    results = _row_by_row(fun, stacks)
    _warn_unvectorized(reason.splitlines()[-1].strip())
    return results


@contextlib.contextmanager
def _without_the_log_of_the_vectorizer():
    """Hides the vectorizer's log messages on this thread.

    If it cannot vectorize, it prints the graph in a thousand lines, where our warning has one. If it falls back to a
    loop, it asks the reader to fix TensorFlow.
    """
    thread = threading.get_ident()

    def keep(record):
        return record.levelno < logging.WARNING or record.thread != thread

    logger = tf.get_logger()
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _row_by_row(fun, stacks):
    count = stacks[0].shape[0]
    unrolled = count if tf.executing_eagerly() else min(count, _MOST_UNROLLED)
    rows = [fun([s[i] for s in stacks]) for i in range(unrolled)]
    results = [tf.stack(column) for column in zip(*rows, strict=True)]
    if unrolled == count:
        return results
    # A graph with every row unrolled would take long to trace.
    signature = [tf.TensorSpec(r.shape[1:], r.dtype) for r in results]
    rest = tf.map_fn(fun, [s[unrolled:] for s in stacks], fn_output_signature=signature)
    return [tf.concat(pair, 0) for pair in zip(results, rest, strict=True)]


_MOST_UNROLLED = 8


def _vectorize(fun, stacks):
    if not tf.executing_eagerly():
        return tf.vectorized_map(fun, stacks, warn=False)
    # Run eagerly, `vectorized_map` makes a new function at every call, and TensorFlow would warn about retracing.
    compiled = tf.function(lambda: tf.vectorized_map(fun, stacks, warn=False), autograph=False)
    compiled._omit_frequent_tracing_warning = True
    return compiled()


@functools.cache
def _warn_unvectorized(reason):
    warnings.warn(
        "TensorFlow cannot vectorize this computation. Jacobians are computed one row at a time, and per-example "
        f"gradients one example at a time, which is slower. TensorFlow said: {reason}",
        stacklevel=2,
    )


def alias(x):
    return tf.identity(x)


def settled(tensors):
    return tensors


def custom_gradient(fun):
    @tf.custom_gradient
    @tensorflow_custom_gradients.constant_closure
    def with_native_signature(*args):
        values, grad_fn = fun(*args)

        def grad(*upstream, variables=()):
            gradients = grad_fn(*upstream)
            # On every backend, the variables that `fun` reads are constants of its gradient.
            return (gradients, [None] * len(variables)) if variables else gradients

        return values, grad

    return with_native_signature
