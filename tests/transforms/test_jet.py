"""Taylor mode along curves, against closed forms, nested derivatives, and JAX's own."""

import math

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from tests.cases import CASES, case_id, tensor
from tests.transforms.point_functions import attention, custom, network

RNG = np.random.default_rng(0)
X = RNG.uniform(0.5, 1.5, size=(4, 2)).astype("float32")
SERIES = [RNG.normal(size=(4, 2)).astype("float32") for _ in range(4)]


def numbers(x):
    return ops.convert_to_numpy(ops.stop_gradient(ops.convert_to_tensor(x))).astype("float64")


def close(found, expected, tolerance=1e-4):
    found, expected = numbers(found), numbers(expected)
    assert found.shape == expected.shape
    np.testing.assert_allclose(
        found, expected, rtol=tolerance, atol=tolerance * max(1, np.abs(expected).max(initial=0))
    )


def nested(fun, primals, series):
    """The derivatives of `fun` along the curve, one after the other."""

    def point(x, by_order, t):
        return tensor(x) + sum(t**k / math.factorial(k) * tensor(v) for k, v in enumerate(by_order, 1))

    def along(t):
        return fun(*(point(x, by_order, t) for x, by_order in zip(primals, series, strict=True)))

    def derivative(fun):
        return lambda t: kg.jvp(fun, (t,), (ops.ones_like(t),))[1]

    found = [along]
    for _ in series[0]:
        found.append(derivative(found[-1]))
    value, *derivatives = kg.jit(lambda t: [f(t) for f in found])(tensor(0.0))
    return value, derivatives


class TestClosedForms:
    def test_exp_along_a_line(self):
        """The k-th derivative of exp(x + a t) is a^k exp(x)."""
        out, derivatives = kg.jet(ops.exp, (0.5,), ([2.0, None, None, None, None],))
        close(out, np.exp(0.5))
        for k, d in enumerate(derivatives, 1):
            close(d, 2.0**k * np.exp(0.5))

    def test_sin_of_a_cube(self):
        """sin(z^3) at 0.5, the example of JAX's documentation."""
        z = 0.5
        h, h1, h2, h3 = z**3, 3 * z**2, 6 * z, 6.0
        out, (d1, d2, d3) = kg.jet(ops.sin, (h,), ([h1, h2, h3],))
        close(out, np.sin(h))
        close(d1, np.cos(h) * h1)
        close(d2, np.cos(h) * h2 - np.sin(h) * h1**2)
        close(d3, np.cos(h) * h3 - 3 * np.sin(h) * h1 * h2 - np.cos(h) * h1**3)

    def test_a_product_of_polynomials(self):
        """x(t) y(t) with x = 1 + 2 t + 3 t^2 and y = 2 - t + t^3."""
        product = np.polynomial.Polynomial([1, 2, 3]) * np.polynomial.Polynomial([2, -1, 0, 1])
        out, derivatives = kg.jet(lambda x, y: x * y, (1.0, 2.0), ([2.0, 6.0, None, None, 0.0], [-1.0, 0.0, 6.0, 0, 0]))
        close(out, product(0))
        for k, d in enumerate(derivatives, 1):
            close(d, product.deriv(k)(0))

    @pytest.mark.parametrize("order", [1, 2, 5, 7])
    def test_a_power_along_a_curve(self, order):
        """x^5 with x = 1 + t + t^2, a vector with another factor in each entry."""
        curve, factors = np.polynomial.Polynomial([1.0, 1.0, 1.0]), np.array([1.0, -0.5])
        series = [factors * curve.deriv(k)(0) for k in range(1, order + 1)]
        out, derivatives = kg.jet(lambda x: x**5, (tensor(factors),), ([tensor(s) for s in series],))
        power = curve**5
        close(out, factors**5)
        for k, d in enumerate(derivatives, 1):
            close(d, factors**5 * power.deriv(k)(0))

    def test_tenth_order(self):
        """The derivatives of tanh at 0: the tangent numbers with signs."""
        _, derivatives = kg.jet(ops.tanh, (0.0,), ([1.0] + 9 * [None],))
        close(ops.stack(derivatives), [1, 0, -2, 0, 16, 0, -272, 0, 7936, 0])


def normalized(x):
    return layers.LayerNormalization()(x) * x


