"""The checks of derivatives: they pass what is right, and say where a derivative is wrong and by how much."""

import re

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from keras_gradtools import finite_differences, testing
from tests.cases import CASES, case_id, tensor
from tests.containers import CONTAINERS

# What takes longer is tried on these.
SOME_CASES = [case for case in CASES if case.name in ("rosenbrock", "logsumexp", "einsum", "sigmoid")]
X = np.array([0.3, -1.2, 2.0])
MATRIX = np.random.default_rng(0).normal(size=(3, 3))


def sine(factors):
    """The sine, with a gradient that is wrong by these factors."""
    return kg.custom_gradient(
        lambda x: (ops.sin(x), lambda upstream: upstream * ops.cos(x) * ops.cast(factors, x.dtype))
    )


# The first derivative is right, and its own derivative is not.
cube_with_constant_slope = kg.custom_gradient(
    lambda x: (x**3, lambda upstream: upstream * 3 * ops.stop_gradient(x) ** 2)
)


def failure(check, *args, **kwargs):
    with pytest.raises(AssertionError) as caught:
        check(*args, **kwargs)
    return str(caught.value)


def numbers(message):
    """What the message says: our value, that of the differences, the difference and the tolerance."""
    found = re.search(
        r"keras_gradtools: +(\S+)\n +central differences: +(\S+).*\n +difference: +(\S+), tolerance (\S+) ", message
    )
    return [float(x) for x in found.groups()]


def state_of(model):
    return [np.array(ops.convert_to_numpy(v.value)) for v in model.variables]


