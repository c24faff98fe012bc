"""Conjugate gradients as a loop of one program, against those of the host and closed forms."""

import numpy as np
import pytest
from keras import ops

from keras_gradtools.curvature.solvers import conjugate_gradient_loop
from keras_gradtools.curvature.solvers.conjugate_gradient_loop import Options, Preconditioner
from keras_gradtools.curvature.solvers.conjugate_gradients import conjugate_gradients

N = 24
STORED = (1, 2, 3, 5, 8, 12, 18)
B = np.random.default_rng(1).normal(size=N).astype("float32")


def symmetric(values, seed=0):
    vectors = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values),) * 2))[0]
    return ((vectors * values) @ vectors.T).astype("float32")


class Run:
    """Runs the loop with the products of a matrix, and counts the calls."""

    def __init__(self, matrix):
        self._matrix, self.calls = ops.convert_to_tensor(matrix), 0

    def __call__(self, key, body, *args):
        self.calls += 1
        # `ops.matmul` would round to single precision on some backends.
        return body(lambda v: (self._matrix @ v[:, None])[:, 0], *args)


def in_a_loop(matrix, b, damping=0.0, rtol=1e-4, limit=30, progress_tol=None, most=None, preconditioner=None):
    run, recorded = Run(matrix), []
    options = Options(limit, progress_tol, most or limit, tuple(i for i in STORED if i <= limit), True)
    found, iterates = conjugate_gradient_loop.solve(
        run, b, damping, rtol, options, preconditioner, lambda d, y: recorded.append((d.copy(), y.copy()))
    )
    return found, iterates, recorded, run.calls


def by_products(matrix, b, damping=0.0, rtol=1e-4, limit=30, progress_tol=None, preconditioner=None):
    iterates = []
    found = conjugate_gradients(
        matrix, b, damping=damping, rtol=rtol, progress_tol=progress_tol, max_iterations=limit,
        preconditioner=None if preconditioner is None else preconditioner.times,
        callback=lambda i, x, _: iterates.append((i, x)) if i in STORED else None,
    )  # fmt: skip
    return found, iterates


def spectral(matrix, rank):
    """A preconditioner that moves the largest eigenvalues to the next one."""
    values, vectors = np.linalg.eigh(matrix.astype("float64"))
    factors = values[-rank - 1] / values[-rank:] - 1.0
    return Preconditioner(vectors[:, -rank:].T.astype("float32").copy(), factors.astype("float32"))


POSITIVE = symmetric(np.geomspace(0.3, 10.0, N))


@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_solves_as_on_the_host(damping, rank):
    preconditioner = spectral(POSITIVE, rank) if rank else None
    found, iterates, *_ = in_a_loop(POSITIVE, B, damping, preconditioner=preconditioner)
    expected, others = by_products(POSITIVE, B, damping, preconditioner=preconditioner)
    exact = np.linalg.solve(POSITIVE + damping * np.eye(N), B.astype("float64"))
    np.testing.assert_allclose(found.x, exact, atol=1e-3 * np.abs(exact).max())
    assert (found.reason, found.iterations) == ("converged", expected.iterations)
    assert found.residual_norm == pytest.approx(expected.residual_norm, rel=0.2)
    assert found.residual_norm <= 1e-4 * np.linalg.norm(B)
    assert [i for i, _ in iterates] == [i for i, _ in others] and len(iterates) >= 5
    for (_, x), (_, other) in zip(iterates, others, strict=True):
        np.testing.assert_allclose(x, other, atol=1e-4 * np.abs(exact).max())


@pytest.mark.float64
@pytest.mark.parametrize("rank", [0, 5])
def test_double_precision(rank):
    values, vectors = np.geomspace(0.3, 10.0, N), np.linalg.qr(np.random.default_rng(0).normal(size=(N, N)))[0]
    matrix, b = (vectors * values) @ vectors.T, B.astype("float64")
    preconditioner = Preconditioner(vectors[:, -rank:].T.copy(), 5.0 / values[-rank:] - 1.0) if rank else None
    found, *_ = in_a_loop(matrix, b, 0.5, rtol=1e-12, preconditioner=preconditioner)
    exact = np.linalg.solve(matrix + 0.5 * np.eye(N), b)
    np.testing.assert_allclose(found.x, exact, atol=1e-11 * np.abs(exact).max())
    assert found.reason == "converged"


