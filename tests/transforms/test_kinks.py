"""Second derivatives that are zero because of kinks are computed as zeros, and said to be zero, once."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from keras_gradtools.transforms.taylor import kinks

X = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
PIECEWISE_LINEAR = ["relu", "relu6", "leaky_relu", "hard_sigmoid", "hard_tanh"]


def network(activation):
    return keras.Sequential(
        [keras.Input((3,)), layers.Dense(8, activation), layers.Dense(8, activation), layers.Dense(1)]
    )


def heard(call):
    """The result of `call`, and whether it warns of kinks."""
    kinks._warn.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return ops.convert_to_numpy(result), [w for w in caught if "piecewise linear" in str(w.message)]


@pytest.mark.parametrize("activation", PIECEWISE_LINEAR)
def test_a_piecewise_linear_network_is_named(activation):
    model = network(activation)
    found, said = heard(lambda: kg.laplacian(model)(X))
    np.testing.assert_array_equal(found, 0.0)
    assert len(said) == 1 and str(said[0].message).startswith("laplacian: all second derivatives are zero")
    found, said = heard(lambda: kg.partial_derivatives(model, [(0,), (1, 1)])(X)[1])
    np.testing.assert_array_equal(found, 0.0)
    assert len(said) == 1 and str(said[0].message).startswith("partial_derivatives: all second derivatives are zero")


def test_along_a_straight_line():
    """Said of `None`, not of other second derivatives of the curve, which give the result one of its own."""
    model = network("relu")
    found, said = heard(lambda: kg.jet(model, (X,), ([X, None],))[1][1])
    np.testing.assert_array_equal(found, 0.0)
    assert len(said) == 1 and str(said[0].message).startswith("jet: all second derivatives are zero")
    found, said = heard(lambda: kg.jet(model, (X,), ([X, X],))[1][1])
    assert not said and np.abs(found).max() > 0


def test_it_is_said_once():
    model = network("relu")
    _, said = heard(lambda: [kg.laplacian(model)(X), kg.laplacian(network("relu"))(X)][1])
    assert len(said) == 1


def test_first_derivatives_are_not_concerned():
    model = network("relu")
    found, said = heard(lambda: kg.partial_derivatives(model, [(0,)])(X)[0])
    assert not said and np.abs(found).max() > 0


CURVED = {
    **{name: network(name) for name in ("tanh", "gelu", "silu", "softplus", "elu")},
    "square of relu": lambda x: ops.sum(ops.relu(x) ** 2, axis=1),
    "relu after a square": lambda x: ops.sum(ops.relu(x**2), axis=1),
    "where": lambda x: ops.where(x > 0, x**2, x),
}


@pytest.mark.parametrize("name", CURVED)
def test_nothing_is_said_of_a_curved_function(name):
    found, said = heard(lambda: kg.laplacian(CURVED[name])(X))
    assert not said and np.abs(found).max() > 0


def test_nothing_is_said_of_a_linear_function():
    found, said = heard(lambda: kg.laplacian(lambda x: 2 * x)(X))
    assert not said and np.abs(found).max() == 0


def test_values_behind_kinks():
    found, _ = heard(lambda: kg.laplacian(CURVED["square of relu"])(X))
    np.testing.assert_allclose(found, 2.0 * (X > 0).sum(1), rtol=1e-6)
    found, _ = heard(lambda: kg.laplacian(lambda x: ops.max(x**2, axis=1))(X))
    np.testing.assert_allclose(found, 2.0, rtol=1e-6)


def hessian_by_weights(model, loss):
    fun, weights = kg.functionalize(model)
    y = ops.reshape(ops.linspace(-1.0, 1.0, 4), (4, 1))
    return lambda: kg.flatten_hessian(kg.hessian(lambda w: loss(fun(w, X) - y))(weights))[0]


class TestHessian:
    @pytest.mark.parametrize("activation", PIECEWISE_LINEAR)
    @pytest.mark.parametrize("chunk_size", [None, 2])
    def test_of_a_piecewise_linear_network(self, activation, chunk_size):
        model = network(activation)
        found, said = heard(lambda: kg.hessian(model, chunk_size=chunk_size)(X))
        np.testing.assert_array_equal(found, 0.0)
        assert len(said) == 1 and str(said[0].message).startswith("hessian: all second derivatives are zero")

    def test_it_is_said_once(self):
        x, models = ops.convert_to_tensor(X), [network("relu") for _ in range(3)]
        _, said = heard(lambda: [kg.hessian(model)(x) for model in models[:2] * 2][0])
        assert len(said) == 1
        _, said = heard(lambda: kg.jit(kg.hessian(models[2]))(x))
        assert len(said) == 1

    def test_by_another_argument(self):
        fun = lambda x, y: ops.sum(ops.relu(x) * y + y**2)  # noqa: E731
        y = ops.ones((3,))
        _, said = heard(lambda: kg.hessian(fun, argnums=1)(X, y))
        assert not said
        _, said = heard(lambda: kg.hessian(fun)(X, y))
        assert len(said) == 1

    def test_max_pooling(self):
        pool = layers.MaxPooling1D(2)
        found, said = heard(lambda: kg.hessian(lambda x: ops.sum(pool(x[None])))(X))
        assert len(said) == 1 and np.abs(found).max() == 0

    @pytest.mark.parametrize("name", CURVED)
    def test_nothing_is_said_of_a_curved_function(self, name):
        found, said = heard(lambda: kg.hessian(CURVED[name])(X))
        assert not said and np.abs(found).max() > 0

    def test_nothing_is_said_of_a_linear_function(self):
        found, said = heard(lambda: kg.hessian(lambda x: ops.sum(2 * x))(X))
        assert not said and np.abs(found).max() == 0

    @pytest.mark.parametrize("loss", [lambda e: ops.mean(e**2), lambda e: ops.mean(ops.abs(e))])
    def test_nothing_is_said_of_a_network_by_its_weights(self, loss):
        """The mixed derivatives by the weights of two layers are not zero, whatever the loss."""
        found, said = heard(hessian_by_weights(network("relu"), loss))
        assert not said and np.abs(found).max() > 0

    def test_the_weights_of_one_layer(self):
        model = keras.Sequential([keras.Input((3,)), layers.Dense(1, "leaky_relu")])
        found, said = heard(hessian_by_weights(model, lambda e: ops.mean(ops.abs(e))))
        assert len(said) == 1 and np.abs(found).max() == 0
        found, said = heard(hessian_by_weights(model, lambda e: ops.mean(e**2)))
        assert not said and np.abs(found).max() > 0

    def test_nothing_is_said_if_one_output_is_curved(self):
        _, said = heard(lambda: kg.hessian(lambda x: (ops.relu(x), x**2))(X)[1])
        assert not said

    def test_a_custom_gradient_is_not_judged(self):
        @kg.custom_gradient
        def curved(x):
            return ops.relu(x), lambda upstream: upstream * x

        found, said = heard(lambda: kg.hessian(lambda x: ops.sum(curved(x)))(X))
        assert not said and np.abs(found).max() > 0
