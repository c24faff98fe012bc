"""Distances to an error: closed forms on linear classifiers, and the figure of them."""

import dataclasses

import keras
import matplotlib
import numpy as np
import pytest
from keras import layers
from matplotlib import pyplot

import keras_gradtools as kg

matplotlib.use("agg")

# Two classes with logits 0 and w x + b: the margin of class 1 is w x + b, and an error is where it is 0.
W, B = np.array([3.0, -4.0, 1.0]), 0.5
X = np.array([[0.5, 0.2, 0.4], [0.9, 0.1, 0.5], [0.1, 0.3, 0.6], [0.4, 0.6, 0.2]], "float32")
Y = np.array([1, 1, 1, 1])
MARGIN = X.astype("float64") @ W + B
RIGHT = MARGIN > 0
DUAL = {"inf": np.abs(W).sum(), 2: np.linalg.norm(W)}
NORMS = pytest.mark.parametrize("norm", ["inf", 2])


def classifier(activation=None, w=W, b=B):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2, activation=activation)])
    model.set_weights([np.stack([0 * w, w], axis=1).astype("float32"), np.array([0.0, b], "float32")])
    return model


def report(model=None, x=X, y=Y, **options):
    options = {"clip": None, "max_epsilon": 2.0, "steps": 5, "verbose": 0} | options
    return kg.attacks.robustness_report(classifier() if model is None else model, x, y, **options)


def loss(margin):
    return np.log1p(np.exp(-margin))


def slope(margin, norm):
    return DUAL[norm] / (1 + np.exp(margin))


class TestLinearClassifier:
    @NORMS
    def test_first_order_is_the_distance(self, norm):
        found = report(norm=norm)
        expected = np.where(RIGHT, MARGIN / DUAL[norm], 0.0)
        assert 0 < RIGHT.sum() < len(X)
        np.testing.assert_array_equal(found.correct, RIGHT)
        np.testing.assert_allclose(found.margin, MARGIN, rtol=1e-5)
        np.testing.assert_allclose(found.loss, loss(MARGIN), rtol=1e-5)
        np.testing.assert_allclose(found.first_order, expected, rtol=1e-5)

    @NORMS
    def test_the_attack_finds_it_from_above(self, norm):
        found = report(norm=norm)
        expected = np.where(RIGHT, MARGIN / DUAL[norm], 0.0)
        assert np.all(found.attack >= expected - 1e-6)
        # Five steps of l2 do not quite find the nearest point.
        np.testing.assert_allclose(found.attack, expected, atol=2.0 / 2**12 + 1e-6, rtol=0.0 if norm == "inf" else 0.03)

    @pytest.mark.fast_on("torch")
    @NORMS
    def test_bounds_follow_their_formulas(self, norm):
        found = report(norm=norm)
        left = np.where(RIGHT, np.maximum(np.log(2) - loss(MARGIN), 0), 0)
        way = np.where(RIGHT, MARGIN / DUAL[norm], 0.0).clip(2 / 128)
        slopes, curvatures = [slope(MARGIN, norm)], [np.zeros(len(X))]
        for share in (0.25, 0.5, 1.0):
            h = share * way
            there = MARGIN - h * DUAL[norm]
            slopes.append(slope(there, norm))
            curvatures.append(2 * (loss(there) - loss(MARGIN) - h * slope(MARGIN, norm)) / h**2)
        largest_slope, curvature = np.max(slopes), np.max(curvatures)
        assert found.lipschitz == pytest.approx(largest_slope, rel=5e-3)
        assert found.curvature == pytest.approx(curvature, rel=2e-2)
        np.testing.assert_allclose(found.lipschitz_bound, left / largest_slope, rtol=5e-3)
        g = slope(MARGIN, norm)
        by_curvature = (-g + np.sqrt(g**2 + 2 * curvature * left)) / curvature
        np.testing.assert_allclose(found.curvature_bound, by_curvature, rtol=2e-2, atol=1e-6)

    @pytest.mark.fast_on("torch")
    @NORMS
    def test_here_both_bounds_are_below_the_distance(self, norm):
        found = report(norm=norm)
        for bound in (found.lipschitz_bound, found.curvature_bound):
            assert np.all(bound <= np.maximum(MARGIN, 0) / DUAL[norm] + 1e-6)
            assert np.all(bound[RIGHT] > 0)

    @pytest.mark.fast_on("torch")
    def test_probabilities_do_as_well_as_logits(self):
        by_logits, by_probabilities = report(), report(classifier("softmax"))
        for name in ("margin", "first_order", "lipschitz_bound", "curvature_bound", "attack"):
            np.testing.assert_allclose(getattr(by_probabilities, name), getattr(by_logits, name), rtol=2e-2, atol=1e-3)

    @pytest.mark.fast_on("torch")
    def test_one_hot_labels(self):
        np.testing.assert_array_equal(report(y=np.eye(2)[Y]).first_order, report().first_order)

    @pytest.mark.fast_on("torch")
    def test_batches_do_not_matter(self):
        whole, parts = report(), report(batch_size=3)
        np.testing.assert_allclose(parts.attack, whole.attack, atol=1e-3)
        np.testing.assert_allclose(parts.lipschitz, whole.lipschitz, rtol=1e-2)

    def test_two_calls_agree(self):
        np.testing.assert_array_equal(report(restarts=2).attack, report(restarts=2).attack)

    @pytest.mark.fast_on("torch")
    def test_the_range_of_the_data_is_kept(self):
        x = np.array([[1.0, 0.0, 1.0]], "float32")
        found = report(x=x, y=[1], clip=(0.0, 1.0), max_epsilon=None)
        np.testing.assert_allclose(found.attack, (3 + 1 + 0.5) / 8, atol=1e-3)
        # The second number cannot go up beyond 0.3.
        narrow = report(x=x, y=[1], clip=([0.0, 0.0, 0.0], [1.0, 0.3, 1.0]), max_epsilon=None)
        np.testing.assert_allclose(narrow.attack, (4.5 - 4 * 0.3) / 4, atol=1e-3)


