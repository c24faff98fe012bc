"""`custom_gradient` and its layer: against closed forms, to third order, eagerly and compiled."""

import gc
import weakref

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from keras_gradtools import custom_gradient, layers
from tests.cases import close, tensor
from tests.compilers import with_every_compiler
from tests.gradient_control.slopes import first_and_second, gradient_of


def log1pexp(x):
    e = ops.exp(x)
    return ops.log(1 + e), lambda upstream: upstream * (1 - 1 / (1 + e))


class TestCustomGradient:
    @with_every_compiler
    def test_the_example_of_the_guide(self, compiler):
        sigmoid = 1 / (1 + np.exp(-1))
        slope = sigmoid * (1 - sigmoid)
        derivatives = compiler.compile(first_and_second(custom_gradient(log1pexp)))
        close(derivatives(tensor(1.0)), (np.log1p(np.e), sigmoid, slope))
        thrice = compiler.compile(first_and_second(lambda x: gradient_of(custom_gradient(log1pexp), x)))
        close(thrice(tensor(1.0)), (sigmoid, slope, slope * (1 - 2 * sigmoid)))

    def test_the_given_gradient_is_used(self):
        close(gradient_of(custom_gradient(log1pexp), tensor(1000.0)), 1)
        # Wrong on purpose: nothing but `grad_fn` can say 7.
        seven = custom_gradient(lambda x: (x * x, lambda upstream: 7 * upstream))
        close(gradient_of(lambda x: 2 * seven(3 * x), tensor(1.0)), 2 * 7 * 3)

    @with_every_compiler
    def test_an_identity_beside_its_argument(self, compiler):
        reverse = custom_gradient(lambda x: (x, lambda upstream: -2 * upstream))
        fun = first_and_second(lambda x: x * reverse(x))
        # b(x) = x with b' = -2: (x b)' = b + x b' = -x in value, and (b + x b')' = b' + b' = -4.
        close(compiler.compile(fun)(tensor(3.0)), (9, -3, -4))

    @with_every_compiler
    def test_several_arguments_and_values(self, compiler):
        @custom_gradient
        def product_and_sum(x, y):
            return (x * y, {"sum": x + y}), lambda u, v: (u * y + 10 * v["sum"], u * x + 20 * v["sum"])

        def gradients(x, y):
            with kg.GradientTape(persistent=True) as tape:
                tape.watch([x, y])
                product, others = product_and_sum(x, y)
            return (
                [product, others["sum"]],
                tape.gradient(product, [x, y]),
                tape.gradient(others["sum"], [x, y]),
                tape.gradient([product, others], [x, y]),
            )

        values, by_product, by_sum, by_both = compiler.compile(gradients)(tensor(2.0), tensor(3.0))
        close(values, [6, 5])
        close(by_product, [3, 2])
        close(by_sum, [10, 20])
        close(by_both, [13, 22])

    def test_a_list_of_one_value_and_a_dict(self):
        listed = custom_gradient(lambda x: ([x * x], lambda u: 2 * u * x))
        close(gradient_of(lambda x: listed(x)[0], tensor(3.0)), 6)
        named = custom_gradient(lambda x: ({"b": x * x, "a": 5 * x}, lambda u: 2 * u["b"] * x + 5 * u["a"]))
        close(named(tensor(3.0)), {"b": 9, "a": 15})
        close(gradient_of(lambda x: named(x)["b"], tensor(3.0)), 6)
        close(gradient_of(lambda x: named(x)["a"], tensor(3.0)), 5)

    @with_every_compiler
    def test_integer_values_have_no_gradient(self, compiler):
        @custom_gradient
        def maximum(x):
            where = ops.argmax(x)

            def grad_fn(u, nothing):
                assert nothing is None
                return u * ops.one_hot(where, 3, dtype="float32")

            return (ops.max(x), where), grad_fn

        def run(x):
            with kg.GradientTape() as tape:
                tape.watch(x)
                value, where = maximum(x)
            return value, where, tape.gradient(value, x)

        close(compiler.compile(run)(tensor([1.0, 4.0, 2.0])), (4, 1, [0, 1, 0]))

    def test_options_are_constants(self):
        product = custom_gradient(lambda x, *, y: (x * y, lambda u: u * y))
        x = tensor(3.0)
        with kg.GradientTape() as tape:
            tape.watch(x)
            value = product(x, y=x * x)
        close(tape.gradient(value, x), 9)

    def test_a_method(self):
        class Power:
            exponent = 3

            @custom_gradient
            def __call__(self, x):
                return x**self.exponent, lambda u: (None, u * self.exponent * x ** (self.exponent - 1))

        power = Power()
        for exponent in (3, 2, 4, 3):
            power.exponent = exponent
            close(gradient_of(power, tensor(2.0)), exponent * 2.0 ** (exponent - 1))

    def test_none_is_zero(self):
        first = custom_gradient(lambda x, y: (x * y, lambda u: (u * y, None)))
        x, y = tensor(2.0), tensor(3.0)
        with kg.GradientTape() as tape:
            tape.watch([x, y])
            value = first(x, y)
        close(tape.gradient(value, [x, y], unconnected_gradients="zero"), [3, 0])

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    def test_gradients_have_the_dtype_of_the_argument(self, dtype):
        x = tensor([1.0, 2.0], dtype)
        fun = custom_gradient(lambda x: (ops.cast(x, "float32"), lambda u: 3 * ops.cast(u, "float32")))
        gradient = gradient_of(fun, x)
        assert keras.backend.standardize_dtype(gradient.dtype) == dtype
        close(ops.cast(gradient, "float32"), [3, 3])

    def test_variables_that_are_read_are_constants_with_their_current_value(self):
        in_fun, in_grad_fn = keras.Variable(0.0), keras.Variable(0.0)
        fun = custom_gradient(lambda x: (x * in_fun, lambda u: u * in_grad_fn))
        # More often than a backend needs before it compiles what it has met.
        for i in range(1, 6):
            in_fun.assign(i)
            in_grad_fn.assign(10 * i)
            x = tensor(3.0)
            with kg.GradientTape() as tape:
                tape.watch(x)
                y = fun(x)
            close(y, 3 * i)
            close(tape.gradient(y, [x, in_fun], unconnected_gradients="zero"), [10 * i, 0])

    def test_jacobians_and_directions(self):
        double = custom_gradient(lambda x: (x * x, lambda u: 4 * u * x))
        x = np.array([[1.0, 2.0], [3.0, 4.0]])
        watched = tensor(x)
        with kg.GradientTape(persistent=True) as tape:
            tape.watch(watched)
            y = double(watched)
        slopes = 4 * np.einsum("bi,ij->bij", x, np.eye(2))
        close(tape.batch_jacobian(y, watched), slopes)
        close(tape.jacobian(y, watched), np.einsum("bij,bc->bicj", slopes, np.eye(2)))
        close(tape.jvp(y, watched, tensor([[1.0, -1.0], [0.0, 2.0]])), [[4, -8], [0, 32]])

    def test_stop_recording(self):
        double = custom_gradient(lambda x: (x * x, lambda u: 4 * u * x))
        x = tensor(3.0)
        with kg.GradientTape() as tape:
            tape.watch(x)
            with tape.stop_recording():
                constant = double(x)
            y = constant * double(x)
        close(tape.gradient(y, x), 9 * 12)

    def test_an_intermediate_value_is_a_source(self):
        double = custom_gradient(lambda x: (x * x, lambda u: 4 * u * x))
        x = tensor(3.0)
        with kg.GradientTape(persistent=True) as tape:
            tape.watch(x)
            h = double(x)
            y = h * h
        close(tape.gradient(y, [h, x]), [18, 18 * 12])

    def test_a_custom_gradient_inside_another(self):
        inner = custom_gradient(lambda x: (x * x, lambda u: 5 * u))
        outer = custom_gradient(lambda x: (inner(x), lambda u: u * inner(x)))
        # The outer one decides first: its slope is x^2, whose own slope the inner one gives as 5.
        close(first_and_second(outer)(tensor(3.0)), (9, 9, 5))

    def test_in_fit(self):
        @custom_gradient
        def loud(x, factor):
            return x, lambda u: (10 * u, ops.sum(u) * 100)

        class Loud(keras.layers.Layer):
            def build(self, shape):
                self.factor = self.add_weight(shape=(), initializer="ones")

            def call(self, x):
                return loud(x, self.factor)

        dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
        layer = Loud()
        model = keras.Sequential([keras.Input((1,)), dense, layer])
        model.compile(keras.optimizers.SGD(0.01), "mse")
        model.fit(np.array([[1.0], [3.0]]), np.array([[0.0], [1.0]]), batch_size=2, epochs=1, verbose=0)
        # The loss (1/2) sum (wx - y)^2 has the gradients 1 and 2 by the two outputs.
        close(dense.kernel, [[1 - 0.01 * 10 * (1 * 1 + 2 * 3)]])
        close(layer.factor, 1 - 0.01 * 100 * 3)

    def test_a_layer_that_closes_over_its_weights_in_fit(self):
        class Scaled(keras.layers.Layer):
            def build(self, shape):
                self.scale = self.add_weight(shape=(), initializer="ones")

            def call(self, x):
                hidden = x * self.scale
                return custom_gradient(lambda x: (x * self.scale, lambda u: u * hidden))(x)

        dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
        model = keras.Sequential([keras.Input((1,)), dense, Scaled()])
        model.compile(keras.optimizers.SGD(0.01), "mse")
        model.fit(np.array([[1.0], [3.0]]), np.array([[0.0], [1.0]]), batch_size=2, epochs=1, verbose=0)
        close(dense.kernel, [[1 - 0.01 * (1 * 1 * 1 + 2 * 3 * 3)]])

    def test_nothing_is_kept(self):
        class Option:
            pass

        fun = custom_gradient(lambda x, option: (x * x, lambda u: (u, None)))

        def run(option):
            gradient_of(lambda x: fun(x, option), tensor(1.0))
            return weakref.ref(option)

        kept = run(Option())
        gc.collect()
        assert kept() is None

    def test_keeps_the_name(self):
        assert custom_gradient(log1pexp).__name__ == "log1pexp"


