"""The sum of the Gauss-Newton matrices of examples, against the sum of one matrix for each example."""

import numpy as np
import pytest

from keras_gradtools.second_order.example_jacobians import ExampleJacobians

RNG = np.random.default_rng(0)
EXAMPLES, OUTPUTS, WEIGHTS = 5, 3, 7
ROOTS = RNG.normal(size=(EXAMPLES, OUTPUTS, OUTPUTS))
HESSIANS = {
    "equal": np.broadcast_to(2.0 * np.eye(OUTPUTS), ROOTS.shape),
    "diagonal": np.eye(OUTPUTS) * RNG.uniform(0.5, 3.0, (EXAMPLES, 1, OUTPUTS)),
    "with zeros": np.eye(OUTPUTS) * RNG.integers(0, 3, (EXAMPLES, 1, OUTPUTS)),
    "negative": np.eye(OUTPUTS) * RNG.normal(size=(EXAMPLES, 1, OUTPUTS)),
    "full": ROOTS @ np.swapaxes(ROOTS, 1, 2),
}


@pytest.mark.parametrize("name", HESSIANS)
def test_the_sum_of_gauss_newton_matrices(name):
    jacobians = RNG.normal(size=(EXAMPLES, OUTPUTS, WEIGHTS))
    found = ExampleJacobians(jacobians, HESSIANS[name], np.zeros((EXAMPLES, OUTPUTS)), 0.0).gauss_newton()
    expected = sum(j.T @ h @ j for j, h in zip(jacobians, HESSIANS[name], strict=True))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(found, found.T)