FUNCTIONS = {
    **{name: network(name) for name in ("tanh", "gelu", "silu", "softplus", "sigmoid")},
    "attention": attention,
    "quotient": lambda x: ops.sum(x, axis=1, keepdims=True) * x / (1 + ops.sum(x**2)),
    "other ranks": lambda x: ops.outer(x[0], ops.exp(x[:, 0])) * x[0, 0] + ops.sum(x[1:2], axis=0)[:, None],
    "other sizes": lambda x: ops.concatenate([x[:1] ** 2, x[1:] * x[:1]], axis=0),
    "custom gradient": custom,
    "norm": ops.norm,
    "maximum": lambda x: ops.max(x**2, axis=1) ** 2,
    "determinant": lambda x: ops.det(x[:2]) * ops.log(ops.abs(x)),
    "where": lambda x: ops.where(x > 1, x**3, ops.sqrt(x)),
    "loop": lambda x: ops.fori_loop(0, 3, lambda i, y: ops.sin(y) * x, x),
    "constant": lambda x: ops.ones((4, 2)),
}


# Nested derivatives of fourth order take long to compile on TensorFlow.
FOURTH = ("tanh", "quotient")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_are_nested_ones(name):
    fun, order = FUNCTIONS[name], 4 if name in FOURTH else 3 if "loop" not in name else 2
    out, found = kg.jet(fun, (X,), (SERIES[:order],))
    value, expected = nested(fun, (X,), (SERIES[:order],))
    close(out, value)
    assert isinstance(found, tuple) and len(found) == order
    for k, (d, e) in enumerate(zip(found, expected, strict=True)):
        close(d, e, tolerance=2e-4 * 3**k)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_second_order_of_operations(case):
    """On arguments of any rank, scalars included, which need no batch."""
    rng = np.random.default_rng(2)
    primals = tuple(tensor(x) for x in case.inputs)
    series = tuple([tensor(rng.normal(size=x.shape)) for _ in range(2)] for x in case.inputs)
    out, found = kg.jet(case.fun, primals, series)
    value, expected = nested(case.fun, primals, series)
    close(out, value)
    for d, e in zip(found, expected, strict=True):
        close(d, e, tolerance=2e-3)


def test_parts_of_other_lengths_and_orders():
    """The first entry alone has a second derivative of its own."""

    def fun(x, y):
        return ops.concatenate([x, 3 * y], axis=0)

    x, y = tensor([[1.0]]), tensor([[1.0], [2.0]])
    _, (d1, d2) = kg.jet(fun, (x, y), ([None, 5 * x], [y, None]))
    close(d1, [[0.0], [3.0], [6.0]])
    close(d2, [[5.0], [0.0], [0.0]])


def test_what_cannot_be_taken_apart():
    """A function that torch and TensorFlow do not show in parts: the derivatives are nested ones."""

    def fun(x):
        return {"u": kg.custom_gradient(lambda x: (ops.sin(x), lambda u: u * ops.cos(x)))(x) * x, "n": 3, "one": 1.0}

    x, (x1, x2) = X.astype("float64"), SERIES[:2]
    for jet in (kg.jet, kg.jit(lambda *args: kg.jet(fun, *args[1:]))):
        out, (d1, d2) = jet(fun, (X,), (SERIES[:2],))
        close(out["u"], np.sin(x) * x)
        slope, second = np.cos(x) * x + np.sin(x), 2 * np.cos(x) - np.sin(x) * x
        close(d1["u"], slope * x1)
        close(d2["u"], slope * x2 + second * x1**2)
        assert d1["n"] is None and d2["n"] is None
        close(d2["one"], 0.0)


