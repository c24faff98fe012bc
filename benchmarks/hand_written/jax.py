"""The hand-written JAX code that our code is compared with, in the style of an experienced JAX user.

Weights are arguments of a pure function. For eager input gradients, the model is called directly, which is faster than
`stateless_call`.
"""

import jax
import jax.numpy as jnp
import keras

import keras_gradtools as kg
from benchmarks.models import CLASSES, loss

# For each mode, the compiler for our code and the compiler for the hand-written code.
MODES = {
    "eager": (lambda fun: fun, lambda fun: fun),
    "fit": ("auto", lambda fun: fun),
    "compiled": (kg.jit, jax.jit),
    "self-compiled": (lambda fun: fun, jax.jit),
}
THREADS = "XLA: NPROC=1, --xla_cpu_multi_thread_eigen=false"


def use_one_thread():
    """Nothing to do: XLA reads the environment variables that `run.py` has set."""


def block(result):
    jax.block_until_ready(result)


def device():
    return jax.devices()[0].device_kind


def _weights(model):
    return [v.value for v in model.trainable_variables]


def _apply(model, weights, x):
    return model.stateless_call(weights, [v.value for v in model.non_trainable_variables], x)[0]


def _with_weights(model, compiled):
    weights = _weights(model)
    return lambda x, y: compiled(weights, x, y)


def gradient_by_weights(model, compiler):
    return _with_weights(model, compiler(jax.grad(lambda w, x, y: loss(y, _apply(model, w, x)))))


def gradient_by_inputs(model, compiler):
    if compiler is MODES["eager"][1]:
        return lambda x, y: jax.grad(lambda x: loss(y, model(x)))(x)
    return _with_weights(model, compiler(jax.grad(lambda w, x, y: loss(y, _apply(model, w, x)), argnums=1)))


def double_backward(model, compiler):
    def penalty(w, x, y):
        return jnp.sum(jnp.square(jax.grad(lambda x: loss(y, _apply(model, w, x)))(x)))

    return _with_weights(model, compiler(jax.grad(penalty)))


def batch_jacobian(model, compiler):
    """One vjp of the whole batch for each output, since the examples are independent."""

    def jacobian(w, x, y):
        logits, pullback = jax.vjp(lambda x: _apply(model, w, x), x)
        basis = jnp.broadcast_to(jnp.eye(CLASSES)[:, None], (CLASSES, *logits.shape))
        (rows,) = jax.vmap(pullback)(basis)
        return jnp.swapaxes(rows, 0, 1)

    return _with_weights(model, compiler(jacobian))


def batch_jacobian_usual(model, compiler):
    """The usual code: `vmap` of `jacrev` over the examples."""

    def jacobian(w, x, y):
        return jax.vmap(jax.jacrev(lambda one: _apply(model, w, one[None])[0]))(x)

    return _with_weights(model, compiler(jacobian))


def forward(model, compiler):
    if compiler is MODES["eager"][1]:
        return lambda x, y: model(x)
    return _with_weights(model, compiler(lambda w, x, y: _apply(model, w, x)))


def empty_tape():
    """JAX has no tape."""


_square_gradient = jax.grad(lambda x: keras.ops.multiply(x, x))


def square_gradient(x):
    return _square_gradient(x)
