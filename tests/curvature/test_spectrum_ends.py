"""`spectrum_ends`: both ends and the trace of matrices whose spectrum is known."""

import numpy as np
import pytest

from keras_gradtools.curvature.estimators.spectrum_ends import spectrum_ends

RNG = np.random.default_rng(21)
N = 150


def matrix_of(values, rng=RNG):
    basis, _ = np.linalg.qr(rng.normal(size=(len(values), len(values))))
    return (basis * values) @ basis.T


SPECTRA = {
    "a few large ones": np.concatenate([[50.0, 20.0, 9.0], RNG.normal(size=N - 3) * 0.1]),
    "indefinite": np.concatenate([[10.0, 6.0, -8.0], RNG.normal(size=N - 3)]),
    "most negative at the other end": np.concatenate([[-30.0, -5.0], RNG.normal(size=N - 2) * 0.1]),
    "of low rank": np.concatenate([[3.0, 2.0], np.zeros(N - 2)]),
    "a multiple of the identity": np.full(N, 2.5),
    "zero": np.zeros(N),
    "without a gap": np.linspace(-1.0, 2.0, N),
}


@pytest.mark.parametrize("values", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-3])
def test_ends_are_within_tol_of_the_largest_magnitude(values, tol):
    matrix = matrix_of(values)
    found = spectrum_ends(lambda v: matrix @ v, N, tol=tol, most=N)
    size = np.abs(values).max()
    # The largest errors are those of a bound that does not know the next eigenvalue yet.
    assert abs(found.largest - values.max()) <= 2 * tol * size + 1e-12
    assert abs(found.smallest - values.min()) <= 2 * tol * size + 1e-12
    assert found.matvecs <= N and found.trace is None


def test_the_trace_lies_within_its_error():
    misses, errors = 0, []
    for seed in range(40):
        values = SPECTRA["a few large ones"]
        matrix = matrix_of(values, np.random.default_rng(seed))
        found = spectrum_ends(lambda v: matrix @ v, N, tol=1e-2, most=60, samples=20, seed=seed)  # noqa: B023
        misses += abs(found.trace.value - values.sum()) > 2.1 * found.trace.standard_error
        errors.append(abs(found.trace.value - values.sum()))
    # The large eigenvalues are usually in the basis. The standard deviation is then that of the rest, about
    # sqrt(2 * 150) * 0.1 / sqrt(20).
    assert misses <= 6 and np.median(errors) < 0.6


def test_a_start_near_the_eigenvectors_saves_products():
    values = SPECTRA["indefinite"]
    matrix = matrix_of(values)
    first = spectrum_ends(lambda v: matrix @ v, N, tol=1e-2, most=100)
    noise = RNG.normal(size=(N, N)) * 1e-3
    moved = matrix + noise + noise.T
    second = spectrum_ends(lambda v: moved @ v, N, tol=1e-2, most=100, start=first.start, seed=1)
    assert second.matvecs < first.matvecs
    ends = np.linalg.eigvalsh(moved)[[0, -1]]
    np.testing.assert_allclose([second.smallest, second.largest], ends, atol=0.2)


def test_a_new_direction_is_found_beside_the_old_ones():
    old, new = np.zeros(N), np.zeros(N)
    old[:2], new[:3] = (5.0, -4.0), (5.0, -4.0, 20.0)
    found = spectrum_ends(lambda v: old * v, N, tol=1e-3, most=60)
    again = spectrum_ends(lambda v: new * v, N, tol=1e-3, most=60, start=found.start)
    assert again.largest == pytest.approx(20.0, rel=1e-3)


def test_it_stops_after_most_products():
    count = []
    matrix = matrix_of(SPECTRA["without a gap"])

    def product(v):
        count.append(1)
        return matrix @ v

    found = spectrum_ends(product, N, tol=1e-9, most=7, samples=3)
    assert len(count) == found.matvecs == 10


def test_products_that_are_not_finite():
    with pytest.raises(FloatingPointError, match="not finite"):
        spectrum_ends(lambda v: v * np.nan, N, tol=1e-2, most=7)
