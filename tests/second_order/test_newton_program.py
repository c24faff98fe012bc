"""Conjugate gradients and losses as one program, against those of the host and closed forms."""

import numpy as np
import pytest
from keras import ops

from keras_gradtools.curvature.solvers import conjugate_gradient_loop as loop
from keras_gradtools.curvature.solvers.conjugate_gradient_loop import Preconditioner
from keras_gradtools.curvature.solvers.conjugate_gradients import conjugate_gradients
from keras_gradtools.second_order import newton_program

N = 24
STORED = (1, 2, 3, 5, 8, 12, 18)
B = np.random.default_rng(1).normal(size=N).astype("float32")


def symmetric(values, seed=0):
    vectors = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values),) * 2))[0]
    return ((vectors * values) @ vectors.T).astype("float32")


def always_one(x):
    return ops.ones_like(x[0])


class Run:
    """Runs the program with the products of a matrix, the gradient -b and losses, and counts the calls."""

    def __init__(self, matrix, b, loss):
        self._matrix, self._b, self._loss = ops.convert_to_tensor(matrix), ops.convert_to_tensor(b), loss
        self.calls = 0

    def __call__(self, key, body, *args):
        self.calls += 1
        loss = 2.0 * ops.ones_like(self._b[0])
        # `ops.matmul` would round to single precision on some backends.
        return body(lambda v: (self._matrix @ v[:, None])[:, 0], self._loss, lambda: (loss, -self._b), *args)


def in_a_loop(
    matrix, b, damping=0.0, rtol=1e-4, limit=30, progress_tol=None, most=None, preconditioner=None, loss=always_one,
    scale=1.0,
):  # fmt: skip
    run, recorded = Run(matrix, b, loss), []
    options = loop.Options(limit, progress_tol, most or limit, tuple(i for i in STORED if i <= limit), True, rtol)
    found = newton_program.solve(
        run, damping, scale, options, b.dtype, preconditioner, lambda d, y: recorded.extend(zip(d, y, strict=True))
    )
    return found, recorded, run.calls


def steps_of(found):
    return [iterate.step() for iterate in found.iterates]


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
    found, *_ = in_a_loop(POSITIVE, B, damping, preconditioner=preconditioner)
    expected, others = by_products(POSITIVE, B, damping, preconditioner=preconditioner)
    exact = np.linalg.solve(POSITIVE + damping * np.eye(N), B.astype("float64"))
    assert (found.loss, found.length) == (2.0, pytest.approx(np.linalg.norm(B)))
    np.testing.assert_array_equal(found.gradient, -B)
    assert (found.reason, found.iterations) == (loop.CONVERGED, expected.iterations)
    assert found.residual_norm == pytest.approx(expected.residual_norm, rel=0.2)
    assert found.residual_norm <= 1e-4 * np.linalg.norm(B)
    # The solution, and then the stored iterates before it, the last ones first.
    solution, *earlier = steps_of(found)
    others = [x for i, x in reversed(others) if i < found.iterations]
    np.testing.assert_allclose(solution, exact, atol=1e-3 * np.abs(exact).max())
    assert len(earlier) == len(others) >= 5
    for x, other in zip(earlier, others, strict=True):
        np.testing.assert_allclose(x, other, atol=1e-4 * np.abs(exact).max())
    matrix = POSITIVE.astype("float64")
    for iterate in found.iterates:
        x = iterate.step().astype("float64")
        assert iterate.slope == pytest.approx(-B @ x, rel=1e-5)
        assert iterate.curved == pytest.approx(x @ matrix @ x, rel=1e-3)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_evaluates_losses_until_one_is_lower(scale):
    unscaled, *_ = in_a_loop(POSITIVE, B, rtol=0.1)
    lengths = [np.linalg.norm(step) for step in steps_of(unscaled)]
    assert np.all(np.diff(lengths) < 0)
    # Lower than 2 for steps that are shorter than this.
    for place in (0, 1, len(lengths) - 1):
        bound = scale * (lengths[place] * (lengths[place - 1] if place else 2.0 * lengths[0])) ** 0.5
        found, *_ = in_a_loop(
            POSITIVE, B, rtol=0.1, scale=scale, loss=lambda x, bound=bound: 1.0 + ops.cast(ops.norm(x), x.dtype) / bound
        )
        steps, losses = steps_of(found), [iterate.loss for iterate in found.iterates]
        for step, length in zip(steps, lengths, strict=True):
            assert np.linalg.norm(step) == pytest.approx(scale * length, rel=1e-6)
        assert losses[place + 1 :] == [None] * (len(losses) - place - 1)
        np.testing.assert_allclose(
            losses[: place + 1], [1 + np.linalg.norm(x) / bound for x in steps[: place + 1]], rtol=1e-6
        )
        assert losses[place] < 2.0 and all(loss > 2.0 for loss in losses[:place])


