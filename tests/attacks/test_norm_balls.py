"""Perturbations of a bounded size against NumPy, and points drawn from the balls against their moments."""

import math

import numpy as np
import pytest
from keras import ops

from keras_gradtools.attacks import norm_balls
from tests.cases import close, tensor

RNG = np.random.default_rng(0)
NORMS = ["inf", 2]
SHAPES = [(6, 5), (6, 2, 3)]
N, D = 4000, 3


def length_of(v, norm):
    return np.linalg.norm(v.reshape(len(v), -1), ord=np.inf if norm == "inf" else 2, axis=1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
class TestAgainstNumPy:
    def test_lengths(self, norm, shape):
        v = RNG.normal(size=shape)
        close(norm_balls.lengths(tensor(v), norm), length_of(v, norm))

    def test_the_steepest_perturbation_has_length_one_and_goes_up_by_the_dual_length(self, norm, shape):
        g = RNG.normal(size=shape)
        flat = g.reshape(len(g), -1)
        dual = np.abs(flat).sum(axis=1) if norm == "inf" else np.linalg.norm(flat, axis=1)
        close(norm_balls.dual_lengths(tensor(g), norm), dual)
        steepest = ops.convert_to_numpy(norm_balls.steepest(tensor(g), norm))
        expected = np.sign(flat) if norm == "inf" else flat / dual[:, None]
        close(steepest, expected.reshape(shape))
        close(length_of(steepest, norm), np.ones(len(g)))
        close((steepest.reshape(flat.shape) * flat).sum(axis=1), dual)

    def test_projection_leaves_what_is_inside_and_brings_the_rest_to_the_nearest_point(self, norm, shape):
        v = RNG.normal(size=shape)
        epsilon = length_of(v, norm) * np.array([0.3, 0.9, 1.0, 1.5, 4.0, 0.0])
        per_example = epsilon.reshape(-1, *[1] * (len(shape) - 1))
        shrunk = v * np.minimum([0.3, 0.9, 1.0, 1.5, 4.0, 0.0], 1.0).reshape(per_example.shape)
        expected = np.clip(v, -per_example, per_example) if norm == "inf" else shrunk
        close(norm_balls.projected(tensor(v), tensor(epsilon), norm), expected)


class TestExtremes:
    @pytest.mark.parametrize("scale", [1e-30, 1e-25, 1.0, 1e25])
    def test_squares_out_of_range(self, scale):
        g = tensor(scale * np.array([[3.0, -4.0], [0.0, 2.0]]))
        expected = np.array([5.0, 2.0])
        close(norm_balls.lengths(g, 2) / np.float32(scale), expected)
        close(norm_balls.dual_lengths(g, 2) / np.float32(scale), expected)
        close(norm_balls.steepest(g, 2), [[0.6, -0.8], [0.0, 1.0]])

    @pytest.mark.parametrize("norm", NORMS)
    def test_zero_stays_zero(self, norm):
        zero = tensor(np.zeros((2, 3)))
        for found in (norm_balls.steepest(zero, norm), norm_balls.projected(zero, tensor([0.0, 1.0]), norm)):
            close(found, np.zeros((2, 3)))
        close(norm_balls.lengths(zero, norm), np.zeros(2))


@pytest.mark.parametrize("norm", NORMS)
class TestRandomPoints:
    def draw(self, norm, seed=3, epsilon=0.5, shape=(N, D)):
        epsilon = np.broadcast_to(epsilon, shape[:1])
        return ops.convert_to_numpy(norm_balls.random_points(tensor(np.zeros(shape)), tensor(epsilon), norm, seed))

    def test_radii_are_those_of_a_uniform_distribution(self, norm):
        # P(radius <= r) = r^D in the unit ball of any norm.
        radii = length_of(self.draw(norm), norm) / 0.5
        assert radii.max() <= 1 + 1e-6
        mean, square = D / (D + 1), D / (D + 2)
        assert abs(radii.mean() - mean) < 5 * math.sqrt((square - mean**2) / N)
        for share in (0.1, 0.5, 0.9):
            assert abs((radii**D < share).mean() - share) < 5 * math.sqrt(share * (1 - share) / N)

    def test_no_direction_is_preferred(self, norm):
        points = self.draw(norm) / 0.5
        variance = 1 / 3 if norm == "inf" else 1 / (D + 2)
        np.testing.assert_allclose(points.mean(axis=0), 0.0, atol=5 * math.sqrt(variance / N))
        np.testing.assert_allclose(points.T @ points / N, variance * np.eye(D), atol=5 * variance / math.sqrt(N))

    def test_the_seed_repeats_and_each_epsilon_scales(self, norm):
        epsilon = np.linspace(0.0, 2.0, N)
        points = self.draw(norm, epsilon=1.0)
        np.testing.assert_array_equal(self.draw(norm, epsilon=1.0), points)
        close(self.draw(norm, epsilon=epsilon), epsilon[:, None] * points)
        assert np.abs(self.draw(norm, seed=4, epsilon=1.0) - points).max() > 0.1

    def test_images_are_in_a_ball_of_all_their_numbers(self, norm):
        shape = (N // 4, 2, 3, 1)
        radii = length_of(self.draw(norm, epsilon=1.0, shape=shape), norm)
        # The mean radius of a ball in six dimensions, not in three or two.
        assert radii.max() <= 1 + 1e-6 and abs(radii.mean() - 6 / 7) < 5 * math.sqrt((6 / 8 - (6 / 7) ** 2) / shape[0])


@pytest.mark.parametrize("norm", ["inf", math.inf, np.inf, 2, 2.0, np.int64(2)])
def test_spellings_of_a_norm(norm):
    assert norm_balls.require_norm("PGD", norm) == (2 if norm == 2 else "inf")


@pytest.mark.parametrize("norm", [1, "2", None, True, -math.inf])
def test_other_norms_are_refused(norm):
    with pytest.raises(ValueError, match="PGD expects 2 or 'inf' as `norm`.*Received: norm="):
        norm_balls.require_norm("PGD", norm)
