"""In a backward pass torch asks the tensors that it has saved whether they require gradients: they do so again."""

import gc
import threading

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from tests.cases import central_differences, close, tensor

if keras.backend.backend() != "torch":
    pytest.skip("these are about torch", allow_module_level=True)

import torch  # noqa: E402

from keras_gradtools.backend.torch import borrowing  # noqa: E402

A = np.array([[4.0, 1, 0], [1, 3, 0.5], [0, 0.5, 5]])
B = np.array([[1.0], [2], [3]])
V = np.array([[0.3, -1, 0.2], [0.5, 0.1, 0.4], [-0.7, 0.6, 0.9]])
INVERSE = np.linalg.inv(A)
# Of the sum of the solution, by A: the gradient, the slope along V, and the product of the Hessian with V.
GRADIENT = -INVERSE.T @ np.ones((3, 1)) @ (INVERSE @ B).T
SLOPE = np.sum(GRADIENT * V)
PRODUCT = -INVERSE.T @ V.T @ GRADIENT - GRADIENT @ V.T @ INVERSE.T
BY_B = INVERSE.T @ np.ones((3, 1))


def solution(a, b=None):
    return ops.sum(ops.solve(a, tensor(B, "float64") if b is None else b))


@pytest.fixture
def a():
    x = tensor(A, "float64")
    yield x
    assert not x.requires_grad and x.grad is None
    assert not borrowing._borrowed


