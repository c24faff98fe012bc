"""Partial derivatives by name, against closed forms and nested derivatives, up to fourth order."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from tests.transforms.point_functions import attention, custom, network

RNG = np.random.default_rng(0)
X = RNG.uniform(0.5, 1.5, size=(4, 2)).astype("float32")
KEYS = [(), (0,), (1, 1), (0, 1), (0, 1, 1), (1, 1, 1, 1)]


def numbers(x):
    return ops.convert_to_numpy(ops.stop_gradient(ops.convert_to_tensor(x))).astype("float64")


def close(found, expected, rtol=1e-3, atol=1e-4):
    np.testing.assert_allclose(numbers(found), numbers(expected), rtol=rtol, atol=atol)


def nested(fun, key):
    """One derivative after the other."""

    def along(fun, variable):
        unit = np.eye(2, dtype="float32")[variable]
        return lambda x: kg.jvp(fun, (x,), (ops.broadcast_to(ops.convert_to_tensor(unit), x.shape),))[1]

    for variable in key:
        fun = along(fun, variable)
    return fun


def test_a_polynomial():
    """u = x^4 t^2."""
    t, x = X[:, :1].astype("float64"), X[:, 1:].astype("float64")
    names = {
        "u": "",
        "u_t": "t",
        "u_tt": "tt",
        "u_xt": "xt",
        "u_xxx": "xxx",
        "u_xxxx": "xxxx",
        "u_ttxx": "ttxx",
        "zero": "ttt",
    }
    found = kg.partial_derivatives(lambda x: x[:, 1:] ** 4 * x[:, :1] ** 2, names, variables="tx")(X)
    expected = {
        "u": x**4 * t**2,
        "u_t": 2 * x**4 * t,
        "u_tt": 2 * x**4,
        "u_xt": 8 * x**3 * t,
        "u_xxx": 24 * x * t**2,
        "u_xxxx": 24 * t**2,
        "u_ttxx": 24 * x**2,
        "zero": 0 * x,
    }
    assert list(found) == list(names)
    for name in names:
        close(found[name], expected[name], rtol=1e-4)


def test_arguments_of_their_own():
    """u = exp(-t) sin(2 x + y), with the space in an argument of two columns."""
    fun = lambda t, s: ops.exp(-t) * ops.sin(2 * s[:, :1] + s[:, 1:])  # noqa: E731
    t, s = X[:, :1], RNG.normal(size=(4, 2)).astype("float32")
    derivatives = kg.partial_derivatives(fun, ["t", "xx", "xy", "tyy", "xxxx"], variables="txy", argnums=(0, 1))
    value = np.exp(-t.astype("float64")) * np.sin(2 * s[:, :1] + s[:, 1:])
    for found, factor in zip(derivatives(t, s), [-1, -4, -2, 1, 16], strict=True):
        close(found, factor * value)


def custom_rules(x):
    """Rules that read the argument, the value, and a value that nothing else reads."""
    y, outside = ops.exp(x), ops.cos(x)
    sine = kg.custom_gradient(lambda x: (ops.sin(x), lambda u: u * outside))
    cube = kg.custom_gradient(lambda x: (x**3, lambda u: u * 3 * x**2))
    same = kg.custom_gradient(lambda x: (y, lambda u: u * y))
    return sine(x) * cube(x) + same(x)


FUNCTIONS = {
    **{name: network(name) for name in ("tanh", "gelu", "silu", "softplus", "sigmoid")},
    "attention": attention,
    "quotient": lambda x: ops.sum(x, axis=1, keepdims=True) * x / (1 + ops.sum(x**2, axis=1, keepdims=True)),
    "concatenated": lambda x: ops.exp(ops.concatenate([x[:, :1] * x[:, 1:], ops.ones((4, 1)), x], axis=1)),
    "custom gradient": custom,
    "custom rules": custom_rules,
    "norm": lambda x: ops.sqrt(ops.sum(x**2, axis=1)),
    "maximum": lambda x: ops.max(x**2, axis=1) ** 2,
    "constant": lambda x: ops.ones((4, 2)),
}


# Their derivatives to third order are compared in test_jet.py as well, which computes them by the same rules.
LIKE_TAYLOR_MODE = ("gelu", "silu", "softplus", "attention", "maximum")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.fast_on("torch") if n in LIKE_TAYLOR_MODE else ()) for n in FUNCTIONS]
)
def test_derivatives_are_nested_ones(name):
    fun = FUNCTIONS[name]
    found = kg.partial_derivatives(fun, KEYS)(X)
    for key, derivative in zip(KEYS, found, strict=True):
        expected = kg.jit(nested(fun, key))(ops.convert_to_tensor(X))
        close(derivative, expected)


def test_no_example():
    derivatives = kg.partial_derivatives(lambda t, x: (t + x) ** 2, ["t", "xx"], variables="tx", argnums=(0, 1))
    assert [numbers(d).shape for d in derivatives(X[:0, :1], X[:0, 1:])] == [(0, 1), (0, 1)]


def test_several_outputs():
    found = kg.partial_derivatives(lambda x: {"u": x[:, 0] ** 3, "v": (x[:, 1] * x[:, 0],)}, [(0,), (0, 1)])(X)
    close(found[0]["u"], 3 * X[:, 0] ** 2)
    close(found[1]["u"], np.zeros(4))
    close(found[0]["v"][0], X[:, 1])
    close(found[1]["v"][0], np.ones(4))


@pytest.mark.fast_on("torch")
def test_the_gradient_by_the_weights():
    model = FUNCTIONS["tanh"]

    def gradients(derivatives):
        with kg.GradientTape() as tape:
            u_t, u_xxx = derivatives(ops.convert_to_tensor(X))
            loss = ops.sum(u_t**2) + ops.sum(u_t * u_xxx)
        return tape.gradient(loss, model.trainable_variables, unconnected_gradients="zero")

    found = gradients(kg.partial_derivatives(model, [(0,), (1, 1, 1)]))
    expected = gradients(lambda x: [nested(model, key)(x) for key in ((0,), (1, 1, 1))])
    for g, e in zip(found, expected, strict=True):
        close(g, e, atol=1e-3)


def test_under_jit_and_with_other_arguments():
    fun = lambda x, scale, power=1: scale * x**power  # noqa: E731
    derivatives = kg.partial_derivatives(fun, [(0,), (1, 1)])
    for found in (derivatives(X, 3.0, power=3), kg.jit(lambda x: derivatives(x, 3.0, power=3))(X)):
        close(found[0][:, 0], 9 * X[:, 0] ** 2)
        close(found[1][:, 1], 18 * X[:, 1])


class TestLayer:
    """`kg.layers.PartialDerivatives`."""

    NAMES = {"u": "", "u_t": "t", "u_xx": "xx"}

    def test_values(self):
        model = FUNCTIONS["tanh"]
        found = kg.layers.PartialDerivatives(model, self.NAMES, variables="tx")(X)
        expected = kg.partial_derivatives(model, self.NAMES, variables="tx")(X)
        assert list(found) == list(self.NAMES)
        for name in self.NAMES:
            close(found[name], expected[name])
        for d, e in zip(
            kg.layers.PartialDerivatives(model, [(0,), (1, 1)])(X), list(expected.values())[1:], strict=True
        ):
            close(d, e)

    def test_it_trains_and_is_saved(self, tmp_path):
        """The residual u_t - u_xx is trained to zero."""
        x = keras.Input((2,))
        found = kg.layers.PartialDerivatives(network("tanh"), self.NAMES, variables="tx")(x)
        assert {name: y.shape for name, y in found.items()} == dict.fromkeys(self.NAMES, (None, 2))
        trainer = keras.Model(x, keras.layers.Subtract()([found["u_t"], found["u_xx"]]))
        trainer.compile(keras.optimizers.Adam(0.01), "mse")
        losses = trainer.fit(X, np.zeros((4, 2)), epochs=30, verbose=0).history["loss"]
        assert losses[-1] < 0.5 * losses[0]
        trainer.save(tmp_path / "trainer.keras")
        loaded = keras.saving.load_model(tmp_path / "trainer.keras")
        np.testing.assert_allclose(loaded.predict(X, verbose=0), trainer.predict(X, verbose=0), rtol=1e-5, atol=1e-6)

    def test_statistics_are_those_of_one_call(self):
        normalized = keras.Sequential([keras.Input((2,)), layers.BatchNormalization(), layers.Dense(1)])
        other = keras.models.clone_model(normalized)
        kg.layers.PartialDerivatives(normalized, [(0,)])(X, training=True)
        other(X, training=True)
        for v, w in zip(normalized.layers[0].variables, other.layers[0].variables, strict=True):
            close(v, w)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: kg.partial_derivatives("net", [(0,)]), "partial_derivatives takes a function"),
        (lambda: kg.partial_derivatives(ops.sin, []), "a list of derivatives"),
        (lambda: kg.partial_derivatives(ops.sin, ["t"]), "a tuple of numbers of variables"),
        (lambda: kg.partial_derivatives(ops.sin, ["y"], variables="tx"), "a string of the letters 'tx'"),
        (lambda: kg.partial_derivatives(ops.sin, [(2,)], variables="tx"), "numbers of variables"),
        (lambda: kg.partial_derivatives(ops.sin, ["t"], variables="tt"), "different letters"),
        (lambda: kg.partial_derivatives(ops.sin, [(2,)])(X), "numbers of variables below 2"),
        (lambda: kg.partial_derivatives(ops.sin, [(0,)])(X[0]), r"input of shape \(batch, n\)"),
        (lambda: kg.partial_derivatives(ops.sin, [(0,)], argnums=1)(X), "argnums"),
        (lambda: kg.layers.PartialDerivatives("net", [(0,)]), "PartialDerivatives expects a Keras layer or model"),
        (
            lambda: kg.layers.PartialDerivatives(layers.Identity(), [])(X),
            "PartialDerivatives expects a list of derivatives",
        ),
        (lambda: kg.layers.PartialDerivatives(layers.Identity(), [(0,)])(keras.Input((2, 3))), r"shape \(batch, n\)"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("apart", [True, False], ids=["taken apart", "nested"])
def test_several_arguments_of_several_columns(apart, monkeypatch):
    """Variables 0 and 1 are the columns of p, 2 and 3 those of q: of p0 p1^2 q0^3 sin(q1)."""
    if not apart:
        monkeypatch.setattr("keras_gradtools.backend.steps_between", lambda *args: None)
    fun = lambda p, q: p[:, 0] * p[:, 1] ** 2 * q[:, 0] ** 3 * ops.sin(q[:, 1])  # noqa: E731
    p, q = np.random.default_rng(3).uniform(0.5, 1.5, size=(2, 5, 2)).astype("float32")
    found = kg.partial_derivatives(fun, [(2,), (1, 3), (0, 2, 2)], argnums=(0, 1))(p, q)
    (a, b), (c, d) = p.T, q.T
    expected = a * b**2 * 3 * c**2 * np.sin(d), a * 2 * b * c**3 * np.cos(d), b**2 * 6 * c * np.sin(d)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(ops.convert_to_numpy(ops.stop_gradient(x)), y, rtol=1e-4)