class TestRight:
    @pytest.mark.parametrize("case", CASES, ids=case_id)
    def test_first_derivatives_pass(self, case):
        assert testing.check_gradients(case.fun, tuple(map(tensor, case.inputs)), order=1) is None

    @pytest.mark.parametrize("case", SOME_CASES, ids=case_id)
    def test_second_derivatives_pass(self, case):
        assert testing.check_gradients(case.fun, tuple(map(tensor, case.inputs)), order=2) is None

    @pytest.mark.parametrize("case", SOME_CASES, ids=case_id)
    def test_products_with_the_hessian_pass(self, case):
        assert testing.check_hvp(lambda *x: ops.sum(case.fun(*x)), tuple(map(tensor, case.inputs))) is None

    def test_third_order(self):
        testing.check_gradients(lambda x, y: x * x * x * y, (2.0, 3.0), order=3, modes=("forward",))

    def test_arguments_of_every_kind_in_any_nesting(self):
        def fun(p, scale):
            return [ops.tanh(p["w"] * p["b"][0]), {"sum": ops.sum(p["w"]) * scale}]

        p = {"w": X.astype("float32"), "b": [keras.Variable(0.7)]}
        testing.check_gradients(fun, (p, 1.5), modes=("reverse",))
        testing.check_jvp(fun, (p, 1.5), ({"w": None, "b": [1.0]}, np.float32(2)))

    @pytest.mark.parametrize("container", CONTAINERS, ids=lambda c: c.name)
    def test_constants_in_every_container(self, container):
        def fun(p):
            w, other = container.parts(p)
            return container.make(ops.tanh(w) * ops.cast(other["step"], w.dtype), {"none": other["none"], "n": 3})

        p = container.make(tensor(X), {"step": tensor(2, "int32"), "none": None, "name": "adam"})
        testing.check_gradients(fun, (p,))
        testing.check_jvp(fun, (p,), (container.make(X, None),))
        testing.check_hvp(lambda p: ops.sum(container.parts(fun(p))[0]), (p,))

    def test_a_model_in_training_mode_keeps_its_state(self):
        dropout = keras.layers.Dropout(0.5, seed=1)
        dense = keras.layers.Dense(2, activation="tanh")
        model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(), dropout, dense])
        x = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
        before, random = state_of(model), np.random.get_state()[1].copy()

        testing.check_vjp(lambda x: model(x, training=True), (x,))
        testing.check_hvp(lambda x: ops.mean(model(x, training=True) ** 2), (x,))

        for old, new in zip(before, state_of(model), strict=True):
            np.testing.assert_array_equal(old, new)
        np.testing.assert_array_equal(random, np.random.get_state()[1])
        assert np.isfinite(model.predict(x, verbose=0)).all()

    @pytest.mark.parametrize(
        "fun, x",
        [
            (lambda x: ops.sum((x - ops.mean(x)) / ops.std(x)), np.random.default_rng(0).normal(size=20)),
            (lambda x: ops.sum(1000 + x) - ops.sum(1000 * ops.ones_like(x)), X),
            (lambda x: ops.sin(50 * x), X),
            (lambda x: 1e-6 * ops.sin(x), X),
            (lambda x: 1000 + 1000 * ops.tanh(x), X),
            (lambda x: x * x, 1000 * X),
            (lambda x: ops.log(x), np.array([1e-3])),
        ],
        ids=["zero", "cancellation", "fast", "tiny", "large", "far", "edge"],
    )
    def test_values_of_every_scale(self, fun, x):
        testing.check_gradients(fun, (tensor(x),), order=1)

    # One seed for each size; the others take half a minute on JAX.
    @pytest.mark.parametrize(
        ("size", "seed"),
        [
            pytest.param(size, seed, marks=[] if seed == k else pytest.mark.slow)
            for k, size in enumerate([1e-3, 0.02, 1.0, 100.0])
            for seed in range(5)
        ],
    )
    def test_second_derivatives_at_every_scale(self, size, seed):
        random = np.random.default_rng(seed)
        layer = keras.layers.LayerNormalization(epsilon=1e-6)
        x, c = tensor(size * random.normal(size=(3, 8))), tensor(random.normal(size=(3, 8)))
        layer.build((3, 8))

        def fun(x):
            return ops.sum(layer(x) * c)

        def off(x):
            # The gradient is right, and its derivative off by a tenth.
            right = kg.grad(fun)(x)
            return 0.9 * right + 0.1 * ops.stop_gradient(right)

        testing.check_hvp(fun, (x,), seed=seed)
        wrong = kg.custom_gradient(lambda x: (fun(x), lambda upstream: upstream * off(x)))
        failure(testing.check_hvp, wrong, (x,), seed=seed)

    @pytest.mark.parametrize("size", [1e-6, 1e6])
    def test_a_direction_of_another_size(self, size):
        testing.check_jvp(lambda x: ops.sin(x) * x, (tensor(X),), (tensor(size * np.ones(3)),))
        failure(testing.check_jvp, sine(1.05), (tensor(X),), (tensor(size * np.ones(3)),))

    def test_arguments_of_different_sizes(self):
        x = (tensor(1e-3 * X), tensor(1e3 * X), tensor(np.zeros(3)))
        testing.check_hvp(lambda a, b, c: ops.sum(ops.tanh(1e3 * a) * ops.sin(1e-3 * b) + ops.exp(c) * a), x)

    def test_a_minimum_of_zero(self):
        testing.check_gradients(CASES[0].fun, (tensor(np.ones(2)),))

    def test_an_argument_without_influence(self):
        testing.check_gradients(lambda x, y: x * x, (3.0, X.astype("float32")))

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_half_precision(self, dtype):
        testing.check_gradients(sine(1), (tensor(X, dtype),), order=1)
        failure(testing.check_vjp, sine(3), (tensor(X, dtype),))


