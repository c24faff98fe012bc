"""Gradient control: values against closed forms, to second order, eagerly and compiled."""

import gc
import weakref

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from keras_gradtools.gradient_control.gradient_ops import (
    clip_gradient_norm,
    clip_gradient_value,
    custom_gradient,
    reverse_gradient,
    scale_gradient,
    stop_gradient,
    straight_through,
)
from tests.cases import close, tensor
from tests.compilers import with_every_compiler

# y = control(x)^2 at x = 3, where the gradient that reaches `control` is 6: dy/dx and d2y/dx2. The derivative
# of control(x) is the one it was given wherever it occurs, so that it enters the second derivative twice.
CONTROLS = {
    "norm_clipped": (lambda x: clip_gradient_norm(x, 4.0), 4, 0),
    "norm_left_alone": (lambda x: clip_gradient_norm(x, 10), 6, 2),
    "norm_at_the_limit": (lambda x: clip_gradient_norm(x, 6.0), 6, 2),
    "value_clipped": (lambda x: clip_gradient_value(x, 4.0), 4, 0),
    "value_left_alone": (lambda x: clip_gradient_value(x, 10), 6, 2),
    "value_at_the_limit": (lambda x: clip_gradient_value(x, 6.0), 6, 2),
    "scaled": (lambda x: scale_gradient(x, 0.5), 3, 0.5),
    "scaled_by_zero": (lambda x: scale_gradient(x, 0), 0, 0),
    "reversed": (lambda x: reverse_gradient(x, 2.0), -12, 8),
    "reversed_by_default": (reverse_gradient, -6, 2),
    "straight_through": (straight_through(lambda x: x + 0), 6, 2),
}
with_every_control = pytest.mark.parametrize(("control", "first", "second"), CONTROLS.values(), ids=CONTROLS)


def first_and_second(fun):
    """`x -> (value, first derivative, second derivative)` of a function of a scalar."""

    def derivatives(x):
        with kg.GradientTape() as outer:
            outer.watch(x)
            with kg.GradientTape() as inner:
                inner.watch(x)
                y = fun(x)
            slope = inner.gradient(y, x)
        return y, slope, outer.gradient(slope, x, unconnected_gradients="zero")

    return derivatives


def gradient_of(fun, x):
    with kg.GradientTape() as tape:
        tape.watch(x)
        y = fun(x)
    return tape.gradient(y, x)


def gradient_for(control, upstream, dtype="float32"):
    """What `control` makes of the gradient `upstream`."""
    x = ops.zeros(np.shape(upstream), dtype=dtype)
    with kg.GradientTape() as tape:
        tape.watch(x)
        y = control(x)
    return tape.gradient(y, x, output_gradients=tensor(upstream, dtype))


def log1pexp(x):
    e = ops.exp(x)
    return ops.log(1 + e), lambda upstream: upstream * (1 - 1 / (1 + e))


