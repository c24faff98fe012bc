"""grad, value_and_grad, vjp and jvp: values against closed forms, composed, on models, and their errors."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from tests.cases import CASES, case_id, close, tensor


def cube(x):
    return x * x * x


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_pullback_and_pushforward_are_the_jacobian(case):
    """<u, J v> = <J' u, v> with both sides from the closed form of J."""
    primals = tuple(tensor(x) for x in case.inputs)
    rng = np.random.default_rng(0)
    tangents = tuple(rng.normal(size=np.shape(x)).astype("float32") for x in case.inputs)
    out, pushed = kg.jvp(case.fun, primals, tangents)
    _, pullback = kg.vjp(case.fun, *primals)
    u = rng.normal(size=tuple(out.shape)).astype("float32")
    pulled = pullback(u)
    expected = sum(np.tensordot(j, v, axes=np.ndim(v)) for j, v in zip(case.jacobians, tangents, strict=True))
    close(pushed, expected, rtol=1e-4, atol=1e-4)
    for j, gradient in zip(case.jacobians, pulled, strict=True):
        close(gradient, np.tensordot(u, j, axes=u.ndim), rtol=1e-4, atol=1e-4)


class TestGrad:
    def test_several_arguments_in_any_nesting(self):
        def fun(p, scale):
            return ops.sum(p["w"] * p["w"]) * scale

        by_p, by_scale = kg.grad(fun, argnums=(0, 1))({"w": np.array([1.0, 2.0], "float32")}, 3.0)
        close(by_p, {"w": np.array([6.0, 12.0])})
        close(by_scale, 5.0)

    def test_a_negative_position_and_keywords(self):
        close(kg.grad(lambda x, y, power: x * y**power, argnums=-1)(3.0, 2.0, power=3), 36.0)

    def test_the_same_tensor_twice_is_two_arguments(self):
        x = tensor(3.0)
        close(list(kg.grad(lambda a, b: a * a * b, argnums=(0, 1))(x, x)), [18.0, 9.0])

    def test_aux(self):
        gradient, aux = kg.grad(lambda x: (x * x, {"twice": 2 * x}), has_aux=True)(3.0)
        close(gradient, 6.0)
        close(aux, {"twice": 6.0})

    def test_unconnected_is_zero(self):
        by_x, by_y = kg.grad(lambda x, y: x * x, argnums=(0, 1))(3.0, np.ones(2, "float32"))
        close([by_x, by_y], [6.0, np.zeros(2)])

    def test_a_variable_as_an_argument(self):
        v = keras.Variable(3.0)
        close(kg.grad(cube)(v), 27.0)

    def test_value_and_grad(self):
        value, gradient = kg.value_and_grad(cube)(2.0)
        close([value, gradient], [8.0, 12.0])
        (value, aux), gradient = kg.value_and_grad(lambda x: (cube(x), x + 1), has_aux=True)(2.0)
        close([value, aux, gradient], [8.0, 3.0, 12.0])

    def test_results_can_be_read_as_numbers(self):
        value, gradient = kg.value_and_grad(cube)(2.0)
        assert np.asarray(value) == 8 and np.asarray(gradient) == 12