def test_calls_of_fewer_iterations_continue_each_other():
    whole, iterates, recorded, calls = in_a_loop(POSITIVE, B, 0.5)
    parts, others, pieces, more = in_a_loop(POSITIVE, B, 0.5, most=4)
    assert calls == 1 and more == -(-whole.iterations // 4) > 1
    assert (parts.reason, parts.iterations) == (whole.reason, whole.iterations)
    np.testing.assert_array_equal(parts.x, whole.x)
    assert [i for i, _ in others] == [i for i, _ in iterates]
    np.testing.assert_array_equal(pieces, recorded)


def test_records_directions_with_their_products_without_damping():
    found, _, recorded, _ = in_a_loop(POSITIVE, B, 0.5, most=5)
    assert len(recorded) == found.iterations
    for direction, product in recorded:
        np.testing.assert_allclose(product, POSITIVE @ direction, rtol=1e-4, atol=1e-4 * np.linalg.norm(direction))
    # Directions are conjugate with respect to the damped matrix.
    first, second = (d.astype("float64") for d, _ in recorded[:2])
    damped = POSITIVE.astype("float64") + 0.5 * np.eye(N)
    assert abs(first @ damped @ second) < 1e-5 * np.sqrt((first @ damped @ first) * (second @ damped @ second))


@pytest.mark.parametrize("negative", [1, N])
def test_negative_curvature(negative):
    values = np.geomspace(1.0, 10.0, N)
    values[:negative] *= -1.0
    matrix = symmetric(values)
    found, iterates, recorded, _ = in_a_loop(matrix, B, 0.1)
    expected, others = by_products(matrix, B, 0.1)
    assert (found.reason, found.iterations) == (expected.reason, expected.iterations)
    assert found.reason == "negative_curvature" and (found.iterations == 1) == (negative == N)
    np.testing.assert_allclose(found.x, expected.x, atol=1e-4 * (np.abs(expected.x).max() + 1e-30))
    d = found.negative_curvature
    assert found.curvature == pytest.approx(d @ (matrix + 0.1 * np.eye(N)) @ d / (d @ d), rel=1e-3)
    assert found.curvature == pytest.approx(expected.curvature, rel=1e-3) and found.curvature < 0
    assert [i for i, _ in iterates] == [i for i, _ in others] and len(recorded) == found.iterations


def test_curvature_that_is_zero_to_rounding_counts_as_negative():
    matrix = np.diag(np.array([1.0, 0.0, 2.0], "float32"))
    found, *_ = in_a_loop(matrix, np.array([0.0, 1.0, 0.0], "float32"))
    assert (found.reason, found.curvature) == ("negative_curvature", 0.0)


def test_ends_after_the_last_iteration_or_when_progress_is_slow():
    found, *_ = in_a_loop(POSITIVE, B, rtol=1e-6, limit=7)
    assert (found.reason, found.iterations) == ("max_iterations", 7)
    matrix = symmetric(np.geomspace(1e-3, 1.0, N))
    slow, *_ = in_a_loop(matrix, B, rtol=1e-7, progress_tol=0.01)
    expected, _ = by_products(matrix, B, rtol=1e-7, progress_tol=0.01)
    assert (slow.reason, slow.iterations) == (expected.reason, expected.iterations) == ("progress", slow.iterations)
    assert 10 < slow.iterations < 30
    np.testing.assert_allclose(slow.x, expected.x, rtol=1e-2, atol=1e-2 * np.abs(expected.x).max())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite(bad):
    matrix = POSITIVE.copy()
    matrix[3, 5] = matrix[5, 3] = bad
    found, iterates, *_ = in_a_loop(matrix, B)
    assert (found.reason, found.iterations, iterates) == ("not_finite", 0, [])
    assert not found.x.any()


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_squares_out_of_range_change_no_bit(scale):
    # In single precision, the square of the norm of such a vector is 0 or infinite.
    found, *_ = in_a_loop(POSITIVE, (scale * B.astype("float64")).astype("float32"))
    expected, *_ = in_a_loop(POSITIVE, B)
    np.testing.assert_array_equal(found.x, scale * expected.x)
    assert found.iterations == expected.iterations
    assert found.residual_norm == scale * expected.residual_norm


def test_a_damping_far_above_the_matrix():
    found, *_ = in_a_loop(POSITIVE, B, damping=1e25)
    np.testing.assert_allclose(found.x, B / 1e25, rtol=1e-5)
    assert (found.reason, found.iterations) == ("converged", 1)


def test_a_preconditioner_that_is_not_positive_definite_raises():
    values, vectors = np.linalg.eigh(POSITIVE)
    bad = Preconditioner(vectors[:, -1:].T.copy(), np.array([-50.0], "float32"))
    with pytest.raises(ValueError, match="expects a positive definite `preconditioner`. Received: one with a product"):
        in_a_loop(POSITIVE, vectors[:, -1].copy(), preconditioner=bad)
