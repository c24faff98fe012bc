"""`local_lipschitz`: the spectral norm nearby, and what the Jacobian does not see."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_gradtools.diagnostics import jacobian_spectrum, local_lipschitz

RNG = np.random.default_rng(14)


def smooth():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(8, "tanh"), layers.Dense(3)])
    draw = np.random.default_rng(1)
    model.set_weights([draw.normal(size=w.shape) for w in model.get_weights()])
    return model


def test_a_small_ball_has_the_spectral_norm():
    model, x = smooth(), RNG.normal(size=(5, 4)).astype("float32")
    found = local_lipschitz(model, x, radius=1e-2, iterations=40)
    np.testing.assert_allclose(found, jacobian_spectrum(model, x).spectral_norm, rtol=2e-2)


def test_it_is_a_lower_bound_and_near_the_best_of_a_grid():
    # f(x) = |x_1| + x_2 / 2: away from the kink the slope is (1, 1/2) or (-1, 1/2).
    x = np.array([[1.0, 0.0], [-1.0, 3.0]], "float32")
    slope = np.sqrt(1.25)
    found = local_lipschitz(lambda x: ops.abs(x[:, :1]) + x[:, 1:] / 2, x, radius=0.5, iterations=30)
    np.testing.assert_allclose(found, slope, rtol=1e-3)


def test_it_sees_past_a_kink():
    # The Jacobian at -0.1 is zero, and the function is not constant nearby.
    x = np.full((3, 1), -0.1, "float32")
    relu = lambda x: ops.relu(x)  # noqa: E731
    assert (jacobian_spectrum(relu, x).spectral_norm == 0).all()
    found = max(local_lipschitz(relu, x, radius=1.0, seed=seed).max() for seed in range(5))
    assert found == pytest.approx(0.9, rel=1e-3)


def test_several_inputs():
    both = lambda x: 3 * x[0] + 4 * x[1]  # noqa: E731
    x = [np.ones((2, 1), "float32"), np.ones((2, 1), "float32")]
    np.testing.assert_allclose(local_lipschitz(both, x), 5.0, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "match"),
    [({"radius": 0.0}, "as `radius`"), ({"radius": "1"}, "as `radius`"), ({"iterations": 0}, "as `iterations`")],
)
def test_options(options, match):
    with pytest.raises(ValueError, match=match):
        local_lipschitz(smooth(), np.ones((2, 4), "float32"), **options)