class TestComposition:
    def test_three_times(self):
        close(kg.grad(kg.grad(kg.grad(lambda x: x**5)))(2.0), 240.0)

    @pytest.mark.parametrize(
        "compose",
        [
            lambda f: kg.jit(kg.grad(f)),
            lambda f: kg.grad(kg.jit(f)),
            lambda f: kg.jit(kg.grad(kg.jit(f))),
        ],
    )
    def test_with_jit(self, compose):
        close(compose(cube)(2.0), 12.0)

    def test_forward_over_reverse_and_reverse_over_forward(self):
        close(kg.jvp(kg.grad(cube), (2.0,), (10.0,))[1], 120.0)
        close(kg.grad(lambda x: kg.jvp(cube, (x,), (10.0,))[1])(2.0), 120.0)

    def test_tape_over_transform(self):
        x = tensor(2.0)
        with kg.GradientTape() as tape:
            tape.watch(x)
            slope = kg.grad(cube)(x)
        close(tape.gradient(slope, x), 12.0)

    def test_transform_over_tape(self):
        def slope(x):
            with kg.GradientTape() as tape:
                tape.watch(x)
                y = cube(x)
            return tape.gradient(y, x)

        close(kg.grad(slope)(2.0), 12.0)

    def test_jacobian_of_a_gradient(self):
        x = tensor([1.0, 2.0])
        with kg.GradientTape() as tape:
            tape.watch(x)
            gradient = kg.grad(lambda x: ops.sum(x) ** 3)(x)
        close(tape.jacobian(gradient, x), np.full((2, 2), 18.0))


@pytest.mark.skipif(not hasattr(ops, "grad"), reason="Keras has keras.ops.grad from 3.16 on")
class TestGradOfKeras:
    """`keras.ops.grad`, which detaches on torch: what is differentiated around it is right all the same."""

    def test_by_its_argument(self):
        slope = lambda x: ops.sum(ops.grad(cube)(x))  # noqa: E731
        close(kg.grad(slope)(np.array([1.0, 2.0], "float32")), [6.0, 12.0])
        close(kg.grad(lambda x: kg.grad(slope)(x))(3.0), 6.0)

    def test_by_what_it_closes_over(self):
        w = keras.Variable(np.array([1.0, 2.0], "float32"))
        x = tensor([3.0, 4.0])
        with kg.GradientTape() as tape:
            y = ops.sum(ops.grad(lambda x: ops.sum(w * w * x * x))(x))  # 2 w^2 x
        close(tape.gradient(y, w), [12.0, 32.0])

    def test_by_a_variable_as_the_argument(self):
        w = keras.Variable(np.array([1.0, 2.0], "float32"))
        with kg.GradientTape() as tape:
            y = ops.sum(ops.grad(cube)(w))
        close(tape.gradient(y, w), [6.0, 12.0])

    @pytest.mark.parametrize("argnums", [-1, (1, 0), [0]])
    def test_positions_and_nestings(self, argnums):
        given = {"a": tensor([1.0]), "b": tensor([2.0])}, tensor([3.0])

        def found(*args):
            return ops.grad(lambda p, x: ops.sum(p["a"] * p["b"] * x * x), argnums)(*args)

        with kg.GradientTape() as tape:
            tape.watch(given)
            recorded = found(*given)
        plain = found(*given)
        keras.tree.assert_same_structure(recorded, plain)
        for a, b in zip(keras.tree.flatten(recorded), keras.tree.flatten(plain), strict=True):
            close(a, b)

    @pytest.mark.parametrize("argnums", [2, (0, 0), "x"])
    def test_what_is_no_position_is_the_error_of_keras(self, argnums):
        with pytest.raises((ValueError, TypeError), match="argnums"), kg.GradientTape():
            ops.grad(cube, argnums)(2.0)

    def test_what_is_unconnected_is_zero_under_a_tape(self):
        with kg.GradientTape():
            close(ops.grad(lambda x, y: ops.sum(y))(tensor([1.0]), tensor([2.0])), [0.0])

    def test_ours_refuses_what_it_sums(self):
        close(ops.grad(cube)(np.array([1.0, 2.0], "float32")), [3.0, 12.0])
        with pytest.raises(ValueError, match="must return one scalar"):
            kg.grad(cube)(np.array([1.0, 2.0], "float32"))
        close(kg.grad(lambda x: ops.sum(cube(x)))(np.array([1.0, 2.0], "float32")), [3.0, 12.0])


def test_a_pullback_can_be_called_again():
    out, pullback, aux = kg.vjp(lambda x, y: ((x * y, x + y), 2 * x), 2.0, 3.0, has_aux=True)
    close([*out, aux], [6.0, 5.0, 4.0])
    close(list(pullback((1.0, 10.0))), [13.0, 12.0])
    close(list(pullback((0.0, 1.0))), [1.0, 1.0])