class TestStockControls:
    @with_every_compiler
    @with_every_control
    def test_derivatives(self, compiler, control, first, second):
        derivatives = compiler.compile(first_and_second(lambda x: ops.square(control(x))))
        close(derivatives(tensor(3.0)), (9, first, second))

    @with_every_control
    def test_values_and_dtypes_are_kept(self, control, first, second):
        for dtype in ("float16", "bfloat16", "float32"):
            x = tensor([[1.5, -2.0]], dtype)
            y = control(x)
            assert keras.backend.standardize_dtype(y.dtype) == dtype
            close(ops.cast(y, "float32"), [[1.5, -2.0]], rtol=0, atol=0)
            gradient = gradient_of(control, x)
            assert keras.backend.standardize_dtype(gradient.dtype) == dtype

    @with_every_control
    def test_takes_a_variable(self, control, first, second):
        variable = keras.Variable(3.0)
        with kg.GradientTape() as tape:
            y = ops.square(control(variable))
        close(tape.gradient(y, variable), first)

    @with_every_control
    def test_is_a_constant_to_a_block_that_comes_later(self, control, first, second):
        x = tensor([3.0, 4.0])
        before = control(x)
        close(gradient_of(lambda x: x * before, x), [3, 4])

    def test_the_example_of_the_guide(self):
        close(first_and_second(lambda v: clip_gradient_norm(v * v, 0.5))(tensor(2.0)), (4, 2, 1))
        close(gradient_of(lambda v: v * v, tensor(2.0)), 4)

    def test_norm_is_that_of_the_whole_tensor(self):
        upstream = np.array([[3.0, 0.0], [0.0, 4.0]])
        close(gradient_for(lambda x: clip_gradient_norm(x, 1.0), upstream), upstream / 5)
        close(gradient_for(lambda x: clip_gradient_norm(x, 5.5), upstream), upstream)

    def test_norm_to_second_order(self):
        # The gradient of y = sum(clip(x)^2) is 2x / ||2x|| where it is longer than 1: its Jacobian projects.
        x = np.array([3.0, 4.0])
        with kg.GradientTape() as outer:
            watched = tensor(x)
            outer.watch(watched)
            with kg.GradientTape() as inner:
                inner.watch(watched)
                y = ops.sum(ops.square(watched))
                clipped = clip_gradient_norm(y, 0.25)
            slope = inner.gradient(clipped, watched)
        close(slope, x / 2)
        close(outer.jacobian(slope, watched), np.eye(2) / 2)

        def normalized(u):
            point = tensor([0.0, 0.0])
            with kg.GradientTape() as tape:
                tape.watch(point)
                y = clip_gradient_norm(point, 1.0)
            return tape.gradient(y, point, output_gradients=u)

        u = tensor(x)
        with kg.GradientTape() as tape:
            tape.watch(u)
            g = normalized(u)
        close(tape.jacobian(g, u), (np.eye(2) - np.outer(x, x) / 25) / 5)

    @pytest.mark.parametrize("clip", [clip_gradient_norm, clip_gradient_value])
    def test_zero_gradient_stays_zero_to_second_order(self, clip):
        # y = |c|^2 with c = clip(x) at 0: its gradient 2c is inside the limit, and so is the one of that.
        def slope(x):
            return gradient_of(lambda x: ops.sum(ops.square(clip(x, 3.0))), x)

        x = tensor([0.0, 0.0])
        with kg.GradientTape() as tape:
            tape.watch(x)
            g = slope(x)
        close(g, [0, 0])
        close(tape.jacobian(g, x), 2 * np.eye(2))

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_norm_of_half_precision(self, dtype):
        # The squares, 90000 each, overflow in float16.
        gradient = gradient_for(lambda x: clip_gradient_norm(x, 1.0), np.full(4, 300.0), dtype)
        assert keras.backend.standardize_dtype(gradient.dtype) == dtype
        close(ops.cast(gradient, "float32"), np.full(4, 0.5), rtol=0, atol=0)

    def test_norm_does_not_overflow(self):
        close(gradient_for(lambda x: clip_gradient_norm(x, 1.0), [3e30, -4e30]), [0.6, -0.8])
        close(gradient_for(lambda x: clip_gradient_norm(x, 1e-30), [3e-25, 4e-25]), [6e-31, 8e-31], atol=0)

    @pytest.mark.float64
    def test_double_precision(self):
        gradient = gradient_for(lambda x: clip_gradient_norm(x, 0.1), [3.0, 4.0], "float64")
        close(gradient, [0.06, 0.08], rtol=1e-15, atol=0)
        close(gradient_for(lambda x: scale_gradient(x, 0.1), [3.0], "float64"), [0.3], rtol=1e-15, atol=0)

    @with_every_control
    def test_jacobians_are_vectorized(self, recwarn, control, first, second):
        x = tensor([[1.0, 2.0], [3.0, 4.0]])
        with kg.GradientTape() as tape:
            tape.watch(x)
            y = ops.square(control(x))
        assert tuple(tape.batch_jacobian(y, x).shape) == (2, 2, 2)
        assert not [str(w.message) for w in recwarn if "one row at a time" in str(w.message)]

    def test_empty_tensor(self):
        for name, (control, *_) in CONTROLS.items():
            assert tuple(gradient_for(control, np.zeros((0, 3))).shape) == (0, 3), name

    def test_value_clips_on_both_sides(self):
        close(gradient_for(lambda x: clip_gradient_value(x, 2.0), [-3.0, -1.0, 0.0, 1.5, 9.0]), [-2, -1, 0, 1.5, 2])