class TestSolve:
    """The smallest function whose formula asks."""

    def test_gradient(self, a):
        with kg.GradientTape() as tape:
            tape.watch(a)
            y = solution(a)
        assert not a.requires_grad
        close(tape.gradient(y, a), GRADIENT)

    def test_a_persistent_tape_long_after_its_block(self, a):
        with kg.GradientTape(persistent=True) as tape:
            tape.watch(a)
            y = solution(a)
        for _ in range(2):
            close(tape.gradient(y, a), GRADIENT)
            assert not a.requires_grad
            gc.collect()
        close(tape.jvp(y, a, tensor(V, "float64")), SLOPE)
        close(tape.jacobian(y, a), GRADIENT)

    def test_linearize(self, a):
        _, push = kg.linearize(solution, a)
        for scale in (1, 2):
            close(push(scale * tensor(V, "float64")), scale * SLOPE)

    def test_transforms(self, a):
        v = tensor(V, "float64")
        close(kg.grad(solution)(a), GRADIENT)
        close(kg.vjp(solution, a)[1](1.0)[0], GRADIENT)
        close(kg.jvp(solution, (a,), (v,))[1], SLOPE)
        close(kg.jvp(kg.grad(solution), (a,), (v,))[1], PRODUCT)
        close(kg.hvp(solution, (a,), (v,))[0], PRODUCT)
        close(ops.tensordot(kg.hessian(solution)(a), v, 2), PRODUCT)
        close(ops.tensordot(kg.jacobian(kg.grad(solution))(a), v, 2), PRODUCT)

    def test_by_both(self, a):
        b = tensor(B, "float64")
        close(kg.grad(solution, argnums=(0, 1))(a, b), (GRADIENT, BY_B))

    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    def test_two_tapes_that_share_a_leaf(self, a, order):
        tapes = kg.GradientTape(), kg.GradientTape()
        with tapes[0]:
            tapes[0].watch(a)
            with tapes[1]:
                tapes[1].watch(a)
                y = solution(a)
        for i in order:
            close(tapes[i].gradient(y, a), GRADIENT)

    def test_a_tape_whose_leaf_another_one_watches(self, a):
        b = tensor(B, "float64")
        with kg.GradientTape() as outer:
            outer.watch(a)
            with kg.GradientTape() as tape:
                tape.watch(b)
                y = solution(a, b)
            slope = tape.gradient(y, b)
            second = ops.sum(slope * slope)
        close(slope, BY_B)
        close(outer.gradient(second, a), -2 * BY_B @ BY_B.T @ INVERSE.T)

    def test_the_inner_derivative_of_an_outer_tape(self, a):
        v = tensor(V, "float64")
        with kg.GradientTape() as outer:
            outer.watch(a)
            with kg.GradientTape() as tape:
                tape.watch(a)
                y = solution(a)
            slope = ops.sum(tape.gradient(y, a) * v)
        close(outer.gradient(slope, a), PRODUCT)

    def test_a_view(self):
        stacked = tensor(np.stack([A, A]), "float64")
        view = stacked[1]
        with kg.GradientTape() as tape:
            tape.watch(view)
            y = solution(view)
        close(tape.gradient(y, view), GRADIENT)
        assert not view.requires_grad and not stacked.requires_grad

    @pytest.mark.parametrize("trainable", [True, False])
    def test_a_variable_frozen_after_the_block(self, trainable):
        v = keras.Variable(A, dtype="float64", trainable=trainable)
        with kg.GradientTape(persistent=True) as tape:
            tape.watch(v)
            y = solution(ops.convert_to_tensor(v))
        v.trainable = False
        close(tape.gradient(y, v), GRADIENT)
        assert not v.value.requires_grad
        v.trainable = True
        close(tape.gradient(y, v), GRADIENT)
        assert v.value.requires_grad

    def test_a_parameter_frozen_after_the_block(self):
        p = torch.tensor(A, requires_grad=True)
        with kg.GradientTape() as tape:
            tape.watch(p)
            y = solution(p)
        p.requires_grad_(False)
        close(tape.gradient(y, p), GRADIENT)
        assert not p.requires_grad

    def test_restored_where_the_derivative_fails(self, a):
        class Failing(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, gradient):
                assert a.requires_grad
                raise KeyError

        with kg.GradientTape() as tape:
            tape.watch(a)
            y = Failing.apply(a)
        with pytest.raises(KeyError):
            tape.gradient(y, a)

    def test_two_threads_that_share_a_leaf(self, a):
        """One gives the leaf back while the other is still in its backward pass."""
        wrong = []

        def work():
            for _ in range(50):
                with kg.GradientTape() as tape:
                    tape.watch(a)
                    y = solution(a)
                g = tape.gradient(y, a)
                if g is None or not np.allclose(g.detach().numpy(), GRADIENT):
                    wrong.append(g)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert wrong == []

    def test_nothing_is_added_to_the_graph_of_the_user(self, a):
        """`backward()` through a derivative adds nothing to what the user did not ask for."""
        p = torch.tensor(B, requires_grad=True)
        with kg.GradientTape() as tape:
            tape.watch(a)
            y = solution(a, p)
        ops.sum(tape.gradient(y, a) * tensor(V, "float64")).backward()
        assert a.grad is None
        close(p.grad, -INVERSE.T @ V.T @ BY_B)

    def test_functional_weights(self):
        layer = Solve()
        layer.build(())
        fun, weights = kg.functionalize(layer)
        assert len(weights) == 1
        close(kg.grad(lambda w: ops.sum(fun(w, tensor(B))))(weights), [GRADIENT])
        hessian = kg.hessian(lambda w: ops.sum(fun(w, tensor(B))))(weights)
        close(ops.tensordot(hessian[0][0], tensor(V), 2), PRODUCT)

    def test_gauss_newton(self):
        """Of 1/2 (1'x - 0)**2 as a mean squared error, with one output x = sum(A^-1 b): g g' times 2."""
        layer = Solve()
        x = np.ones((1, 1))
        model = keras.Sequential([keras.Input((1,)), layer])
        operator = kg.curvature.GaussNewton(model, keras.losses.MeanSquaredError(), (x, np.zeros((1, 1))))
        flat = GRADIENT.ravel()
        close(np.asarray(operator.dense()), 2 * np.outer(flat, flat), rtol=1e-4)


