"""The kernels on JAX.

JAX has no tape, so this backend has its own: `jax_trace` records operations, and `jax_sweep` differentiates them. This
file connects the two, and contains the smaller kernels. `keras_gradtools.backend` lists what each kernel does.
"""

import contextlib
import typing
import weakref

import jax
import keras

from keras_gradtools.backend import (
    chunks,
    jax_closure_convert,
    jax_keras_ops,
    jax_linearize,
    jax_scan,
    jax_sweep,
    jax_trace,
    recording,
)
from keras_gradtools.backend.blocks import Block
from keras_gradtools.backend.jax_containers import containers
from keras_gradtools.backend.jax_custom_gradient import custom_gradient
from keras_gradtools.backend.jax_jit import depends_on_values, jit
from keras_gradtools.keras_internals import batches

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
HESSIAN_MODE = "forward"
LINEARIZES_ONCE = False


class Tape(recording.Recording):
    """A list of recorded operations, and the values that the tape follows, by identity."""

    # Only set inside the block: a trace that is kept longer would keep a whole compilation alive.
    trace: typing.Any = None

    def __init__(self, watch_accessed_variables):
        super().__init__(watch_accessed_variables)
        self._forget()

    def _forget(self):
        self.operations = []
        self.followed = {}
        self.aliases = {}

    def begin(self):
        super().begin()
        self.trace = jax_trace.trace_here()
        jax_trace.enter(self.trace, self)
        self.trace.tapes.append(self)

    def end(self):
        super().end()
        if self.trace is not None:
            self._leave_record()
            jax_trace.leave(self.trace, self)
            self.trace = None

    def _leave_record(self):
        while self in self.trace.tapes:
            self.trace.tapes.remove(self)

    def pause(self):
        super().pause()
        self._leave_record()

    def resume(self):
        super().resume()
        if self not in self.trace.tapes:
            self.trace.tapes.append(self)

    def reset(self):
        super().reset()
        self._forget()

    def release(self):
        self._forget()

    def watch(self, tensor):
        self.followed[id(tensor)] = tensor

    def depends(self, value, others):
        return bool(jax_sweep.Slice(self, [value], others).inputs)


def _watch_read(variable, value, tapes):
    """Returns an alias of `value` to the reader.

    Tapes follow values by identity, so without an alias two variables with the same array could not be told apart. The
    next read of the same value returns the same alias, if all the tapes have it.
    """
    tapes = [tape for tape in tapes if jax_trace.is_visible(value, tape.trace)]
    if not tapes or not jax_trace.is_followable(value):
        return value
    known = [tape.aliases.get(id(variable), (None, None)) for tape in tapes]
    given = known[0][1]
    # If a stateless scope maps the variable to a value that some tape follows, that tape must follow the alias, too.
    # An assigned value is a constant, whatever it was computed from.
    is_lent = recording.is_lent(variable, value)
    followers = [tape for tape in recording.active_tapes() if is_lent and id(value) in tape.followed]
    if (
        given is None
        or any(of is not value or alias is not given for of, alias in known)
        or any(id(given) not in tape.followed for tape in followers)
    ):
        given = jax_trace.recorded_alias(value, followers[-1].trace) if followers else jax_trace.alias(value)
    if jax_trace.is_tracing_program() and not jax_trace.is_traced([given]):
        _note_read_by_program(variable, given)
    for tape in tapes:
        tape.aliases[id(variable)] = (value, given)
        tape.followed[id(given)] = given
        tape.note_read(variable, given, is_lent)
    return given


def _note_read_by_program(variable, given):
    """Lets later tapes know that `given`, a constant of a traced program, is the value of `variable`."""
    key, owner = id(given), weakref.ref(variable)

    def read(given, tapes):
        variable = owner()
        for tape in tapes:
            if variable is not None and id(given) not in tape.followed and tape.wants(variable):
                tape.followed[id(given)] = given
                tape.note_read(variable, given)

    jax_trace.reads_by_programs[key] = read
    weakref.finalize(given, jax_trace.reads_by_programs.pop, key, None).atexit = False


recording.install_read_hook(_watch_read)
jax_keras_ops.install()
jax_closure_convert.install()
jax_scan.install()


def alias(x):
    return jax_trace.recorded_alias(x)


def settled(tensors):
    return tensors


def pullback(tape, targets, sources, cotangents):
    return _pull(jax_sweep.pull, tape, targets, sources, cotangents)


def constant_pullback(tape, targets, sources, cotangents):
    # `stop_gradient` comes before the sweep and not after it. Then an enclosing derivative does not enter the sweep, so
    # it cannot fail at a custom derivative that cannot be differentiated again.
    return _pull(_pull_constants, tape, targets, sources, jax.lax.stop_gradient(cotangents))


def pullback_batch(tape, targets, sources, cotangents):
    return _pull(jax_sweep.pull_batch, tape, targets, sources, cotangents)