class TestScale:
    @pytest.mark.parametrize(
        "scale",
        [0.5, np.float32(0.5), np.float64(0.5), tensor(0.5), tensor(0.5, "float16"), keras.Variable(0.5)],
        ids=["float", "float32", "float64", "tensor", "half_tensor", "variable"],
    )
    def test_kinds(self, scale):
        close(gradient_of(lambda x: scale_gradient(x * x, scale), tensor(3.0)), 3)
        close(gradient_of(lambda x: reverse_gradient(x * x, scale), tensor(3.0)), -3)

    def test_integers(self):
        close(gradient_of(lambda x: scale_gradient(x, 2), tensor(3.0)), 2)
        close(gradient_of(lambda x: scale_gradient(x, tensor(2, "int32")), tensor(3.0)), 2)

    def test_has_no_gradient(self):
        for scale in (tensor(0.5), keras.Variable(0.5)):
            x = tensor(3.0)
            with kg.GradientTape(persistent=True) as tape:
                tape.watch([x, scale])
                y = scale_gradient(x, scale) + reverse_gradient(x, scale)
            close(tape.gradient(y, scale), None)
            close(tape.gradient(y, x), 0)

    @with_every_compiler
    def test_a_schedule_changes_it(self, compiler):
        if not compiler.sees_assignments:
            pytest.skip("this compiler takes variables for constants")
        scale = keras.Variable(1.0, trainable=False)
        slope = compiler.compile(lambda x: gradient_of(lambda x: reverse_gradient(x * x, scale), x))
        for value in (1.0, 0.5, 0.0, 2.0):
            scale.assign(value)
            close(slope(tensor(3.0)), -6 * value)


class TestStraightThrough:
    def test_a_step(self):
        step = straight_through(lambda x: x > 0)
        x = tensor([-1.0, 2.0])
        close(step(x), [0, 1])
        close(gradient_of(lambda x: step(x) * tensor([3.0, 5.0]), x), [3, 5])

    def test_the_gradient_is_taken_at_the_value(self):
        close(first_and_second(lambda x: ops.square(straight_through(ops.round)(x)))(tensor(2.7)), (9, 6, 2))

    def test_keeps_the_name(self):
        def quantize(x):
            """Rounds."""
            return ops.round(x)

        assert straight_through(quantize).__name__ == "quantize"

    def test_refuses_a_change_of_shape(self):
        with pytest.raises(ValueError, match=r"'sum' .*shape of its argument, \(3,\).* Received: .*shape \(\)"):
            straight_through(ops.sum)(tensor([1.0, 2.0, 3.0]))

    def test_refuses_what_is_no_function(self):
        with pytest.raises(ValueError, match="straight_through takes a function. Received: .*'round'"):
            straight_through("round")