class TestWrong:
    def test_reverse_mode_names_the_element_of_the_argument(self):
        factors = np.ones((2, 3))
        factors[1, 2] = 1.05
        w = np.full((2, 3), 0.5, "float32")
        message = failure(testing.check_vjp, lambda p: ops.sum(sine(factors)(p["w"][1])), ({"v": 2.0, "w": [w, w]},))
        assert message.startswith("check_vjp: the derivative of order 1 (reverse mode) is wrong")
        assert "\nWorst: argument 0['w'][1], element (1, 2)\n" in message
        assert "1 of 7" not in message and "(1 of 13 compared are wrong)" in message
        ours, differences, difference, tolerance = numbers(message)
        # The cotangent is random.
        assert ours / differences == pytest.approx(1.05, rel=1e-4)
        assert abs(differences / np.cos(0.5)) >= 0.125
        assert difference == pytest.approx(abs(ours - differences), rel=1e-2)
        assert tolerance < 0.1 * difference

    def test_forward_mode_names_the_element_of_the_output(self):
        message = failure(
            testing.check_jvp,
            lambda x: [x, {"y": sine([1, 1.05, 1])(x)}],
            (tensor(X),),
            (np.array([1.0, 2.0, 3.0], "float32"),),
        )
        assert message.startswith("check_jvp: the derivative of order 1 (forward mode) is wrong")
        assert "\nWorst: output[1]['y'], element (1,)\n" in message
        ours, differences, difference, _ = numbers(message)
        assert ours == pytest.approx(1.05 * 2 * np.cos(-1.2), rel=1e-5)
        assert differences == pytest.approx(2 * np.cos(-1.2), rel=1e-4)
        assert difference == pytest.approx(0.05 * 2 * np.cos(-1.2), rel=1e-2)

    def test_the_first_element_of_a_later_argument(self):
        message = failure(testing.check_vjp, lambda x, y: ops.sum(x) + sine(1.05)(y), (tensor(X), 0.5))
        assert "Worst: argument 1, element ()" in message

    def test_no_tangent_is_zero(self):
        message = failure(testing.check_jvp, lambda x, y: sine(1.05)(x) + 100 * y, (0.5, 2.0), (1.0, None))
        assert numbers(message)[0] == pytest.approx(1.05 * np.cos(0.5), rel=1e-5)

    @pytest.mark.parametrize("factor", [0.99, 1.01])
    @pytest.mark.parametrize("check", [testing.check_jvp, testing.check_vjp])
    def test_one_per_cent_is_found(self, check, factor):
        check(sine(1), (tensor(X),))
        failure(check, sine([1, factor, 1]), (tensor(X),))

    def test_one_element_of_many_is_found(self):
        factors = np.ones(1000)
        factors[617] = 30
        x = tensor(np.linspace(-1, 1, 1000))
        testing.check_vjp(lambda x: ops.sum(sine(np.ones(1000))(x)), (x,))
        message = failure(testing.check_vjp, lambda x: ops.sum(sine(factors)(x)), (x,))
        assert "argument 0, element (617,)" in message
        ours, differences, *_ = numbers(message)
        assert ours / differences == pytest.approx(30, rel=1e-3)

    def test_many_elements_each_too_small_to_tell(self):
        small = kg.custom_gradient(lambda x: (0.01 * x, lambda upstream: 0.03 * upstream))
        message = failure(testing.check_vjp, lambda x: 1000 + ops.sum(small(x)), (np.zeros(1000, "float32"),))
        assert "Worst: the whole gradient, along a random direction" in message
        ours, differences, *_ = numbers(message)
        assert ours / differences == pytest.approx(3, rel=0.1)

    def test_second_order(self):
        testing.check_gradients(cube_with_constant_slope, (2.0,), order=1)
        for modes, what in {
            ("forward",): "forward mode of forward mode",
            ("reverse",): "reverse mode of reverse mode",
            ("reverse", "forward"): "reverse mode of reverse mode",
            ("forward", "reverse"): "forward mode of forward mode",
        }.items():
            message = failure(testing.check_gradients, cube_with_constant_slope, (2.0,), modes=modes)
            assert message.startswith(f"check_gradients: the derivative of order 2 ({what}) is wrong")
            assert numbers(message)[0] == 0
        message = failure(
            testing.check_gradients,
            lambda p: {"y": cube_with_constant_slope(p["a"])},
            ({"a": 2.0},),
            modes=("reverse", "forward"),
        )
        assert "Worst: argument 0['a'], element ()" in message

    def test_second_order_names_the_gradient(self):
        # The pullback is differentiated in forward mode, so that its output is named.
        point = finite_differences.Point(
            finite_differences.Settings.of("check", None, None, None, 0),
            lambda p: kg.vjp(lambda q: cube_with_constant_slope(q["a"]), p)[1](1.0),
            ({"a": 2.0},),
            finite_differences.GRADIENT,
        )
        message = failure(testing._check_forward, point, np.ones(1), "order 2")
        assert "Worst: gradient by argument 0['a'], element ()" in message

    def test_third_order(self):
        def fun(x):
            return kg.custom_gradient(lambda x: (x**4, lambda upstream: upstream * 4 * cube_with_constant_slope(x)))(x)

        testing.check_gradients(fun, (2.0,), order=2, modes=("reverse",))
        message = failure(testing.check_gradients, fun, (2.0,), order=3, modes=("reverse",))
        assert "order 3 (reverse mode of reverse mode of reverse mode)" in message

    def test_product_with_the_hessian(self):
        message = failure(testing.check_hvp, lambda p: cube_with_constant_slope(p["a"]), ({"a": 2.0},), ({"a": 10.0},))
        assert message.startswith("check_hvp: the derivative of order 2 (hvp) is wrong")
        assert "gradient by argument 0['a'], element ()" in message
        ours, differences, *_ = numbers(message)
        assert ours == 0 and differences == pytest.approx(120, rel=1e-4)

    def test_hessian_that_is_not_symmetric(self, monkeypatch):
        a = np.array([[1.0, 2.0], [0.0, 1.0]])
        fun = kg.custom_gradient(lambda x: (ops.sum(x), lambda upstream: upstream * ops.matmul(tensor(a), x)))
        # Which of A v and A' v an `hvp` gives is its own choice; this one agrees with the differences.
        monkeypatch.setattr(testing, "hvp", lambda fun, primals, tangents: (ops.matmul(tensor(a), tangents[0]),))
        message = failure(testing.check_hvp, fun, (tensor([1.0, 2.0]),))
        assert "order 2 (hvp, symmetry)" in message and "Worst: <u, H v>, which is not <v, H u>" in message

    def test_a_kink(self):
        def fun(x):
            return ops.abs(x - 0.5)

        testing.check_jvp(fun, (0.51,), (1.0,))
        message = failure(testing.check_jvp, fun, (0.5001,), (1.0,))
        assert numbers(message)[0] == 1 and numbers(message)[1] < 0.5
        assert "a `stop_gradient`, a `round`, or a kink" in message

    def test_nan(self):
        message = failure(testing.check_jvp, ops.sqrt, (0.0,))
        assert "nan" in message


