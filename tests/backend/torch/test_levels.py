"""Tapes and transforms inside `torch.func` and `torch.vmap`: right or an error, and never zeros."""

import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from tests.cases import close, tensor

if keras.backend.backend() != "torch":
    pytest.skip("these are about torch", allow_module_level=True)

import torch  # noqa: E402
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, vmap  # noqa: E402

from keras_gradtools.backend.torch import borrowing  # noqa: E402
from keras_gradtools.keras_state.recording import active_tapes  # noqa: E402

W, X = np.array([0.5, 1.0]), np.array([[1.0, 2.0], [3.0, 4.0]])
# Of the sum of sin(w) x^2, by w, for each x; and its slope along ones.
BY_W, SECOND = np.cos(W) * X**2, -np.sin(W) * X**2


def loss(w, x):
    return ops.sum(ops.sin(w) * x * x)


def taped(w, x):
    with kg.GradientTape() as tape:
        tape.watch(w)
        y = loss(w, x)
    return tape.gradient(y, w)


def taped_with_a_variable(w, x):
    v = keras.Variable(W, dtype="float64")
    with kg.GradientTape() as tape:
        y = loss(v, x)
    return tape.gradient(y, v)


def recorded(w, x):
    """A tape, and sin(w) x^2 of each element."""
    with kg.GradientTape(persistent=True) as tape:
        tape.watch(w)
        y = ops.sin(w) * x * x
    return tape, y


def taped_by_example(w, x):
    w = w[None]
    tape, y = recorded(w, x)
    return tape.batch_jacobian(y, {"w": w})["w"][0]


def diagonals(rows):
    return np.array([np.diag(row) for row in rows])


def vector(w, x):
    return ops.sin(w) * x * x


ones = ops.ones_like
VALUE = np.sin(W) * X**2
BY_EXAMPLE = {
    "grad": (kg.grad(loss), BY_W),
    "value_and_grad": (lambda w, x: kg.value_and_grad(loss)(w, x)[1], BY_W),
    "vjp": (lambda w, x: kg.vjp(lambda w: loss(w, x), w)[1](1.0)[0], BY_W),
    "jvp": (lambda w, x: kg.jvp(lambda w: loss(w, x), (w,), (ones(w),))[1], BY_W.sum(1)),
    "linearize": (lambda w, x: kg.linearize(lambda w: loss(w, x), w)[1](ones(w)), BY_W.sum(1)),
    "jacobian": (lambda w, x: kg.jacobian(lambda w: ops.sin(w) * x * x)(w), np.array([np.diag(g) for g in BY_W])),
    "hessian": (lambda w, x: kg.hessian(loss)(w, x), np.array([np.diag(s) for s in SECOND])),
    "hvp": (lambda w, x: kg.hvp(lambda w: loss(w, x), (w,), (ones(w),))[0], SECOND),
    "grad with aux": (lambda w, x: kg.grad(lambda w: (loss(w, x), {"x": x, "n": 1}), has_aux=True)(w)[0], BY_W),
    "aux of grad": (lambda w, x: kg.grad(lambda w: (loss(w, x), [vector(w, x), "aux"]), has_aux=True)(w)[1][0], VALUE),
    "aux of jacobian": (lambda w, x: kg.jacobian(lambda w: (w, (vector(w, x), None)), has_aux=True)(w)[1][0], VALUE),
    "aux of vjp": (lambda w, x: kg.vjp(lambda w: (w, vector(w, x)), w, has_aux=True)[2], VALUE),
    "aux of linearize": (lambda w, x: kg.linearize(lambda w: (w, vector(w, x)), w, has_aux=True)[2], VALUE),
    "jacobian in forward mode": (
        lambda w, x: kg.jacobian(lambda w: vector(w, x), mode="forward")(w),
        diagonals(BY_W),
    ),
    "jacobian in chunks": (lambda w, x: kg.jacobian(lambda w: vector(w, x), chunk_size=1)(w), diagonals(BY_W)),
    "batch_jacobian": (
        lambda w, x: kg.batch_jacobian(lambda n, w: vector(w, x), argnums=1)(3, w[None])[0],
        diagonals(BY_W),
    ),
    "batch_jacobian with aux": (
        lambda w, x: kg.batch_jacobian(lambda w: (w, vector(w, x)), has_aux=True)(w[None])[1][0],
        VALUE,
    ),
    "hessian of a vector": (
        lambda w, x: kg.hessian(lambda w: vector(w, x))(w),
        np.array([np.einsum("i,ij,ik->ijk", s, np.eye(2), np.eye(2)) for s in SECOND]),
    ),
    "hessian with aux": (lambda w, x: kg.hessian(lambda w: (loss(w, x), x), has_aux=True)(w)[0], diagonals(SECOND)),
    "ggnvp": (
        lambda w, x: kg.ggnvp(lambda w: ops.sin(w) * x, lambda y: ops.sum(y * y), (w,), (ones(w),))[0],
        2 * np.cos(W) ** 2 * X**2,
    ),
    "per_example_grad": (lambda w, x: kg.per_example_grad(loss)(w, x[None])[0], BY_W),
    "per_example_grad with aux": (
        lambda w, x: kg.per_example_grad(lambda w, x: (loss(w, x), vector(w, x)), has_aux=True)(w, x[None])[1][0, 0],
        VALUE,
    ),
    "laplacian": (lambda w, x: kg.laplacian(lambda w: ops.sum(vector(w, x), axis=1))(w[None])[0], SECOND.sum(1)),
    "divergence": (lambda w, x: kg.divergence(lambda w: vector(w, x))(w[None])[0, 0], BY_W.sum(1)),
    "jit": (lambda w, x: kg.jit(kg.grad(loss))(w, x), BY_W),
    "gradient control": (lambda w, x: kg.grad(lambda w: loss(kg.scale_gradient(w, 3.0), x))(w), 3 * BY_W),
    "custom gradient": (
        lambda w, x: kg.grad(lambda w: ops.sum(kg.custom_gradient(lambda w: (ops.sin(w), lambda u: u * x * x))(w)))(w),
        X**2,
    ),
    "tape.jacobian": (lambda w, x: (lambda tape, y: tape.jacobian(y, w))(*recorded(w, x)), diagonals(BY_W)),
    "tape.jacobian by rows": (
        lambda w, x: (lambda tape, y: tape.jacobian(y, w, experimental_use_pfor=False))(*recorded(w, x)),
        diagonals(BY_W),
    ),
    "tape.batch_jacobian": (taped_by_example, diagonals(BY_W)),
    "tape.jvp": (lambda w, x: (lambda tape, y: tape.jvp(y, w, ones(w)))(*recorded(w, x)), BY_W),
    "tape.linearize": (lambda w, x: (lambda tape, y: tape.linearize(y, w)(ones(w)))(*recorded(w, x)), BY_W),
    "tape": (taped, BY_W),
    "tape by a variable": (taped_with_a_variable, BY_W),
}