def test_random_numbers_in_the_function_of_a_custom_gradient():
    seed = keras.random.SeedGenerator(1)

    @kg.custom_gradient
    def noisy(x):
        noise = keras.random.normal((2,), seed=seed)
        return x * 1.0, lambda u: u * noise

    x = tensor([1.0, 2.0])
    gradients = []
    for _ in range(2):
        with kg.GradientTape() as tape:
            tape.watch(x)
            y = noisy(x)
        gradients.append(ops.convert_to_numpy(tape.gradient(y, x)))
    assert np.abs(gradients[0] - gradients[1]).max() > 1e-3
    assert np.isfinite(ops.convert_to_numpy(keras.random.normal((2,), seed=seed))).all()


def test_a_rule_that_draws_leaves_the_seed_alive():
    seed = keras.random.SeedGenerator(1)
    x = tensor([1.0, 2.0])
    noisy = kg.custom_gradient(lambda x: (x * 1.0, lambda u: u + keras.random.normal((2,), seed=seed)))
    try:
        with kg.GradientTape() as tape:
            tape.watch(x)
            y = noisy(x)
        tape.gradient(y, x)
    except ValueError as error:
        assert "cannot assign to variables" in str(error)  # noqa: PT017
    assert np.isfinite(ops.convert_to_numpy(keras.random.normal((2,), seed=seed))).all()


