"""The kernels on JAX.

JAX has no tape: `trace.py` records operations, and `sweep.py` differentiates them.
"""

import os

import jax
import keras

from keras_gradtools.backend import chunks
from keras_gradtools.backend.base import Backend
from keras_gradtools.backend.jax import (
    aliases,
    closure_convert,
    current_trace,
    jaxprs,
    keras_ops,
    memory,
    pullbacks,
    pushforwards,
    scan,
    steps,
    tape,
    training,
)
from keras_gradtools.backend.jax.containers import containers
from keras_gradtools.backend.jax.custom_gradient import custom_gradient
from keras_gradtools.backend.jax.hoisting import hoisted
from keras_gradtools.backend.jax.jit import depends_on_values, jit
from keras_gradtools.backend.jax.train_function import train_function
from keras_gradtools.keras_state import recording

# In older versions of JAX, it is still an experiment.
enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64

tape.install()
keras_ops.install()
closure_convert.install()
scan.install()
training.install()


class JaxBackend(Backend):
    """The kernels on JAX. A kernel that is a function of another file is a static method here."""

    Tape = tape.Tape

    HESSIAN_MODE = "forward"
    COMPILES_LOOPS = True
    HAS_IMMUTABLE_TENSORS = True
    CONTRACTS_PRODUCTS = True
    # XLA fuses a whole pass over a tile of examples: 1.6 times faster with two directions on a CPU.
    STACK_AXIS = 1

    pullback = staticmethod(pullbacks.pullback)
    constant_pullback = staticmethod(pullbacks.constant_pullback)
    pullback_batch = staticmethod(pullbacks.pullback_batch)
    pushforward = staticmethod(pushforwards.pushforward)
    pushforward_batch = staticmethod(pushforwards.pushforward_batch)
    linearize = staticmethod(pushforwards.linearize)
    steps_between = staticmethod(steps.steps_between)
    custom_gradient = staticmethod(custom_gradient)
    hoisted = staticmethod(hoisted)
    jit = staticmethod(jit)
    depends_on_values = staticmethod(depends_on_values)
    alias = staticmethod(aliases.recorded_alias)
    computed_bytes = staticmethod(memory.computed_bytes)
    free_bytes = staticmethod(memory.free_bytes)
    containers = staticmethod(containers)
    train_function = staticmethod(train_function)

    def per_example_gradients(self, fun, weights, examples, must_vectorize=False):
        return jax.vmap(jax.grad(fun, has_aux=True), in_axes=(None, 0))(weights, examples)

    def may_compile(self):
        # An active tape would not see the closed-over values in a compiled function, and could not detect that.
        return current_trace.is_eager() and not recording.active_tapes()

    def tried(self, fun):
        def without_result():
            fun()

        jax.eval_shape(without_result)

    def map_chunks(self, fun, count, chunk_size):
        if current_trace.is_eager():
            return chunks.loop(fun, count, chunk_size)
        number = -(-count // chunk_size)
        present = chunks.Present(fun)
        index = jax.numpy.arange(number * chunk_size, dtype="int32").reshape(number, chunk_size)
        mapped = jax.lax.map(present, index)
        return present.restore([x.reshape(-1, *x.shape[2:])[:count] for x in mapped])

    def slows_in_loops(self, fun):
        # On a CPU, XLA has fast convolutions only outside of loops.
        return jax.default_backend() == "cpu" and "conv_general_dilated" in jaxprs.primitives_of(fun)

    def threads(self):
        if jax.default_backend() != "cpu":
            return None
        # XLA reads this variable.
        limit = os.environ.get("NPROC", "")
        return int(limit) if limit.isdigit() and int(limit) else super().threads()

    def dot(self, a, b):
        # Double precision is off by default, and on inside this block.
        with enable_x64(True):
            double = jax.numpy.dtype("float64")
            product = jax.lax.dot(a.astype(double), b.astype(double))
            return product.astype(a.dtype)

    def dots_and_norms(self, vectors):
        with enable_x64(True):
            return super().dots_and_norms(vectors)

    def _exact_dots(self, pairs):
        with enable_x64(True):
            return super()._exact_dots(pairs)

    def _exact_products(self, matrices, vectors):
        with enable_x64(True):
            return super()._exact_products(matrices, vectors)

    def long_dot(self, a, b):
        return jax.lax.dot(a, b)

    def combination(self, factors, matrices):
        with enable_x64(True):
            return super().combination(factors, matrices)

    def has_values(self, tensor):
        return not tensor.is_deleted()

    def in_double_precision(self):
        return enable_x64(True)

    def held(self, variable):
        # Arrays are immutable.
        return variable.value

    def eagerly(self):
        return jax.ensure_compile_time_eval()

    def can_step_directly(self, model):
        # Inside of `fit`, the variables do not have the current values.
        return getattr(model, "_jax_state_synced", True) and keras.distribution.distribution() is None

    def assigns_at_once(self):
        # Keras' training step on JAX receives the state as arguments and returns it.
        return False

    def why_single_precision(self):
        if jax.dtypes.canonicalize_dtype("float64") == "float64":
            return None
        return (
            "JAX, where double precision is off by default. Set the environment variable JAX_ENABLE_X64=1, or call "
            '`jax.config.update("jax_enable_x64", True)` before anything is computed'
        )

    def spread(self, x):
        distribution = keras.distribution.distribution()
        if distribution is None or current_trace.is_traced([x]):
            return x
        layout = distribution.get_data_layout(x.shape)
        try:
            return keras.distribution.distribute_tensor(x, layout)
        except ValueError:
            # A last batch that cannot be split evenly is not distributed: each device computes all of it.
            return x
