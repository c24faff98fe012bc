"""The hand-written JAX counterparts of the transforms. `jax.py` has those of the tape.

Each is the fastest of several versions: forward over reverse for products with the Hessian, the cheaper mode for
Jacobians, and chunks that fit into the cache for Hessians.
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.hand_written.jax import _apply, _weights, _with_weights
from benchmarks.models import HESSIAN_CHUNK, HESSIAN_KERNEL, direction, loss
from benchmarks.rows import with_preparation
from benchmarks.rows.curvature import batches_of


def _loss(model):
    return lambda w, x, y: loss(y, _apply(model, w, x))


def gradient_of_sum_by_inputs(model, compiler):
    return _with_weights(model, compiler(jax.grad(lambda w, x, y: jnp.sum(_apply(model, w, x)), argnums=1)))


def jacobian(model, compiler):
    return _with_weights(model, compiler(lambda w, x, y: jax.jacrev(lambda x: _apply(model, w, x))(x)))


def jacobian_of_decoder(model, compiler):
    return _with_weights(model, compiler(lambda w, x, y: jax.jacfwd(lambda x: _apply(model, w, x))(x)))


def _by_kernel(model):
    """The gradient of the loss with respect to one kernel, as a function of it, all weights, inputs and labels."""
    i = HESSIAN_KERNEL

    def value(kernel, w, x, y):
        return loss(y, _apply(model, [*w[:i], kernel, *w[i + 1 :]], x))

    return lambda kernel, w, x, y: jax.grad(value)(kernel, w, x, y)


def hessian(model, compiler):
    gradient = _by_kernel(model)
    compiled = compiler(lambda w, x, y: jax.jacfwd(gradient)(w[HESSIAN_KERNEL], w, x, y))
    return _with_weights(model, compiled)


def hessian_in_chunks(model, compiler):
    gradient = _by_kernel(model)

    def rows(w, x, y):
        kernel = w[HESSIAN_KERNEL]
        _, push = jax.linearize(lambda kernel: gradient(kernel, w, x, y), kernel)
        basis = jnp.eye(kernel.size).reshape(-1, *kernel.shape)
        return jax.lax.map(push, basis, batch_size=HESSIAN_CHUNK).reshape(*kernel.shape, *kernel.shape)

    return _with_weights(model, compiler(rows))


def hvp(model, compiler):
    v, gradient = direction(model), jax.grad(_loss(model))
    product = compiler(lambda w, v, x, y: jax.jvp(lambda w: gradient(w, x, y), (w,), (v,))[1])
    return lambda x, y: product(_weights(model), v, x, y)


def linearized_hvp(model, compiler):
    v, gradient = direction(model), jax.grad(_loss(model))

    def prepare(x, y):
        _, push = jax.linearize(lambda w: gradient(w, x, y), _weights(model))
        push = compiler(push)
        return lambda: push(v)

    return with_preparation(prepare)


def _ggn_product(model):
    def product(w, v, x, y):
        outputs, pushed = jax.jvp(lambda w: _apply(model, w, x), (w,), (v,))
        _, pullback = jax.vjp(lambda w: _apply(model, w, x), w)
        _, curved = jax.jvp(jax.grad(lambda outputs: loss(y, outputs)), (outputs,), (pushed,))
        return pullback(curved)[0]

    return product


def ggnvp(model, compiler):
    v, product = direction(model), compiler(_ggn_product(model))
    return lambda x, y: product(_weights(model), v, x, y)


def per_example_gradients(model, compiler):
    gradient = jax.grad(lambda w, x, y: loss(y[None], _apply(model, w, x[None])))
    return _with_weights(model, compiler(jax.vmap(gradient, in_axes=(None, 0, 0))))


def _over_batches(model, product):
    """The mean of a product over all examples of several batches. The sum is part of the compiled program."""
    v = direction(model)

    def add(totals, w, v, x, y):
        return jax.tree.map(lambda total, p: total + len(x) * p, totals, product(w, v, x, y))

    add = jax.jit(add)
    divide = jax.jit(lambda totals, count: jax.tree.map(lambda total: total / count, totals))

    def prepare(x, y):
        batches = batches_of(x, y)
        count = sum(len(x) for x, _ in batches)

        def run():
            totals = jax.tree.map(jnp.zeros_like, v)
            for x, y in batches:
                totals = add(totals, _weights(model), v, x, y)
            return divide(totals, count)

        return run

    return with_preparation(prepare)


def accumulated_hvp(model, compiler):
    gradient = jax.grad(_loss(model))
    return _over_batches(model, lambda w, v, x, y: jax.jvp(lambda w: gradient(w, x, y), (w,), (v,))[1])


def accumulated_ggnvp(model, compiler):
    return _over_batches(model, _ggn_product(model))


def dense_hessian(model, compiler):
    """Computes the columns of one variable after another, in chunks."""
    gradient = jax.grad(_loss(model))

    def columns(w, x, y):
        parts = []
        for i, part in enumerate(w):

            def by_part(part, i=i):
                return jnp.concatenate([g.reshape(-1) for g in gradient([*w[:i], part, *w[i + 1 :]], x, y)])

            _, push = jax.linearize(by_part, part)
            basis = jnp.eye(part.size).reshape(-1, *part.shape)
            parts.append(jax.lax.map(push, basis, batch_size=HESSIAN_CHUNK))
        return jnp.concatenate(parts)

    compiled = _with_weights(model, compiler(columns))
    return lambda x, y: np.asarray(compiled(x, y))