# The layer.


@keras.saving.register_keras_serializable(package="tests_custom_gradient")
def mixed(x, y):
    """The products of all pairs, whose gradients are wrong on purpose: nothing else gives 3 and 5."""
    value = ops.einsum("bi,bj->bij", x, y)
    return value, lambda upstream: (3 * ops.sum(upstream, axis=2), 5 * ops.sum(upstream, axis=1))


def model_of_two():
    inputs = [keras.Input((2,)), keras.Input((3,))]
    return keras.Model(inputs, layers.CustomGradient(mixed)(inputs))


def check(model):
    x, y = tensor([[1.0, 2.0]]), tensor([[3.0, 4.0, 5.0]])
    with kg.GradientTape() as tape:
        tape.watch([x, y])
        z = model([x, y])
    close(z, [[[3, 4, 5], [6, 8, 10]]])
    close(tape.gradient(z, [x, y]), [[[9, 9]], [[10, 10, 10]]])


def test_several_inputs(tmp_path):
    model = model_of_two()
    assert model.output_shape == (None, 2, 3)
    check(model)
    model.save(tmp_path / "model.keras")
    check(keras.models.load_model(tmp_path / "model.keras"))


def test_a_dict_of_inputs():
    layer = layers.CustomGradient(lambda p: (p["x"] * p["y"], lambda u: {"x": 7 * u, "y": 9 * u}))
    inputs = {name: keras.Input((1,), name=name) for name in ("x", "y")}
    model = keras.Model(inputs, layer(inputs))
    given = {"x": tensor([[2.0]]), "y": tensor([[5.0]])}
    with kg.GradientTape() as tape:
        tape.watch(given)
        value = model(given)
    close(value, [[10]])
    close(tape.gradient(value, given), {"x": [[7]], "y": [[9]]})


def test_the_layer_in_fit():
    dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
    double = layers.CustomGradient(lambda x: (2 * x, lambda upstream: 7 * upstream))
    model = keras.Sequential([keras.Input((1,)), dense, double])
    model.compile(keras.optimizers.SGD(0.01), "mse")
    model.fit(np.array([[3.0]]), np.array([[1.0]]), verbose=0)
    close(dense.kernel, [[1 - 0.01 * 7 * 2 * (6 - 1) * 3]])


def test_the_layer_refuses_what_is_no_function():
    with pytest.raises(ValueError, match="custom_gradient takes a function. Received: 3"):
        layers.CustomGradient(3)


def test_refuses_a_function_without_a_gradient():
    with pytest.raises(ValueError, match="'square' with a custom gradient must return a pair: .* Received: "):
        layers.CustomGradient(ops.square)(tensor([1.0]))