class TestStopGradient:
    @with_every_compiler
    def test_is_a_constant(self, compiler):
        fun = compiler.compile(lambda x: gradient_of(lambda x: x * x * stop_gradient(x), x))
        close(fun(tensor(3.0)), 18)

    def test_nesting(self):
        x, variable, count = tensor(3.0), keras.Variable(5.0), tensor(2, "int32")
        with kg.GradientTape(persistent=True) as tape:
            tape.watch(x)
            stopped = stop_gradient({"a": [x * x, variable], "b": (count,)})
            y = stopped["a"][0] * stopped["a"][1] * x * variable
        close(stopped, {"a": [9, 5], "b": (2,)})
        close(tape.gradient(y, [x, variable]), [9 * 5 * 5, 9 * 5 * 3])
        close(tape.gradient(stopped["a"], [x, variable]), [None, None])

    def test_is_a_constant_to_a_block_that_comes_later(self):
        x = tensor(3.0)
        before = stop_gradient(x)
        close(gradient_of(lambda x: x * before, x), 3)

    def test_symbolic(self):
        inputs = keras.Input((2,))
        model = keras.Model(inputs, stop_gradient(inputs) * inputs)
        close(gradient_of(model, tensor([[3.0, 4.0]])), [[3, 4]])

    @pytest.mark.parametrize(
        "wrong",
        [[tensor(1.0), np.ones(2)], [tensor(1.0), 1.0], "x", None, ["x", None]],
        ids=["array", "float", "str", "None", "nothing else"],
    )
    def test_refuses(self, wrong):
        with pytest.raises(ValueError, match="stop_gradient takes tensors .* Received: .* leave it out"):
            stop_gradient(wrong)


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

    def test_kinds_of_arguments(self):
        product = custom_gradient(lambda x, y: (x * y, lambda u: (u * y, u * x)))
        variable = keras.Variable(3.0)
        with kg.GradientTape() as tape:
            y = product(variable, 2.0) + product(np.float32(5.0), variable)
        close(y, 21)
        close(tape.gradient(y, variable), 7)
        close(product(np.array([1.0, 2.0], "float32"), np.array([3.0, 4.0], "float32")), [3, 8])

    @with_every_compiler
    def test_options(self, compiler):
        @custom_gradient
        def scaled(x, times, mask, *, power=1, factor=None):
            assert isinstance(times, int) and (factor is None or ops.is_tensor(factor))
            slope = times * ops.cast(mask, x.dtype) * (1 if factor is None else factor)
            return slope * x**power, lambda u: (u * slope * power * x ** (power - 1), "ignored", None)

        def run(x, mask, factor):
            def slopes(**options):
                return gradient_of(lambda x: scaled(x, 2, mask, **options), x)

            return slopes(), slopes(power=3), slopes(power=2, factor=factor), slopes(power=3)

        run = compiler.compile(run)
        mask, factor = tensor([True, False], "bool"), tensor(10.0)
        close(run(tensor([3.0, 4.0]), mask, factor), ([2, 0], [54, 0], [120, 0], [54, 0]))
        # Nothing of the first call is left in the second.
        mask, factor = tensor([False, True], "bool"), tensor(100.0)
        close(run(tensor([3.0, 4.0]), mask, factor), ([0, 2], [0, 96], [0, 1600], [0, 96]))

    @with_every_compiler
    def test_nested_arguments(self, compiler):
        """Of a x b y, with gradients that are wrong on purpose: 10 and 20 times the right ones."""

        @custom_gradient
        def product(p, y):
            a, b = p["a"], p["bs"][0]
            return a * b * y, lambda u: ({"a": 10 * u * b * y, "bs": [20 * u * a * y, None], "name": None}, u * a * b)

        def gradients(a, b, c, y):
            p = {"bs": [b, c], "a": a, "name": "constant"}
            with kg.GradientTape(persistent=True) as tape:
                tape.watch([a, b, c, y])
                value = product(p, y)
                slope = tape.gradient(value, a)
            return value, tape.gradient(value, [a, b, c, y], unconnected_gradients="zero"), tape.gradient(slope, y)

        found = compiler.compile(gradients)(*map(tensor, (2.0, 3.0, 4.0, 5.0)))
        close(found, (30, [10 * 15, 20 * 10, 0, 6], 10 * 3))

    @pytest.mark.parametrize("wrapped", [False, True], ids=["as_it_is", "in_a_tuple"])
    @pytest.mark.parametrize(
        "structure", [list, tuple, lambda x: {"b": x[0], "a": x[1]}], ids=["list", "tuple", "dict"]
    )
    def test_one_nested_argument(self, structure, wrapped):
        def fun(p):
            x, y = (p["b"], p["a"]) if isinstance(p, dict) else p
            gradient = structure([7.0 * y, 9.0 * x])
            return x * y, lambda upstream: (gradient,) if wrapped else gradient

        p = structure([tensor(3.0), tensor(10.0)])
        close(kg.grad(custom_gradient(fun))(p), structure([70.0, 27.0]))

    def test_a_list_of_one_tensor(self):
        tripled = custom_gradient(lambda xs: (xs[0] ** 2, lambda u: [3 * u * xs[0]]))
        close(kg.grad(tripled)([tensor(5.0)]), [15.0])

    def test_nested_variables_arrays_and_floats(self):
        v = keras.Variable(2.0)
        fun = custom_gradient(
            lambda p: (p[0] * p[1] * p[2] * p[3], lambda u: [100 * u, None, "ignored for an integer", u])
        )
        with kg.GradientTape() as tape:
            y = fun([v, np.float32(3.0), 5, 7.0])
        close(y, 210)
        close(tape.gradient(y, v), 100)

    def test_none_for_a_nested_argument_as_a_whole(self):
        fun = custom_gradient(lambda p, y: (p["a"] * y, lambda u: (None, 4 * u)))
        close(kg.grad(fun, argnums=(0, 1))({"a": 2.0}, 3.0), ({"a": 0.0}, 4.0))

    def test_the_derivatives_of_a_nested_rule(self):
        fun = custom_gradient(lambda p: (p["x"] ** 3 * p["y"], lambda u: {"x": u * p["x"] ** 2, "y": u * p["x"]}))
        p = {"x": tensor(2.0), "y": tensor(5.0)}
        close(kg.hessian(fun)(p), {"x": {"x": 4.0, "y": 0.0}, "y": {"x": 1.0, "y": 0.0}})
        close(kg.hvp(fun, (p,), ({"x": 1.0, "y": None},)), ({"x": 4.0, "y": 1.0},))
        close(kg.jvp(fun, (p,), ({"x": 1.0, "y": 10.0},))[1], 4.0 + 20.0)

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


