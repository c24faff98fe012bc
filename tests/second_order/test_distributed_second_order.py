"""examples/distributed_second_order.py on several devices against the same on one, in processes of their own."""

import numpy as np
import pytest

from tests.device_runs import one_and_several


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return one_and_several("distributed_second_order.py", tmp_path_factory.mktemp("distributed_second_order"))


@pytest.mark.parametrize(
    "optimizer", ["Newton", "LBFGS", "BFGS", "NewtonCG", "NewtonCG, Gauss-Newton", "LevenbergMarquardt"]
)
def test_several_devices_equal_one(results, optimizer):
    assert len(compared(results, optimizer)) == 9
    if optimizer == "NewtonCG, Gauss-Newton":
        # As many as make a preconditioner, before the last steps.
        assert results[0][f"{optimizer}/cg_iterations"][2] >= 10


@pytest.mark.parametrize("optimizer", ["LBFGS", "LevenbergMarquardt"])
def test_residuals_on_several_devices_equal_one(results, optimizer, backend):
    if backend == "tensorflow":
        pytest.skip("a replica of TensorFlow cannot be given its part of the points, see `test_several_replicas`")
    assert len(compared(results, f"{optimizer}, residuals")) == 8


def compared(results, name):
    """The keys of a run, whose results have to be the same."""
    one, several = results
    keys = [key for key in one if key.startswith(f"{name}/")]
    assert np.all(np.diff(one[f"{name}/loss"]) < 0)
    for key in keys:
        if key.endswith("/cg_iterations"):
            np.testing.assert_allclose(several[key], one[key], atol=4)
            continue
        # The damping depends on a ratio of small differences.
        tolerance = 1e-3 if key.endswith("/damping") else 1e-4
        np.testing.assert_allclose(several[key], one[key], rtol=0, atol=tolerance * np.abs(one[key]).max(), err_msg=key)
    return keys
