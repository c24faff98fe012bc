"""The results of our transforms have the forms of JAX's own, with and without `has_aux`."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg

if keras.backend.backend() != "jax":
    pytest.skip("these are about JAX", allow_module_level=True)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

X, Y = jnp.array([1.0, 2.0]), {"a": jnp.array([3.0, 4.0]), "b": jnp.array(5.0)}


def vector(x, y):
    return {"p": x * y["a"] ** 2, "q": (ops.sum(x**3) * y["b"],)}


def scalar(x, y):
    return ops.sum(x**3 * y["a"] ** 2) * y["b"]


def with_aux(fun):
    return lambda *args: (fun(*args), {"aux": [args[0] * 2, (args[1]["b"],)]})


OURS = {
    "grad": kg.grad,
    "value_and_grad": kg.value_and_grad,
    "jacrev": lambda *a, **k: kg.jacobian(*a, mode="reverse", **k),
    "jacfwd": lambda *a, **k: kg.jacobian(*a, mode="forward", **k),
    "hessian": kg.hessian,
}


def same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("has_aux", [False, True])
@pytest.mark.parametrize("argnums", [0, 1, (0,), (1, 0), -1])
@pytest.mark.parametrize("name", OURS)
def test_transforms(name, argnums, has_aux):
    for fun in (scalar, vector) if name in ("jacrev", "jacfwd", "hessian") else (scalar,):
        fun = with_aux(fun) if has_aux else fun
        same(
            OURS[name](fun, argnums=argnums, has_aux=has_aux)(X, Y),
            getattr(jax, name)(fun, argnums=argnums, has_aux=has_aux)(X, Y),
        )


@pytest.mark.parametrize("has_aux", [False, True])
def test_products(has_aux):
    fun = with_aux(vector) if has_aux else vector
    ones = jax.tree.map(jnp.ones_like, (X, Y))
    same(kg.jvp(fun, (X, Y), ones, has_aux=has_aux), jax.jvp(fun, (X, Y), ones, has_aux=has_aux))
    for name, given in (("vjp", (jax.tree.map(jnp.ones_like, vector(X, Y)),)), ("linearize", ones)):
        ours = getattr(kg, name)(fun, X, Y, has_aux=has_aux)
        theirs = getattr(jax, name)(fun, X, Y, has_aux=has_aux)
        assert len(ours) == len(theirs) == 2 + has_aux
        same((ours[0], *ours[2:]), (theirs[0], *theirs[2:]))
        same(ours[1](*given), theirs[1](*given))


@pytest.mark.parametrize("has_aux", [False, True])
def test_gradients_of_examples(has_aux):
    def loss(w, x):
        value = jnp.sum(w["k"] * x**2)
        return (value, {"x": x, "w": w["k"]}) if has_aux else value

    w, x = {"k": X}, jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    theirs = jax.vmap(jax.grad(lambda w, x: loss(w, x[None]), has_aux=has_aux), in_axes=(None, 0))(w, x)
    same(kg.per_example_grad(loss, has_aux=has_aux)(w, x), theirs)
