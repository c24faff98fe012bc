"""Mixed second derivatives by one collapsed pass, for every operation of Keras, against nested derivatives."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from tests.atlas.all_cases import cases
from tests.atlas.cases import words

GENERIC = [case for case in cases("operations") if case.kind.startswith("generic")]
# One of each kind of rule, for the tests that are always run.
ALWAYS = {
    f"ops.{name}"
    for name in words(
        "tanh relu gelu softmax matmul einsum multiply divide where max sort cumsum take logsumexp layer_normalization "
        "conv dot_product_attention power std norm scan cond concatenate reshape transpose inv prod slice_update silu "
    )
}


def of_points(case):
    """The case as a function of points of shape (1, n), which hold all its arguments, and this point."""
    shapes = [x.shape for x in case.arrays]
    sizes = [int(np.prod(shape)) for shape in shapes]

    def fun(x):
        parts, start = [], 0
        for shape, size in zip(shapes, sizes, strict=True):
            parts.append(ops.reshape(x[0, start : start + size], shape))
            start += size
        outputs = [y for y in keras.tree.flatten(case.fun(*parts)) if keras.backend.is_float_dtype(y.dtype)]
        return ops.concatenate([ops.cast(ops.reshape(y, (1, -1)), x.dtype) for y in outputs], axis=1)

    return fun, np.concatenate([np.zeros(0), *(np.ravel(x) for x in case.arrays)])[None]


def numbers(x):
    return ops.convert_to_numpy(ops.stop_gradient(x))


def check(case):
    if keras.config.backend() == "tensorflow" and case.name == "ops.inner":
        pytest.skip("TensorFlow vectorizes a condition by both of its branches, of which one cannot run.")
    fun, x = of_points(case)
    random = np.random.default_rng(0)
    v, w = random.normal(size=(2, *x.shape))
    try:
        x, v, w = map(ops.convert_to_tensor, (x, v, w))
        kg.jit(fun)(x)
        expected = numbers(kg.jvp(lambda x: kg.jvp(fun, (x,), (v,))[1], (x,), (w,))[1])
    except Exception as error:
        pytest.skip(
            f"The framework has no second derivative, or cannot compile it: {type(error).__name__}: {error}"[:200]
        )
    coefficients = numbers(v).T @ numbers(w)
    found = numbers(kg.laplacian(fun, coefficients=coefficients)(x))
    scale = np.abs(expected[np.isfinite(expected)]).max(initial=1.0)
    finite = np.isfinite(expected)
    np.testing.assert_allclose(found[finite], expected[finite], rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.float64
@pytest.mark.parametrize("case", [c for c in GENERIC if c.name in ALWAYS], ids=lambda case: case.key)
def test_a_few_operations(case):
    check(case)


@pytest.mark.slow
@pytest.mark.float64
@pytest.mark.parametrize("case", [c for c in GENERIC if c.name not in ALWAYS], ids=lambda case: case.key)
def test_all_others(case):
    check(case)