class TestOptions:
    def test_tolerances(self):
        wrong = sine(1.05)
        testing.check_gradients(wrong, (0.5,), order=1, rtol=0.1)
        testing.check_gradients(wrong, (0.5,), order=1, atol=0.2)
        failure(testing.check_vjp, sine(1), (0.5,), rtol=0, atol=0)

    def test_step(self):
        far = {"step": 0.5, "atol": 1e-4, "rtol": 0}
        # The error of the stencil, h^4 f''''' / 30, with h = 1/2 and f''''' = 120.
        ours, differences, *_ = numbers(failure(testing.check_jvp, lambda x: x**5, (1.0,), (1.0,), **far))
        assert ours == pytest.approx(5) and differences - ours == pytest.approx(-4 * 0.5**4, rel=1e-4)
        testing.check_jvp(lambda x: x**4, (1.0,), (1.0,), **far)

    def test_seed(self):
        def message(seed):
            return failure(testing.check_jvp, sine(1.05), (tensor(X),), seed=seed)

        assert message(1) == message(1) != message(2)


@pytest.mark.float64
class TestDoublePrecision:
    @pytest.fixture(autouse=True)
    def floatx(self):
        before = keras.config.floatx()
        keras.config.set_floatx("float64")
        yield
        keras.config.set_floatx(before)

    # Keras computes some functions in single precision all the same (the sine on JAX, products of matrices on torch).
    @pytest.mark.parametrize(
        "fun", [lambda x: x * x * x, ops.sin, lambda x: x * ops.matmul(MATRIX, x[:3])[0], lambda x: x - ops.mean(x)]
    )
    def test_right(self, fun):
        x = tensor(np.random.default_rng(5).normal(size=20), "float64")
        testing.check_gradients(lambda x: ops.sum(fun(x)), (x,), modes=("reverse",))

    def test_a_small_mistake_is_found(self):
        def cube(factors):
            factors = tensor(factors, "float64")
            return kg.custom_gradient(lambda x: (x * x * x, lambda upstream: upstream * 3 * x * x * factors))

        testing.check_gradients(cube([1, 1, 1]), (tensor(X, "float64"),))
        message = failure(testing.check_vjp, cube([1, 1, 1 + 1e-5]), (tensor(X, "float64"),))
        assert "argument 0, element (2,)" in message