def _returning(*gradients):
    return lambda *args: (args[0] * 2, lambda u: gradients if len(gradients) != 1 else gradients[0])


class TestErrors:
    @pytest.mark.parametrize(
        ("fun", "message"),
        [
            (
                lambda x: x,
                "must return a pair: .* Received: .* End it with `return value, grad_fn`",
            ),
            (lambda x: (x, x), r"must return a pair: .* Received: a tuple of a .*, a "),
            (lambda x: (x, lambda u: u, 1), "must return a pair: .* Received: a tuple of a "),
            (lambda x: ("a", lambda u: u), "value of '<lambda>'.* must be a real tensor.* Received: 'a'"),
            (lambda x: (None, lambda u: u), "value of '<lambda>'.* must be a real tensor.* Received: None"),
            (lambda x: (ops.cast(x, "complex64"), lambda u: u), "must be a real tensor.* Received: .*complex64"),
        ],
        ids=["no_pair", "no_function", "triple", "string", "none", "complex"],
    )
    def test_what_fun_returns(self, fun, message):
        with pytest.raises(ValueError, match=message):
            custom_gradient(fun)(tensor([1.0, 2.0]))

    @pytest.mark.parametrize(
        ("gradients", "arguments", "message"),
        [
            ((1.0, 2.0), 1, "must return 1 gradient, one for each .* Received: a tuple of 2"),
            ((1.0,), 2, r"must return 2 gradients, .* Received: 1.0 \(of type builtins.float\)"),
            ((1.0, 2.0, 3.0), 2, "must return 2 gradients, .* Received: a tuple of 3.* Return None for"),
            ((np.ones(3),), 1, r"for argument 0 must have the shape of the argument, \(2,\). Received: .*shape \(3,\)"),
            ((None, np.ones((2, 1))), 2, r"for argument 1 must have the shape of the argument, \(2,\)"),
            (("a", None), 2, "for argument 0 must be a tensor or None. Received: 'a'"),
        ],
        ids=["too_many", "too_few", "three_for_two", "shape", "shape_of_second", "string"],
    )
    def test_what_grad_fn_returns(self, gradients, arguments, message):
        fun = custom_gradient(_returning(*gradients))
        with pytest.raises(ValueError, match=f"The (grad_fn of|gradient that).*{message}"):
            gradient_of(lambda x: fun(*[x] * arguments), tensor([1.0, 2.0]))

    @pytest.mark.parametrize(
        ("gradient", "message"),
        [
            ({"a": 1.0}, r"for argument 0 must have the structure of the argument.* Received: \{'a': '\*'\}"),
            ({"a": 1.0, "b": 1.0, "c": 1.0}, "for argument 0 must have the structure of the argument"),
            ([1.0, 1.0], "for argument 0 must have the structure of the argument.* Received: "),
            (1.0, "for argument 0 must have the structure of the argument.* None stands for zeros"),
            ({"a": [1.0], "b": 1.0}, "for argument 0 must have the structure of the argument"),
            ({"a": np.ones(3), "b": None}, r"for argument 0 must have the shape of the argument, \(2,\)"),
            ({"a": "x", "b": None}, "for argument 0 must be a tensor or None. Received: 'x'"),
        ],
        ids=["a_key_missing", "a_key_too_many", "list", "number", "deeper", "shape", "string"],
    )
    def test_what_grad_fn_returns_for_a_nested_argument(self, gradient, message):
        fun = custom_gradient(lambda p, y: (p["a"] * p["b"] * y, lambda u: (gradient, None)))
        x = tensor([1.0, 2.0])
        with pytest.raises(ValueError, match=message):
            gradient_of(lambda x: fun({"a": x, "b": x}, x), x)

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (([tensor([1.0], "complex64"), 2.0],), "must be real. Received: argument 0, .*complex64"),
            (([3, "a"],), "at least one positional argument .* Received: "),
            ((), "at least one positional argument .* Received: no positional arguments"),
            ((3, "a"), r"at least one positional argument .* Received: 3 \(of type builtins.int\), 'a'"),
            ((tensor([1, 2], "int32"),), "at least one positional argument .* Received: .*int32"),
            ((tensor([1.0], "complex64"),), "must be real. Received: argument 0, .*complex64"),
            ((keras.KerasTensor((2,)),), "Received: a symbolic KerasTensor.* keras_gradtools.layers.CustomGradient"),
        ],
        ids=["complex_in_a_list", "a_list_of_options", "nothing", "options_only", "integers", "complex", "symbolic"],
    )
    def test_arguments(self, args, message):
        with pytest.raises(ValueError, match=message):
            custom_gradient(lambda *args: (args[0], lambda u: u))(*args)

    def test_what_is_no_function(self):
        with pytest.raises(ValueError, match="custom_gradient takes a function. Received: 3 .* Decorate"):
            custom_gradient(3)

    def test_exceptions_of_the_user_arrive_unchanged(self):
        class Mine(Exception):
            pass

        def fail(*_):
            raise Mine("as is")

        with pytest.raises(Mine, match="^as is"):
            custom_gradient(fail)(tensor(1.0))
        with pytest.raises(Mine, match="^as is"):
            gradient_of(custom_gradient(lambda x: (x, fail)), tensor(1.0))
        with pytest.raises(Mine, match="^as is"):
            kg.jit(lambda x: gradient_of(custom_gradient(lambda x: (x, fail)), x))(tensor(1.0))

    @pytest.mark.parametrize(
        ("name", "control"),
        [
            ("clip_gradient_norm", lambda x: clip_gradient_norm(x, 1.0)),
            ("clip_gradient_value", lambda x: clip_gradient_value(x, 1.0)),
            ("scale_gradient", lambda x: scale_gradient(x, 1.0)),
            ("reverse_gradient", reverse_gradient),
            ("straight_through", straight_through(ops.round)),
        ],
    )
    def test_what_can_have_no_gradient(self, name, control):
        layer = "".join(word.capitalize() for word in name.split("_"))
        for wrong, message in [
            (tensor([1, 2], "int32"), "must be real and floating-point. Received: .*int32"),
            (tensor([1.0], "complex64"), "must be real and floating-point. Received: .*complex64"),
            (np.ones(2), "must be a tensor of the backend .* Received: .*float64"),
            ([tensor(1.0)], "must be a tensor of the backend .* Received: "),
            (keras.KerasTensor((2,)), f".* Received: the symbolic .*keras_gradtools.layers.{layer}"),
        ]:
            with pytest.raises(ValueError, match=f"The argument of {name} {message}"):
                control(wrong)

    @pytest.mark.parametrize("limit", [0, -1.0, np.inf, np.nan, "1", None, True, np.ones(2)], ids=str)
    def test_limits(self, limit):
        with pytest.raises(ValueError, match="max_norm must be a positive finite number. Received: max_norm="):
            clip_gradient_norm(tensor(1.0), limit)
        with pytest.raises(ValueError, match="max_value must be a positive finite number. Received: max_value="):
            clip_gradient_value(tensor(1.0), limit)

    @pytest.mark.parametrize(
        "scale",
        [np.inf, np.nan, "1", None, True, np.ones(()), tensor([1.0]), tensor(True, "bool"), tensor(1, "complex64")],
        ids=["inf", "nan", "str", "None", "bool", "array", "vector", "bool_tensor", "complex"],
    )
    def test_scales(self, scale):
        for control, name in ((scale_gradient, "scale_gradient"), (reverse_gradient, "reverse_gradient")):
            with pytest.raises(ValueError, match=f"The scale of {name} must be a finite number, or .* Received: "):
                control(tensor(1.0), scale)


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