def test_evaluates_all_losses_if_none_is_lower_or_finite():
    for value in (3.0, np.nan):
        found, *_ = in_a_loop(POSITIVE, B, loss=lambda x, value=value: ops.full_like(x[0], value))
        np.testing.assert_array_equal([iterate.loss for iterate in found.iterates], [value] * len(found.iterates))


def test_a_loss_that_is_equal_to_rounding_ends_the_evaluations_only_if_the_decrease_is_small():
    def equal(x):
        return 2.0 * ops.ones_like(x[0])

    large, *_ = in_a_loop(POSITIVE, B, loss=equal)
    assert all(iterate.loss == 2.0 for iterate in large.iterates)
    small, *_ = in_a_loop(POSITIVE, (1e-4 * B).astype("float32"), loss=equal)
    assert [iterate.loss for iterate in small.iterates] == [2.0] + [None] * (len(small.iterates) - 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_a_gradient_that_cannot_be_used(bad):
    gradient = np.zeros(N, "float32")
    gradient[2] = bad
    found, recorded, calls = in_a_loop(POSITIVE, -gradient)
    assert (found.reason, found.iterations, found.iterates) == (loop.NOT_FINITE, 0, None)
    assert not recorded and calls == 1
    np.testing.assert_array_equal(found.gradient, gradient)


@pytest.mark.float64
@pytest.mark.parametrize("rank", [0, 5])
def test_double_precision(rank):
    values, vectors = np.geomspace(0.3, 10.0, N), np.linalg.qr(np.random.default_rng(0).normal(size=(N, N)))[0]
    matrix, b = (vectors * values) @ vectors.T, B.astype("float64")
    preconditioner = Preconditioner(vectors[:, -rank:].T.copy(), 5.0 / values[-rank:] - 1.0) if rank else None
    found, *_ = in_a_loop(matrix, b, 0.5, rtol=1e-12, preconditioner=preconditioner)
    exact = np.linalg.solve(matrix + 0.5 * np.eye(N), b)
    np.testing.assert_allclose(steps_of(found)[0], exact, atol=1e-11 * np.abs(exact).max())
    assert found.reason == loop.CONVERGED


def test_calls_of_fewer_iterations_continue_each_other():
    whole, recorded, calls = in_a_loop(POSITIVE, B, 0.5)
    parts, pieces, more = in_a_loop(POSITIVE, B, 0.5, most=4)
    assert calls == 1 and more == -(-whole.iterations // 4) > 1
    assert (parts.reason, parts.iterations, parts.loss) == (whole.reason, whole.iterations, whole.loss)
    np.testing.assert_array_equal(steps_of(parts), steps_of(whole))
    np.testing.assert_array_equal(pieces, recorded)


def test_records_directions_with_their_products_without_damping():
    found, recorded, _ = in_a_loop(POSITIVE, B, 0.5, most=5)
    assert len(recorded) == found.iterations
    for direction, product in recorded:
        np.testing.assert_allclose(np.linalg.norm(direction), 1.0, rtol=1e-6)
        np.testing.assert_allclose(product, POSITIVE @ direction, rtol=1e-4, atol=1e-4)
    # Directions are conjugate with respect to the damped matrix.
    first, second = (d.astype("float64") for d, _ in recorded[:2])
    damped = POSITIVE.astype("float64") + 0.5 * np.eye(N)
    assert abs(first @ damped @ second) < 1e-5 * np.sqrt((first @ damped @ first) * (second @ damped @ second))


@pytest.mark.parametrize("negative", [1, N])
def test_negative_curvature(negative):
    values = np.geomspace(1.0, 10.0, N)
    values[:negative] *= -1.0
    matrix = symmetric(values)
    found, recorded, _ = in_a_loop(matrix, B, 0.1)
    expected, others = by_products(matrix, B, 0.1)
    assert (found.reason, found.iterations) == (loop.NEGATIVE, expected.iterations)
    assert expected.reason == "negative_curvature" and (found.iterations == 1) == (negative == N)
    assert found.curvature == pytest.approx(expected.curvature, rel=1e-3) and found.curvature < 0
    assert len(recorded) == found.iterations
    solution, *earlier = steps_of(found)
    assert len(earlier) == len([i for i, _ in others if i < found.iterations])
    if negative == 1:
        np.testing.assert_allclose(solution, expected.x, atol=1e-4 * np.abs(expected.x).max())
    else:
        # The minimum of the parabola along b, with the absolute value of the curvature.
        np.testing.assert_allclose(solution, B / -found.curvature, rtol=1e-4)
        x = solution.astype("float64")
        assert found.iterates[0].curved == pytest.approx(x @ matrix @ x, rel=1e-3)


def test_curvature_that_is_zero_to_rounding_counts_as_negative():
    matrix = np.diag(np.array([1.0, 0.0, 2.0], "float32"))
    found, *_ = in_a_loop(matrix, np.array([0.0, 1.0, 0.0], "float32"))
    assert (found.reason, found.curvature) == (loop.NEGATIVE, 0.0)


def test_ends_after_the_last_iteration_or_when_progress_is_slow():
    found, *_ = in_a_loop(POSITIVE, B, rtol=1e-6, limit=7)
    assert (found.reason, found.iterations) == (loop.LIMIT, 7)
    matrix = symmetric(np.geomspace(1e-3, 1.0, N))
    slow, *_ = in_a_loop(matrix, B, rtol=1e-7, progress_tol=0.01)
    expected, _ = by_products(matrix, B, rtol=1e-7, progress_tol=0.01)
    assert (slow.reason, slow.iterations) == (loop.PROGRESS, expected.iterations) and expected.reason == "progress"
    assert 10 < slow.iterations < 30
    np.testing.assert_allclose(steps_of(slow)[0], expected.x, rtol=1e-2, atol=1e-2 * np.abs(expected.x).max())


def test_the_tolerance_that_follows_the_gradient():
    for factor in (1.0, 1e-3):
        b = (factor * B / np.linalg.norm(B)).astype("float32")
        found, *_ = in_a_loop(POSITIVE, b, rtol=None)
        expected, _ = by_products(POSITIVE, b, rtol=min(0.5, factor**0.5))
        assert (found.reason, found.iterations) == (loop.CONVERGED, expected.iterations)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite(bad):
    matrix = POSITIVE.copy()
    matrix[3, 5] = matrix[5, 3] = bad
    found, *_ = in_a_loop(matrix, B)
    assert (found.reason, found.iterations, found.iterates) == (loop.NOT_FINITE, 0, None)


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_squares_out_of_range_change_no_bit(scale):
    # In single precision, the square of the norm of such a vector is 0 or infinite.
    found, *_ = in_a_loop(POSITIVE, (scale * B.astype("float64")).astype("float32"), rtol=1e-4)
    expected, *_ = in_a_loop(POSITIVE, B, rtol=1e-4)
    np.testing.assert_array_equal(steps_of(found)[0], scale * steps_of(expected)[0])
    assert found.iterations == expected.iterations
    assert found.residual_norm == scale * expected.residual_norm
    assert found.iterates[0].slope == scale**2 * expected.iterates[0].slope


def test_a_damping_far_above_the_matrix():
    found, *_ = in_a_loop(POSITIVE, B, damping=1e25)
    np.testing.assert_allclose(steps_of(found)[0], B / 1e25, rtol=1e-5)
    assert (found.reason, found.iterations) == (loop.CONVERGED, 1)


def test_a_preconditioner_that_is_not_positive_definite_raises():
    values, vectors = np.linalg.eigh(POSITIVE)
    bad = Preconditioner(vectors[:, -1:].T.copy(), np.array([-50.0], "float32"))
    with pytest.raises(ValueError, match="expects a positive definite `preconditioner`. Received: one with a product"):
        in_a_loop(POSITIVE, vectors[:, -1].copy(), preconditioner=bad)
