"""What a function with a custom gradient may receive and return, and the errors for all else."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from keras_gradtools import custom_gradient
from tests.cases import close, tensor
from tests.compilers import with_every_compiler
from tests.gradient_control.slopes import gradient_of


class TestArguments:
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
