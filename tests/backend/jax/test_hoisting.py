"""What does not depend on the argument of a function is computed once, before a loop, with the same results."""

import keras
import numpy as np
import pytest

if keras.backend.backend() != "jax":
    pytest.skip("needs JAX", allow_module_level=True)

import jax
import jax.numpy as jnp

from keras_gradtools.backend.jax.hoisting import hoisted

RNG = np.random.default_rng(0)
A, B = (jnp.asarray(RNG.normal(size=(5, n)), "float32") for n in (3, 4))
V = jnp.asarray(RNG.normal(size=20), "float32")


@jax.custom_jvp
def cubed(x):
    return x**3


cubed.defjvp(lambda primals, tangents: (cubed(*primals), 3 * primals[0] ** 2 * tangents[0]))


def over_rows(a, b):
    """The product that sums over the rows of both, as derivatives of a layer with respect to its weights do."""
    return jax.lax.dot_general(a, b, (((0,), (0,)), ((), ())))


FUNCTIONS = {
    "left": lambda v: over_rows(jnp.tanh(A), v.reshape(5, 4)),
    "right": lambda v: over_rows(v.reshape(5, 4), jnp.tanh(A)),
    "both vary": lambda v: over_rows(v.reshape(5, 4), v.reshape(5, 4)),
    "a program": lambda v: jax.jit(lambda x: jnp.sin(x) @ B.T)(v.reshape(5, 4)),
    "a custom derivative": lambda v: jax.jvp(cubed, (jnp.sum(A) * v,), (v,))[1],
    "a constant": lambda v: jnp.cos(B),
    "the argument": lambda v: v,
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("is_traced", [False, True])
def test_the_same_results(name, is_traced):
    fun = FUNCTIONS[name]

    def found(v):
        return hoisted(fun, jnp.zeros(20))(v)

    result = (jax.jit(found) if is_traced else found)(V)
    np.testing.assert_allclose(result, fun(V), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["left", "right"])
def test_a_loop_neither_transposes_nor_evaluates_the_rest(name):
    def found(v):
        run = hoisted(FUNCTIONS[name], v)
        return jax.lax.fori_loop(0, 3, lambda i, v: v + run(v).sum(), v)

    program = jax.make_jaxpr(found)(V)
    (loop,) = (e for e in program.jaxpr.eqns if e.primitive.name in ("while", "scan"))
    body = loop.params["jaxpr" if "jaxpr" in loop.params else "body_jaxpr"]
    (product,) = (e for e in body.jaxpr.eqns if e.primitive.name == "dot_general")
    assert product.params["dimension_numbers"] == (((1,), (0,)), ((), ()))
    assert product.invars[0].aval.shape == (3, 5)
    assert "tanh" not in {e.primitive.name for e in body.jaxpr.eqns}