def pushforward(tape, targets, sources, tangents):
    return _push(jax_sweep.push, tape, targets, sources, tangents)


def pushforward_batch(tape, targets, sources, tangents):
    return _push(jax_sweep.push_batch, tape, targets, sources, tangents)


def _pull_constants(part, arrays, cotangents):
    return jax_sweep.pull(part, jax.lax.stop_gradient(arrays), cotangents)


def _pull(mode, tape, targets, sources, cotangents):
    def gradient_of(values):
        part = jax_sweep.Slice(tape, targets, values)
        if not part.inputs:
            return [None] * len(values)
        connected = [u for u, slot in zip(cotangents, part.target_slots, strict=True) if slot is not None]
        gradients = jax_sweep.differentiate(mode, part, connected)
        return [None if slot is None else gradients[slot] for slot in part.source_slots]

    return tape.gather(sources, gradient_of)


def _push(mode, tape, targets, sources, tangents):
    _, values, tangents = tape.spread(sources, tangents)
    part = jax_sweep.Slice(tape, targets, values)
    if not part.inputs:
        return [None] * len(targets)
    return _by_target(part, jax_sweep.differentiate(mode, part, _by_input(part, tangents)))


def linearize(tape, targets, sources, is_symmetric=False):
    _, values, places = tape.spread(sources, range(len(sources)))
    part = jax_sweep.Slice(tape, targets, values)
    if not part.inputs:
        return lambda tangents: [None] * len(targets)
    linear = jax_linearize.linearize(part)
    return lambda tangents: _by_target(part, linear(_by_input(part, [tangents[i] for i in places])))


def _by_input(part, tangents):
    """The tangent for each input of the slice: the sum over the sources that are this same value."""
    summed = [None] * len(part.inputs)
    for slot, v in zip(part.source_slots, tangents, strict=True):
        if slot is not None:
            summed[slot] = v if summed[slot] is None else summed[slot] + v
    return summed


def _by_target(part, pushed):
    pushed = iter(pushed)
    return [None if slot is None else next(pushed) for slot in part.target_slots]


def spread(x):
    distribution = keras.distribution.distribution()
    if distribution is None or jax_trace.is_traced([x]):
        return x
    layout = distribution.get_data_layout(x.shape)
    try:
        return keras.distribution.distribute_tensor(x, layout)
    except ValueError:
        # A last batch that cannot be split evenly is not distributed: each device computes all of it.
        return x


def summed_over_replicas(fun, batch, variable):
    return fun(batch)


def is_shared_by_replicas(batch, variable):
    return False


def replica_results(fun, batch, variable):
    return [fun(batch)]


def train_function(model, step):
    """Copies Keras' state into the variables before a step, and out of them afterwards.

    Between steps, Keras on JAX holds the state in a tuple of arrays and leaves the variables empty, but `step` reads
    and assigns variables.
    """

    def function(state, iterator):
        stores = (
            model.trainable_variables,
            model.non_trainable_variables,
            model.optimizer.variables,
            model.metrics_variables,
        )
        for variables, values in zip(stores, state, strict=True):
            for variable, value in zip(variables, values, strict=True):
                if variable._value is not value:
                    variable.assign(value)
        model._jax_state_synced = True
        for batch in batches.of_execution(iterator, model.steps_per_execution):
            logs = step(batch)
        return logs, tuple([v.value for v in variables] for variables in stores)

    return function


def summed_over_processes(totals, count):
    return totals, count


def random_state():
    return None


def with_random_state(state):
    # On JAX, the variables of Keras' seeds are the whole random state.
    return contextlib.nullcontext()


def compiled(fun):
    # Keras compiles the whole training step, which includes `fun`.
    return fun


def assigns_at_once():
    # Keras' training step on JAX receives the state as arguments and returns it.
    return False


def can_make_variables():
    return True


def eagerly():
    return jax.ensure_compile_time_eval()


def tried(fun):
    def without_result():
        fun()

    jax.eval_shape(without_result)


def modes_kept():
    # JAX has no modes that outlive an error: a trace ends with the function that is traced.
    return Block()


def may_compile():
    # An active tape would not see the closed-over values in a compiled function, and could not detect that.
    return jax_trace.is_eager() and not recording.active_tapes()


def map_chunks(fun, count, chunk_size):
    if jax_trace.is_eager():
        return chunks.loop(fun, count, chunk_size)
    number = -(-count // chunk_size)
    present = chunks.Present(fun)
    index = jax.numpy.arange(number * chunk_size, dtype="int32").reshape(number, chunk_size)
    mapped = jax.lax.map(present, index)
    return present.restore([x.reshape(-1, *x.shape[2:])[:count] for x in mapped])


def per_example_gradients(fun, weights, examples, must_vectorize=False):
    return jax.vmap(jax.grad(fun, has_aux=True), in_axes=(None, 0))(weights, examples)