class TestStructures:
    def test_arguments_and_outputs(self):
        def fun(p, scale):
            return {"a": p["w"] ** 2 * scale, "b": (p["count"], p["other"])}

        p = {"w": np.array([1.0, 2.0], "float32"), "count": 3, "other": 4.0}
        terms = [{"w": np.array([1.0, 1.0]), "count": None, "other": None}, None]
        out, (d1, d2) = kg.jet(fun, (p, 2.0), (terms, [1.0, None]))
        close(out["a"], [2.0, 8.0])
        assert int(out["b"][0]) == 3
        close(d1["a"], [5.0, 12.0])
        close(d2["a"], [8.0, 12.0])  # w^2 s: 2 w1^2 s + 4 w w1 s1
        assert d1["b"][0] is None and d2["b"][0] is None
        close(d1["b"][1], 0.0)

    def test_none_for_an_argument(self):
        _, (d1, d2) = kg.jet(lambda x, y: x * x * y, (3.0, 2.0), ([1.0, 0.0], None))
        close(d1, 12.0)
        close(d2, 4.0)

    def test_unconnected_outputs(self):
        out, derivatives = kg.jet(lambda x: (x, tensor([1.0, 2.0])), (2.0,), ([1.0, 3.0, 0.5],))
        for d, e in zip(derivatives, [1.0, 3.0, 0.5], strict=True):
            close(d[0], e)
            close(d[1], [0.0, 0.0])

    def test_a_variable_and_the_same_tensor_twice(self):
        v = keras.Variable(3.0)
        _, (d1, d2) = kg.jet(lambda a, b: a * b, (v, v), ([1.0, 0.0], [0.0, 1.0]))
        close(d1, 3.0)
        close(d2, 3.0)

    @pytest.mark.parametrize("dtype", ["float16", "float64"])
    def test_dtypes(self, dtype):
        x = tensor([1.0, 2.0], dtype)
        out, derivatives = kg.jet(lambda x: x**3, (x,), ([np.ones(2), None],))
        assert [d.dtype for d in derivatives] == [x.dtype, x.dtype] and out.dtype == x.dtype
        close(derivatives[1], [6.0, 12.0], 1e-3)


class TestComposition:
    @pytest.mark.parametrize("wrap", [lambda f: f, kg.jit])
    def test_the_gradient(self, wrap):
        """d/dx of the second derivative of x^5 along a line: 60 x^2."""
        second = lambda x: kg.jet(lambda x: x**5, (x,), ([1.0, None],))[1][1]  # noqa: E731
        close(wrap(kg.grad(second))(2.0), 240.0)
        close(wrap(kg.grad(kg.grad(second)))(2.0), 240.0)

    def test_the_gradient_by_the_series(self):
        """The second derivative of exp is exp(x) (x1^2 + x2)."""
        by_1, by_2 = kg.grad(lambda *terms: kg.jet(ops.exp, (0.5,), (terms,))[1][1], argnums=(0, 1))(3.0, 4.0)
        close(by_1, 6 * np.exp(0.5))
        close(by_2, np.exp(0.5))

    def test_jet_of_a_gradient_and_of_a_jet(self):
        close(kg.jet(kg.grad(lambda x: x**5), (2.0,), ([1.0, None],))[1][1], 240.0)
        inner = lambda x: kg.jet(lambda x: x**5, (x,), ([1.0, None],))[1][1]  # noqa: E731
        close(kg.jet(inner, (2.0,), ([1.0, None],))[1][1], 240.0)

    def test_the_gradient_by_the_weights(self):
        model = FUNCTIONS["tanh"]

        def gradients(derivatives):
            with kg.GradientTape() as tape:
                _, (d1, d2, d3) = derivatives(model, (X,), (SERIES[:3],))
                loss = ops.sum(d1 * d3) + ops.sum(d2**2)
            return tape.gradient(loss, model.trainable_variables, unconnected_gradients="zero")

        for g, e in zip(gradients(kg.jet), gradients(nested), strict=True):
            close(g, e, 1e-3)

    def test_under_jit(self):
        model = FUNCTIONS["gelu"]
        found = kg.jit(lambda x, *terms: kg.jet(model, (x,), (terms,)))(X, *SERIES[:2])
        expected = kg.jet(model, (X,), (SERIES[:2],))
        close(found[0], expected[0])
        for d, e in zip(found[1], expected[1], strict=True):
            close(d, e)

    def test_new_weights_are_seen(self):
        model = network("tanh")
        before = kg.jet(model, (X,), (SERIES[:2],))[1][1]
        model.layers[-1].kernel.assign(2 * model.layers[-1].kernel)
        close(kg.jet(model, (X,), (SERIES[:2],))[1][1], 2 * numbers(before))