class Solve(keras.layers.Layer):
    """x times the sum of A^-1 b, for the weight A."""

    def build(self, shape):
        self.a = self.add_weight(shape=(3, 3), initializer=lambda shape, dtype: tensor(A, dtype))
        self.built = True

    def call(self, x):
        if len(x.shape) == 2 and x.shape[-1] == 1 and x.shape[0] == 3:
            return ops.solve(self.a, x)
        return x * ops.sum(ops.solve(self.a, tensor(B)))


LOWER = np.linalg.cholesky(A)
LU, PIVOTS = (t.numpy() for t in torch.linalg.lu_factor(torch.tensor(A)))
ASKING = {
    "solve": (lambda a, b: torch.linalg.solve(a, b), (A, B)),
    "solve from the right": (lambda a, b: torch.linalg.solve(a, b, left=False), (A, B.T)),
    "solve_ex": (lambda a, b: torch.linalg.solve_ex(a, b).result, (A, B)),
    "tensorsolve": (lambda a, b: torch.linalg.tensorsolve(a, b), (A, B[:, 0])),
    "solve_triangular": (lambda a, b: torch.linalg.solve_triangular(a, b, upper=False), (LOWER, B)),
    "cholesky_solve": (lambda a, b: torch.cholesky_solve(b, torch.tril(a)), (LOWER, B)),
    "lu_solve": (lambda a, b: torch.linalg.lu_solve(a, torch.tensor(PIVOTS), b), (LU, B)),
    "lu_solve, transposed": (lambda a, b: torch.linalg.lu_solve(a, torch.tensor(PIVOTS), b, adjoint=True), (LU, B)),
    "lstsq": (lambda a, b: torch.linalg.lstsq(a, b).solution, (A[:, :2], B)),
    "householder_product": (lambda a, b: torch.linalg.householder_product(a, b), (A, B[:, 0] / 9)),
    "embedding": (lambda a, b: torch.nn.functional.embedding(torch.tensor([0, 2, 2]), a) * b, (A, B)),
    "conv": (lambda a, b: torch.nn.functional.conv1d(a[None], b.reshape(1, 3, 1)), (A, B)),
    "bilinear": (lambda a, b: torch.nn.functional.bilinear(b.T, b.T, a[None]), (A, B)),
    "addmm": (lambda a, b: torch.addmm(b, a, b), (A, B)),
    "prelu": (lambda a, b: torch.nn.functional.prelu(a - 2, b[:, 0]), (A, B / 9)),
}


@pytest.mark.parametrize("name", ASKING)
def test_every_function_of_two_leaves(name):
    """Both gradients, and both blocks of the product with the Hessian, against central differences."""
    fun, arrays = ASKING[name]

    def value(*tensors):
        return ops.sum(ops.sin(fun(*tensors)))

    leaves = [tensor(x, "float64") for x in arrays]
    directions = [tensor(np.cos(np.arange(x.size)).reshape(x.shape), "float64") for x in arrays]
    gradient = kg.grad(value, argnums=(0, 1))
    close(
        list(gradient(*leaves)),
        central_differences(lambda w: float(value(*[tensor(x, "float64") for x in w])), arrays),
        rtol=1e-6,
        atol=1e-8,
    )
    step = 1e-5
    above = gradient(*[x + step * v for x, v in zip(leaves, directions, strict=True)])
    below = gradient(*[x - step * v for x, v in zip(leaves, directions, strict=True)])
    slopes = [((p - m) / (2 * step)).numpy() for p, m in zip(above, below, strict=True)]
    close(list(kg.hvp(value, tuple(leaves), tuple(directions))), slopes, rtol=1e-6, atol=1e-7)
    close(list(kg.jvp(gradient, tuple(leaves), tuple(directions))[1]), slopes, rtol=1e-6, atol=1e-7)
    assert not any(x.requires_grad for x in leaves)