@pytest.fixture(params=[False, True], ids=["a tensor", "a parameter"])
def w(request):
    w = torch.tensor(W, requires_grad=request.param)
    yield w
    assert w.requires_grad == request.param
    assert not borrowing._borrowed and not active_tapes()


def right_or_refused(run, expected):
    try:
        found = run()
    except RuntimeError as error:
        assert "torch.vmap" in str(error) and "per_example_grad" in str(error)  # noqa: PT017
        return False
    close(found.detach(), expected)
    return True


@pytest.mark.parametrize("name", BY_EXAMPLE)
class TestOverExamples:
    def test_under_vmap(self, name, w):
        fun, expected = BY_EXAMPLE[name]
        x = tensor(X, "float64")
        right_or_refused(lambda: vmap(fun, (None, 0))(w, x), expected)
        right_or_refused(lambda: vmap(fun)(w.expand(2, 2), x), expected)
        right_or_refused(lambda: vmap(lambda x: fun(w, x))(x), expected)

    def test_under_functionalize(self, name, w):
        fun, expected = BY_EXAMPLE[name]
        right_or_refused(lambda: functionalize(fun)(w, tensor(X[0], "float64")), expected[0])
        right_or_refused(lambda: functionalize(lambda x: fun(w, x))(tensor(X[0], "float64")), expected[0])

    def test_under_grad_by_the_other_argument(self, name, w):
        """Every result is homogeneous in x, of degree 2: by Euler, the slope of its sum along x is twice that."""
        fun, expected = BY_EXAMPLE[name]
        x = tensor(X[0], "float64")
        right_or_refused(
            lambda: ops.sum(x * grad(lambda x: ops.sum(fun(w, x)))(x)),
            2 * np.sum(expected[0]),
        )
        right_or_refused(lambda: jvp(lambda x: fun(w, x), (x,), (x,))[1], 2 * expected[0])

    def test_without_levels(self, name, w):
        fun, expected = BY_EXAMPLE[name]
        close(fun(w, tensor(X[0], "float64")).detach(), expected[0])