def test_state_is_kept():
    """In training mode, with the statistics of the batch and dropout."""
    model = network("tanh", layers.BatchNormalization(), layers.Dropout(0.5, seed=3))
    before = [numbers(v) for v in model.non_trainable_variables]
    _, derivatives = kg.jet(lambda x: model(x, training=True), (X,), (SERIES[:2],))
    assert all(np.isfinite(numbers(d)).all() and np.abs(numbers(d)).max() > 0 for d in derivatives)
    for v, b in zip(model.non_trainable_variables, before, strict=True):
        np.testing.assert_array_equal(numbers(v), b)


@pytest.mark.skipif(keras.config.backend() != "jax", reason="only JAX has a Taylor mode of its own")
@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_as_jax(activation):
    from jax.experimental.jet import jet

    model = FUNCTIONS[activation]
    weights = [np.asarray(v) for v in model.trainable_variables]
    function = {"tanh": ops.tanh, "sigmoid": lambda x: 1 / (1 + ops.exp(-x))}[activation]

    def fun(x):
        for kernel, bias in zip(weights[::2], weights[1::2], strict=True):
            y = ops.matmul(x, kernel) + bias
            x = function(y)
        return y

    out, found = kg.jet(model, (X,), (SERIES,))
    value, expected = jet(fun, (ops.convert_to_tensor(X),), ([ops.convert_to_tensor(s) for s in SERIES],))
    close(out, value)
    for d, e in zip(found, expected, strict=True):
        close(d, e, 1e-3)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: kg.jet("net", (X,), ([X],)), "jet takes a function"),
        (lambda: kg.jet(ops.sin, X, ([X],)), "primals of `jet` must be a tuple"),
        (lambda: kg.jet(ops.sin, (X,), X), "a tuple with one list of derivatives for each argument, 1 in all.*float32"),
        (lambda: kg.jet(ops.sin, (X,), (X, X)), r"1 in all, as `series`. Received: tuple of length 2.*\[x1, x2\]"),
        (lambda: kg.jet(ops.sin, (X,), (X,)), "a list of derivatives, or None, for each argument.*float32"),
        (lambda: kg.jet(ops.sin, (X,), ([],)), r"the same length, at least 1, in `series`. Received.*\(0,\)"),
        (lambda: kg.jet(ops.sin, (X,), (None,)), r"lists of length \(None,\)"),
        (lambda: kg.jet(ops.add, (X, X), ([X], [X, X])), r"lists of length \(1, 2\)"),
        (lambda: kg.jet(ops.sin, (X,), ([X, X[0]],)), r"`series` at order 2 must have the shape.*\(4, 2\).*\(2,\)"),
        (lambda: kg.jet(ops.sin, (X,), ([X, {"a": X}],)), "`series` at order 2 must have the structure of `primals`"),
        (lambda: kg.jet(ops.sin, (X,), ([1j * X],)), "`series` at order 1 must be real"),
        (lambda: kg.jet(ops.sin, (X,), (["up"],)), "`series` at order 1 must be a tensor, an array or a number"),
        (lambda: kg.jet(ops.sin, (3,), ([1.0],)), "Argument 0 under `jet`"),
        (lambda: kg.jet(lambda n, x: x * n, (3, 1.0), ([1.0], [1.0])), "Argument 0 under `jet`"),
        (lambda: kg.jet(lambda x: None, (X,), ([X],)), "What the function under `jet` returns"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


ELEMENTWISE = {
    "cos": np.cos,
    "cosh": np.cosh,
    "exp": np.exp,
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    "sin": np.sin,
    "sinh": np.sinh,
    "square": np.square,
    "tanh": np.tanh,
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_functions_to_order_8(name):
    """Against Cauchy's integral over a circle in the complex plane."""
    x, radius, order = np.array([-0.7, 0.2, 1.1], "float32"), 0.6, 8
    circle = radius * np.exp(2j * np.pi * np.arange(64) / 64)
    around = ELEMENTWISE[name](x[:, None] + circle)
    fun = getattr(ops, name)
    _, found = kg.jet(lambda x: fun(x), (ops.convert_to_tensor(x),), ([ops.ones((3,)), *[None] * (order - 1)],))
    for k, derivative in enumerate(found, 1):
        expected = math.factorial(k) * np.mean(around / circle**k, axis=1).real
        # The polynomials by which high derivatives of tanh and of the sigmoid are computed have large coefficients.
        rounding = 1e-6 * math.factorial(k)
        np.testing.assert_allclose(ops.convert_to_numpy(derivative), expected, rtol=1e-3, atol=rounding)
