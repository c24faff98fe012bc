"""`penalty_weight_sweep` on linear classifiers, whose accuracy under attack is known in closed form."""

import keras
import numpy as np
import pytest
from keras import layers
from matplotlib import pyplot

import keras_gradtools as kg
from keras_gradtools.regularization import PenaltyWeightSweep, penalty_weight_sweep

# Class 0 where x[0] > x[1].
X = np.array([[0.75, 0.5], [0.25, 0.5], [0.6, 0.3], [0.2, 0.6]], "float32")
Y = np.array([0, 1, 0, 1])
EPSILON = 0.2
MODEL = keras.Sequential([keras.Input((2,)), layers.Dense(2, use_bias=False)])


def train(penalty_weight):
    """Stands for a training: the logits are x[0] and (1 - penalty_weight) x[1]."""
    MODEL.set_weights([np.array([[1.0, 0.0], [0.0, 1.0 - penalty_weight]], "float32")])
    return MODEL


def accuracies(penalty_weight):
    """Without an attack, and in the worst case of an l-infinity attack: the margin falls by epsilon ||w||_1."""
    scores = X[:, 0] - (1 - penalty_weight) * X[:, 1]
    margins = np.where(Y == 0, scores, -scores)
    return np.mean(margins > 0), np.mean(margins > EPSILON * (2 - penalty_weight))


def sweep(weights=(0.25, 0.6), **options):
    return penalty_weight_sweep(train, weights, X, Y, EPSILON, **{"steps": 3, "verbose": 0, **options})


def made(clean, attacked, masked=(), max_drop=0.01):
    weights = np.array([0.0, 0.1, 0.3, 1.0])
    masked = np.isin(np.arange(4), masked)
    return PenaltyWeightSweep(
        weights, np.array(clean)[:, None], np.array(attacked)[:, None], masked, max_drop, 0.1, "inf", 100
    )


def test_accuracies_are_those_in_closed_form():
    found = sweep([0.6, 0.25, 0.25])
    assert found.penalty_weights.tolist() == [0.0, 0.25, 0.6]
    expected = np.array([accuracies(weight) for weight in (0.0, 0.25, 0.6)])
    np.testing.assert_allclose(found.clean[:, 0], expected[:, 0])
    np.testing.assert_allclose(found.attacked[:, 0], expected[:, 1])
    assert found.examples == 4
    assert len(np.unique(expected, axis=0)) == 3


def test_all_weights_start_from_the_same_seed():
    drawn = []

    def drawing(penalty_weight):
        drawn.append((penalty_weight, float(keras.random.uniform(()))))
        return train(penalty_weight)

    found = penalty_weight_sweep(drawing, [0.25], X, Y, EPSILON, seeds=[3, 4], steps=3, verbose=0)
    assert [weight for weight, _ in drawn] == [0.0, 0.0, 0.25, 0.25]
    (a, b, c, d) = (number for _, number in drawn)
    assert (a, b) == (c, d)
    assert a != b
    assert found.clean.shape == found.attacked.shape == (2, 2)


class TestSuggestion:
    def test_the_best_under_attack_that_loses_little(self):
        assert made([0.99, 0.99, 0.985, 0.90], [0.5, 0.7, 0.8, 0.9]).suggestion == 0.3

    def test_the_smallest_of_equal_ones(self):
        assert made([0.99] * 4, [0.5, 0.8, 0.8, 0.7]).suggestion == 0.1

    def test_what_is_allowed_includes_the_limit(self):
        # 0.95 - 0.01 is above 0.94 in floating-point numbers.
        assert made([0.95, 0.94, 0.5, 0.5], [0.5, 0.8, 0.8, 0.7]).suggestion == 0.1

    def test_masked_gradients_are_left_out(self):
        assert made([0.99] * 4, [0.5, 0.6, 0.8, 0.9], masked=[2, 3]).suggestion == 0.1

    def test_none_is_better(self):
        found = made([0.99] * 4, [0.5, 0.5, 0.4, 0.3])
        assert found.suggestion == 0.0
        assert str(found).endswith("No weight of the sweep is better than 0: try smaller ones.")

    def test_the_largest(self):
        assert str(made([0.99] * 4, [0.5, 0.6, 0.7, 0.8])).endswith("largest weight of the sweep: try larger ones.")


def test_standard_errors():
    found = made([0.9] * 4, [0.5] * 4)
    np.testing.assert_allclose(found.standard_errors(found.clean), 0.03)
    np.testing.assert_allclose(found.standard_errors(found.attacked), 0.05)


def test_shown_as_a_table():
    lines = str(made([0.99, 0.99, 0.985, 0.90], [0.5, 0.7, 0.8, 0.9], masked=[3])).splitlines()
    assert lines[0] == "100 examples, PGD up to 0.1 (l-infinity), 1 training for each weight"
    assert lines[4].split() == ["0.3", "98.5%", "80.0%", "suggested"]
    assert lines[5].endswith("gradients are masked")
    assert lines[6].startswith("Suggested weight: 0.3, which loses at most 1 points")


def test_shown_in_a_notebook():
    shown = made([0.99, 0.99, 0.985, 0.90], [0.5, 0.7, 0.8, 0.9])._repr_html_()
    assert "98.5%" in shown
    assert "Suggested weight: 0.3" in shown


def test_shown_as_a_figure():
    found = made([0.99, 0.99, 0.985, 0.90], [0.5, 0.7, 0.8, 0.9], masked=[3])
    _, ax = pyplot.subplots()
    assert kg.plots.plot_penalty_weight_sweep(found, ax) is ax
    clean, attacked = (bars.lines[0].get_ydata() for bars in ax.containers)
    np.testing.assert_allclose(clean, [99, 99, 98.5, 90])
    np.testing.assert_allclose(attacked, [50, 70, 80, 90])
    lines = {line.get_label(): line for line in ax.lines}
    np.testing.assert_allclose(lines["masked gradients"].get_xydata(), [[3, 90]])
    np.testing.assert_allclose(lines["suggested: 0.3"].get_xdata(), 2)
    np.testing.assert_allclose(lines["lowest clean accuracy allowed"].get_ydata(), 98)
    pyplot.close(ax.figure)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"weights": []}, r"list of positive numbers as `penalty_weights`.*\[0.01, 0.03"),
        ({"weights": [0.0]}, "list of positive numbers"),
        ({"weights": [0.1, -0.1]}, "list of positive numbers"),
        ({"max_drop": -0.1}, "number of 0 or more as `max_drop`"),
        ({"seeds": []}, "list of integers of 0 or more as `seeds`"),
        ({"norm": 1}, "norm"),
    ],
)
def test_refused(options, match):
    with pytest.raises(ValueError, match=match):
        sweep(**options)


def test_a_training_that_returns_no_model():
    with pytest.raises(ValueError, match=r"`train` returns the trained keras.Model. Received: None .* from train\(0\)"):
        penalty_weight_sweep(lambda weight: None, [0.1], X, Y, verbose=0)


def test_a_plot_of_something_else():
    with pytest.raises(ValueError, match=r"result of kg.regularization.penalty_weight_sweep. Received"):
        kg.plots.plot_penalty_weight_sweep(3)