def unrepeatable(x, random=np.random.default_rng(0)):  # noqa: B008
    return x * random.normal()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: testing.check_jvp(3, (1.0,)), "check_jvp takes a function. Received: 3"),
        (lambda: testing.check_vjp(3, (1.0,)), "check_vjp takes a function. Received: 3"),
        (lambda: testing.check_gradients(3, (1.0,)), "check_gradients takes a function. Received: 3"),
        (lambda: testing.check_hvp(3, (1.0,)), "check_hvp takes a function. Received: 3"),
        (lambda: testing.check_jvp(ops.sin, 1.0), "primals of `check_jvp` must be a tuple.*Received: 1.0"),
        (lambda: testing.check_jvp(ops.sin, (1.0,), 1.0), "tangents of `check_jvp` must be a tuple.*Received: 1.0"),
        (lambda: testing.check_jvp(ops.sin, (1.0,), (1.0, 2.0)), "tangents must have the structure of `primals`"),
        (lambda: testing.check_jvp(ops.sin, (1.0,), (X,)), "tangents must have the shape of.*Received: .*\\(3,\\)"),
        (lambda: testing.check_vjp(ops.sin, ({"a": [1]},)), "argument 0\\['a'\\]\\[0\\] of the function.*Received: 1 "),
        (lambda: testing.check_vjp(ops.sin, (None,)), "argument 0 of the function under `check_vjp`.*Received: None"),
        (lambda: testing.check_vjp(lambda x: {"a": "b"}, (1.0,)), "output\\['a'\\] of the function under.*'b'"),
        (lambda: testing.check_vjp(lambda: tensor(1.0), ()), "something to compare. Received: 0 elements"),
        (lambda: testing.check_vjp(lambda x: x[:0], (tensor(X),)), "something to compare.*3 elements.*and 0 in"),
        (
            lambda: testing.check_jvp(unrepeatable, (1.0,)),
            "same finite values when it is called again.*output, element",
        ),
        (
            lambda: testing.check_jvp(ops.log, (-1.0,)),
            "same finite values.*Received: nan and nan.*Choose another point",
        ),
        (lambda: testing.check_gradients(ops.sin, (1.0,), order=4), "expects 1, 2 or 3 as `order`. Received: order=4"),
        (lambda: testing.check_gradients(ops.sin, (1.0,), order=True), "Received: order=True"),
        (lambda: testing.check_gradients(ops.sin, (1.0,), modes="reverse"), "as `modes`. Received: modes='reverse'"),
        (lambda: testing.check_gradients(ops.sin, (1.0,), modes=("rev",)), "Received: modes=\\('rev',\\)"),
        (
            lambda: testing.check_jvp(ops.sin, (1.0,), rtol=-1),
            "check_jvp expects a number of 0 or more, or None, as `rtol`.*rtol=-1",
        ),
        (
            lambda: testing.check_vjp(ops.sin, (1.0,), atol="a"),
            "check_vjp expects a number of 0 or more, or None, as `atol`.*atol='a'",
        ),
        (
            lambda: testing.check_hvp(ops.sin, (1.0,), step=0),
            "check_hvp expects a positive number, or None, as `step`.*step=0",
        ),
        (lambda: testing.check_hvp(ops.sin, (tensor(X),)), "must return one scalar.*shape \\(3,\\)"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call()
