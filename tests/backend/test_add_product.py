"""`add_product` of the kernels, against NumPy."""

import keras
import numpy as np
import pytest

from keras_gradtools import backend as kernels


@pytest.mark.float64
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-14)])
@pytest.mark.parametrize("shape", [(1, 1), (6, 6), (70, 33)])
def test_values(dtype, tolerance, shape):
    draw = np.random.default_rng(0)
    matrix, left, right = (draw.normal(size=size) for size in (shape, (shape[0], 2), (2, shape[1])))
    variable = keras.Variable(matrix, dtype=dtype, trainable=False)
    for factor in (0.3, 1.0):
        kernels.add_product(variable, factor, left, right)
        matrix = factor * matrix + left @ right
    found = keras.ops.convert_to_numpy(variable)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, matrix, rtol=0, atol=tolerance * np.abs(matrix).max())


@pytest.mark.parametrize("size", [6, 100, 257])
def test_symmetric_matrices_remain_symmetric(size):
    draw = np.random.default_rng(1)
    factors = draw.normal(size=(size, 2)).astype("float32")
    variable = keras.Variable(np.eye(size), dtype="float32", trainable=False)
    for factor in (0.7, 0.9):
        kernels.add_product(variable, factor, factors * [1.0, -1.0], factors.T)
    found = keras.ops.convert_to_numpy(variable)
    np.testing.assert_array_equal(found, found.T)
