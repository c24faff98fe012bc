"""Newton's equation by conjugate gradients, with and without a preconditioner."""

import numpy as np
import pytest

from keras_gradtools.second_order.recycled_preconditioner import RecycledPreconditioner
from keras_gradtools.second_order.step_solvers import ConjugateGradientsSolver

N = 20


class Operator:
    """A matrix as a curvature operator."""

    dtype = "float64"

    def __init__(self, matrix):
        self.shape, self._matrix, self.products = matrix.shape, matrix, 0

    def can_loop_over_products(self):
        return False

    def linearized(self):
        return self

    def __matmul__(self, v):
        self.products += 1
        return self._matrix @ v


class Objective:
    def __init__(self, gradient):
        self._gradient = gradient

    def loss_and_gradient(self, offset=None):
        return 1.0, self._gradient


def symmetric(values, seed=0):
    vectors = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values),) * 2))[0]
    return (vectors * values) @ vectors.T


def solved(matrix, gradient, damping, preconditioner, rtol=1e-8):
    solver = ConjugateGradientsSolver(Operator(matrix), 100, rtol, preconditioner=preconditioner)
    _, gradient = solver.start(Objective(gradient), damping, 1.0)
    return solver.solve(gradient, damping)


def taught(matrix, rank=N):
    preconditioner = RecycledPreconditioner(N, rank, "float64")
    for direction in np.eye(N):
        preconditioner.record(direction, matrix @ direction)
    preconditioner.finish()
    return preconditioner


GRADIENT = np.random.default_rng(3).normal(size=N)


@pytest.mark.parametrize("rank", [0, 12, N])
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_the_solution_and_its_numbers(damping, rank):
    matrix = symmetric(np.geomspace(0.1, 10, N))
    proposal = solved(matrix, GRADIENT, damping, taught(matrix, rank) if rank else None)
    np.testing.assert_allclose(
        proposal.iterates[0].step(), np.linalg.solve(matrix + damping * np.eye(N), -GRADIENT), rtol=1e-5
    )
    assert proposal.iterations == 1 if rank == N else 1 < proposal.iterations < 2 * N
    for iterate in proposal.iterates:
        step, slope, curved = iterate.step(), iterate.slope, iterate.curved
        assert slope == pytest.approx(GRADIENT @ step, rel=1e-6)
        assert curved == pytest.approx(step @ matrix @ step, rel=1e-4)


@pytest.mark.parametrize("is_taught", [False, True])
def test_a_first_direction_of_negative_curvature(is_taught):
    matrix = symmetric(-np.geomspace(0.5, 10, N))
    preconditioner = taught(matrix) if is_taught else RecycledPreconditioner(N, N, "float64")
    proposal = solved(matrix, GRADIENT, 0.1, preconditioner)
    (iterate,) = proposal.iterates
    step, slope, curved = iterate.step(), iterate.slope, iterate.curved
    # It leads down by as much as the same curvature upwards had it go at best.
    assert slope == pytest.approx(GRADIENT @ step) and slope < 0
    damped = step @ (matrix + 0.1 * np.eye(N)) @ step
    assert -slope == pytest.approx(-damped)
    assert curved == pytest.approx(step @ matrix @ step)
    assert proposal.least_damping == pytest.approx(-curved / (step @ step))
    if is_taught:
        # The solution for the absolute values, but for its length.
        share = step / np.linalg.solve(-matrix + 0.1 * np.eye(N), -GRADIENT)
        np.testing.assert_allclose(share, share[0], rtol=1e-5)
        assert 1.0 < share[0] < 1.5


def test_a_second_damping_knows_the_products_of_the_first():
    matrix = symmetric(np.geomspace(0.1, 10, N))
    solver = ConjugateGradientsSolver(
        Operator(matrix), 100, 1e-2, preconditioner=RecycledPreconditioner(N, N, "float64")
    )
    _, gradient = solver.start(Objective(GRADIENT), 0.1, 1.0)
    first, second = solver.solve(gradient, 0.1), solver.solve(gradient, 0.2)
    # Fewer than there is room for.
    assert first.iterations < N and second.iterations < first.iterations / 2
    residual = (matrix + 0.2 * np.eye(N)) @ second.iterates[0].step() + GRADIENT
    assert np.linalg.norm(residual) < 1.01e-2 * np.linalg.norm(GRADIENT)


def test_each_start_is_a_new_matrix(monkeypatch):
    calls = []
    for name in ("begin", "finish"):
        monkeypatch.setattr(RecycledPreconditioner, name, lambda self, name=name: calls.append(name))
    preconditioner = RecycledPreconditioner(N, N, "float64")
    solver = ConjugateGradientsSolver(Operator(np.eye(N)), 100, 1e-6, preconditioner=preconditioner)
    for dampings in (1, 2):
        _, gradient = solver.start(Objective(GRADIENT), 0.1, 1.0)
        for _ in range(dampings):
            solver.solve(gradient, 0.1)
    assert calls == ["begin", "finish", "begin", "finish", "finish"]