class TestWhatWorks:
    def test_under_grad_by_the_same_argument(self, w):
        x = tensor(X[0], "float64")
        for fun in (kg.grad(loss), taped):
            close(grad(lambda w: ops.sum(fun(w, x)))(w).detach(), SECOND[0])  # noqa: B023
            close(jacrev(lambda w: fun(w, x))(w).detach(), np.diag(SECOND[0]))  # noqa: B023

    def test_around_torch_func(self, w):
        x = tensor(X[0], "float64")
        close(kg.grad(lambda w: ops.sum(grad(loss)(w, x)))(w).detach(), SECOND[0])
        close(kg.grad(lambda w: ops.sum(vmap(lambda x: loss(w, x))(tensor(X, "float64"))))(w).detach(), BY_W.sum(0))

    def test_a_vectorized_derivative_of_a_record_from_outside(self, w):
        vectors = torch.eye(2, dtype=torch.float64)
        with kg.GradientTape(persistent=True) as tape:
            tape.watch(w)
            y = ops.sin(w)
        expected = np.diag(np.cos(W))
        close(vmap(lambda u: tape.gradient(y, w, u))(vectors).detach(), expected)
        close(vmap(lambda u: tape.jvp(y, w, u))(vectors).detach(), expected)
        close(
            vmap(lambda v: kg.hvp(lambda w: ops.sum(ops.sin(w)), (w,), (v,))[0])(vectors).detach(), -np.diag(np.sin(W))
        )

    @pytest.mark.parametrize("trainable", [True, False])
    def test_a_variable_that_is_read_on_a_level(self, w, trainable):
        """The tape is around: what comes out of the level has a graph that leads through it."""
        v = keras.Variable(3.0, trainable=trainable)
        x = tensor(X)
        with kg.GradientTape(persistent=True) as tape:
            tape.watch(v)
            found = [
                ops.sum(kg.per_example_grad(lambda w, x: v * v * ops.sum(w * x))(x[0], x)),
                ops.sum(vmap(lambda x: v * v * x)(x)),
                ops.sum(grad(lambda x: v * v * ops.sum(x * X.sum() / 2))(x[0])),
                jvp(lambda x: v * v * ops.sum(x), (x,), (x,))[1],
            ]
        for y in found:
            close(tape.gradient(y, v).detach(), 6 * X.sum())

    def test_per_example_grad_of_a_gradient(self, w):
        def penalty(w, x):
            return ops.sum(ops.square(kg.grad(loss, argnums=1)(w, x)))

        # The sum of (2 sin(w) x)^2, by w.
        found = kg.per_example_grad(penalty)(w, tensor(X, "float64"))
        close(found.detach(), 8 * np.sin(W) * np.cos(W) * X**2)

    @pytest.mark.parametrize("transform", [jacfwd, hessian])
    def test_forward_mode_of_torch(self, transform, w):
        x = tensor(X[0], "float64")
        expected = np.diag(SECOND[0] if transform is jacfwd else -np.cos(W) * X[0] ** 2)
        fun = kg.grad(loss)
        right_or_refused(
            lambda: transform((lambda w: fun(w, x)) if transform is jacfwd else lambda w: ops.sum(fun(w, x)))(w),
            expected,
        )


class TestCustomGradients:
    """They go through torch's own functions, which `torch.func` cannot take apart."""

    @pytest.mark.parametrize(
        "fun",
        [
            lambda w: kg.custom_gradient(lambda w: (w, lambda u: 2 * u))(w),
            lambda w: kg.scale_gradient(w, 2.0),
            lambda w: kg.reverse_gradient(w),
            lambda w: kg.clip_gradient_norm(w, 1.0),
            lambda w: kg.clip_gradient_value(w, 1.0),
            lambda w: kg.straight_through(ops.round)(w),
        ],
    )
    def test_are_refused(self, fun, w):
        for transform in (grad, jacrev, jacfwd, vmap, functionalize, lambda f: lambda w: jvp(f, (w,), (w,))):
            with pytest.raises(RuntimeError, match="custom gradient.*inside `torch.vmap`.*`keras_gradtools.grad`"):
                transform(lambda w: ops.sum(fun(w)))(w)

    def test_per_example_grad_takes_one_example_at_a_time(self, w):
        x = tensor(X, "float64")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = kg.per_example_grad(lambda w, x: loss(kg.scale_gradient(w, 3.0), x))(w, x)
        close(found.detach(), 3 * BY_W)


class TestInsideACustomGradient:
    """A Jacobian runs its `grad_fn` on many cotangents at once."""

    def test_a_transform_of_the_cotangent(self):
        @kg.custom_gradient
        def square(x):
            return x * x, lambda u: kg.grad(lambda x: ops.sum(x * x * u))(x)

        x = tensor(W, "float64")
        close(kg.jacobian(square)(x), np.diag(2 * W))
        close(kg.batch_jacobian(square)(tensor(X, "float64")), [np.diag(2 * row) for row in X])

    def test_a_tape(self):
        @kg.custom_gradient
        def square(x):
            def grad_fn(u):
                with kg.GradientTape() as tape:
                    tape.watch(x)
                    y = x * x * u
                return tape.gradient(y, x)

            return x * x, grad_fn

        close(kg.jacobian(square)(tensor(W, "float64")), np.diag(2 * W))

    def test_a_derivative_by_the_cotangent(self):
        @kg.custom_gradient
        def square(x):
            return x * x, lambda u: kg.grad(lambda u: ops.sum(x * u * u))(u)

        close(kg.jacobian(square)(tensor(W, "float64")), np.diag(2 * W))