def test_tangents_may_be_left_out():
    close(kg.jvp(lambda x, y: x * y, (2.0, 3.0), (1.0, None))[1], 3.0)


def test_a_model_in_training_mode_keeps_its_state():
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4, activation="tanh", kernel_regularizer="l2"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(1),
        ]
    )
    x = np.random.default_rng(0).normal(size=(6, 3)).astype("float32")
    before = [np.array(v) for v in map(ops.convert_to_numpy, (w.value for w in model.variables))]
    losses = len(model.losses)

    gradient = kg.grad(lambda x: ops.sum(model(x, training=True)) + sum(model.losses))(x)

    # The statistics of the batch make the sum independent of a shift of all examples.
    assert np.abs(ops.convert_to_numpy(gradient)).max() > 0
    for value, weight in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(value, ops.convert_to_numpy(weight.value))
    assert len(model.losses) == losses
    assert model.predict(x, verbose=0).shape == (6, 1)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: kg.grad(3), "grad takes a function"),
        (lambda: kg.grad(lambda x: x)(np.ones(3, "float32")), "must return one scalar.*shape \\(3,\\).*jacobian"),
        (lambda: kg.grad(lambda x: (x, x))(1.0), "must return one scalar.*tuple"),
        (lambda: kg.grad(cube, argnums=1)(1.0), "argnums=1"),
        (lambda: kg.grad(cube, argnums=(0, 0))(1.0), "argnums=\\(0, 0\\)"),
        (lambda: kg.grad(cube, argnums=True)(1.0), "argnums=True"),
        (lambda: kg.grad(cube)(np.arange(3)), "Argument 0 under `grad` must be real and floating-point.*int"),
        (lambda: kg.grad(cube, has_aux=True)(1.0), "must return a pair"),
        (lambda: kg.grad(lambda x: "loss")(1.0), "must be a tensor.*'loss'"),
        (lambda: kg.jvp(cube, 1.0, (1.0,)), "primals of `jvp` must be a tuple"),
        (lambda: kg.jvp(cube, (1.0,), (1.0, 2.0)), "tangents must have the structure"),
        (lambda: kg.vjp(cube, 1.0)[1](np.ones(2, "float32")), "output_gradients must have the shape"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call()


def _cubes(x):
    return ops.sum(x**3)


ROWS = np.array([[1.0, 2.0], [3.0, 5.0]], "float32")


class TestWithoutGradMode:
    """Keras builds, evaluates and predicts without torch's grad mode."""

    def test_gradient_by_a_variable_in_a_call(self):
        class Sharpness(layers.Layer):
            def __init__(self):
                super().__init__()
                self.scale = self.add_weight(shape=(2,), initializer="ones")

            def call(self, x):
                return x * ops.sum(kg.grad(lambda s: ops.sum(s**3))(self.scale))

        model = keras.Sequential([keras.Input((2,)), Sharpness()])
        close(model.predict(ROWS, verbose=0), 6 * ROWS)

    def test_products(self, backend):
        if backend == "torch":
            import torch

            quiet = torch.no_grad()
        else:
            quiet = warnings.catch_warnings()
        v = keras.Variable([1.0, 2.0])
        with quiet:
            close(kg.grad(_cubes)(v), [3.0, 12.0])
            close(kg.hvp(_cubes, (v,), (tensor([1.0, 1.0]),))[0], [6.0, 12.0])
            close(kg.hessian(_cubes)(v), np.diag([6.0, 12.0]))


def test_none_as_an_argument_is_named():
    with pytest.raises(ValueError, match="Argument 1 under `grad` must be a tensor.*None"):
        kg.grad(lambda p, q: ops.sum(p), argnums=(0, 1))(tensor(ROWS), {"b": None})
