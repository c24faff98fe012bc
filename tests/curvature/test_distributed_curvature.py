"""examples/distributed_curvature.py on several devices against the same on one, in processes of their own."""

import keras
import numpy as np
import pytest

from keras_gradtools import backend as kernels
from tests.device_runs import one_and_several


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return one_and_several("distributed_curvature.py", tmp_path_factory.mktemp("distributed_curvature"))


@pytest.mark.parametrize("operator", ["Hessian", "GaussNewton", "Fisher"])
@pytest.mark.parametrize("what", ["loss", "gradient", "product", "products", "largest eigenvalue"])
def test_several_devices_equal_one(results, operator, what):
    one, several = (result[f"{operator}/{what}"] for result in results)
    assert np.abs(one).max() > 0
    np.testing.assert_allclose(several, one, rtol=0, atol=1e-4 * np.abs(one).max())


def test_on_one_device_nothing_is_shared():
    x = keras.ops.ones((4, 2))
    assert kernels.spread(x) is x
    v = keras.Variable(1.0)
    seen = []
    total = kernels.summed_over_replicas(lambda batch: seen.append(batch) or batch[0], (x,), v)
    assert len(seen) == 1 and total is x
    (total,), count = kernels.summed_over_processes([x], 3)
    assert total is x and count == 3