class TestWhatCannotBeBroken:
    def test_is_infinitely_far(self):
        found = report(classifier(w=0 * W, b=1.0))
        for name in ("first_order", "lipschitz_bound", "curvature_bound", "attack"):
            assert np.all(np.isposinf(getattr(found, name))), name
        assert found.lipschitz == found.curvature == 0
        assert "inf" in str(found)

    def test_lies_beyond_the_largest_strength(self):
        found = report(max_epsilon=0.01)
        assert np.all(np.isposinf(found.attack[RIGHT]))

    def test_errors_are_at_distance_zero(self):
        found = report(y=1 - Y)
        np.testing.assert_array_equal(found.correct, ~RIGHT)
        for name in ("first_order", "lipschitz_bound", "curvature_bound", "attack"):
            assert np.all(getattr(found, name)[RIGHT] == 0), name


class TestShown:
    def test_as_a_table(self):
        found = report()
        lines = str(found).splitlines()
        assert lines[0].startswith("4 examples, 75.0% of them classified correctly; their l-infinity distances")
        median = np.quantile(found.attack[RIGHT], 0.5, method="lower")
        assert f"{median:9.4g}" in next(line for line in lines if line.startswith("found by the attack"))
        assert lines[1].endswith("<= attack") and "<= attack: the share of examples" in lines[-1]
        assert "100.0%" in next(line for line in lines if line.startswith("bound by the slope L"))

    def test_as_a_table_where_nothing_is_right(self):
        assert "0.0% of them" in str(report(x=X[~RIGHT], y=Y[~RIGHT]))

    def test_as_a_figure(self):
        found = report()
        shares, pairs = kg.plots.plot_robustness(found)
        attack = next(line for line in shares.lines if line.get_label() == "attack")
        x, y = attack.get_data()
        # The share of the examples that are further than 0 from an error is the accuracy.
        assert y[np.searchsorted(x, 1e-9)] == pytest.approx(RIGHT.mean())
        assert y[-1] == pytest.approx(0)
        first = next(line for line in pairs.lines if line.get_label().startswith("first order"))
        np.testing.assert_allclose(first.get_xdata(), found.attack[RIGHT])
        np.testing.assert_allclose(first.get_ydata(), found.first_order[RIGHT])
        pyplot.close(shares.figure)

    def test_as_a_figure_where_nothing_was_broken(self):
        pyplot.close(kg.plots.plot_robustness(report(max_epsilon=0.01))[0].figure)

    def test_as_a_figure_where_all_gradients_are_zero(self):
        found = dataclasses.replace(report(), attack=np.full(4, np.inf), first_order=np.full(4, np.inf))
        shares, _ = kg.plots.plot_robustness(found)
        assert shares.get_xlim() == (0.0, 1.0)
        pyplot.close(shares.figure)

    @pytest.mark.parametrize(
        ("given", "match"), [(3, "a report from kg.attacks.robustness_report"), ("none", "on none")]
    )
    def test_refused(self, given, match):
        given = report(x=X[~RIGHT], y=Y[~RIGHT]) if given == "none" else given
        with pytest.raises(ValueError, match=match):
            kg.plots.plot_robustness(given)


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"max_epsilon": 0.0}, "positive number as `max_epsilon`"),
            ({"max_epsilon": "far"}, "positive number as `max_epsilon`"),
            ({"max_epsilon": None}, "for data without a range"),
            ({"norm": 1}, "2 or 'inf' as `norm`"),
            ({"steps": 0}, "positive integer as `steps`|expects a positive integer"),
            ({"batch_size": 0}, "positive integer as `batch_size`"),
            ({"y": [1, 1]}, "one label for each example"),
            ({"y": [1, 1, 1, 7]}, "classes from 0 to 1"),
            ({"x": X.astype("int32")}, "floating-point"),
            ({"clip": (0.3, 1.0)}, "within the range `clip`"),
        ],
    )
    def test_options(self, options, match):
        with pytest.raises(ValueError, match=match):
            report(**options)
