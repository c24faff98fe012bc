"""`robustness_metrics` against closed forms on linear classifiers, and the signs of masked gradients."""

import functools
import math

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_gradtools.attacks import robustness_metrics
from keras_gradtools.attacks.masked_gradients import signs_of_masking

RNG = np.random.default_rng(2)
N, D = 24, 3
X = RNG.uniform(0.3, 0.7, (N, D)).astype("float32")
KERNEL = np.array([[1.0, -1.0], [-0.5, 1.5], [2.0, 0.5]], "float32")
BIAS = np.array([0.0, 0.8], "float32")
# Class 1 where this is above 0.
DIRECTION = KERNEL[:, 1] - KERNEL[:, 0]
SCORES = X @ DIRECTION + BIAS[1]
Y = (SCORES > 0).astype("int32")
Y[:3] = 1 - Y[:3]
# Some examples fall to it and some do not, in either norm, and none is on the edge.
EPSILONS = (0.03, 0.1)
FEW = {"steps": 4, "verbose": 0}


def linear(activation=None, scale=1):
    model = _linear(activation)
    model.set_weights([scale * KERNEL, scale * BIAS])
    return model


# What is compiled is kept with the model: most of the time would go there.
@functools.cache
def _linear(activation):
    return keras.Sequential([keras.Input((D,)), layers.Dense(2, activation=activation)])


def one_output():
    model = keras.Sequential([keras.Input((D,)), layers.Dense(1, activation="sigmoid")])
    model.set_weights([DIRECTION[:, None], BIAS[1:]])
    return model


class Quantized(layers.Layer):
    def call(self, x):
        return ops.round(8 * x) / 8 + 0 * x


def quantizing():
    model = keras.Sequential([keras.Input((D,)), Quantized(), layers.Dense(2)])
    model.set_weights([KERNEL, BIAS])
    return model


def accuracies(norm):
    """The clean accuracy, and that in the worst case of each strength."""
    correct = np.where(Y == 1, SCORES, -SCORES)
    dual = np.abs(DIRECTION).sum() if norm == "inf" else np.linalg.norm(DIRECTION)
    assert np.abs(correct[:, None] - dual * np.array([0.0, *EPSILONS])).min() > 1e-3
    return [(correct > dual * epsilon).mean() for epsilon in (0.0, *EPSILONS)]


def gradient_norms():
    """(1 - p) |w| with p the probability of the label."""
    return np.linalg.norm(DIRECTION) / (1 + np.exp(np.where(Y == 1, SCORES, -SCORES)))


class TestClosedForm:
    @pytest.mark.parametrize("norm", ["inf", 2])
    def test_a_linear_classifier(self, norm):
        found = robustness_metrics(linear(), X, Y, EPSILONS, norm=norm, **FEW)
        clean, *attacked = accuracies(norm)
        assert 1 > clean > attacked[0] > attacked[1] > 0
        lengths = gradient_norms()
        noise = {f"noise_{e:g}_accuracy": found.pop(f"noise_{e:g}_accuracy") for e in EPSILONS}
        assert all(a <= n <= clean for a, n in zip(attacked, noise.values(), strict=True)) and min(*noise.values()) < 1
        assert found == pytest.approx(
            {
                "clean_accuracy": clean,
                **{f"fgsm_{e:g}_accuracy": a for e, a in zip(EPSILONS, attacked, strict=True)},
                **{f"pgd_{e:g}_accuracy": a for e, a in zip(EPSILONS, attacked, strict=True)},
                "gradient_norm_mean": lengths.mean(),
                "gradient_norm_median": np.median(lengths),
                "gradient_norm_max": lengths.max(),
                "gradient_zero_share": 0.0,
                "jacobian_norm": np.linalg.norm(KERNEL),
                "masked_gradients": 0.0,
            },
            rel=1e-5,
        )
        assert all(type(value) is float for value in found.values())

    @pytest.mark.fast_on("torch")
    def test_the_size_of_the_batches_does_not_matter(self):
        expected = robustness_metrics(linear(), X, Y, EPSILONS, **FEW)
        found = robustness_metrics(linear(), X, Y, EPSILONS, batch_size=N // 2 - 1, **FEW)
        # Noise is drawn batch by batch.
        for name in expected.keys() - {f"noise_{e:g}_accuracy" for e in EPSILONS}:
            assert found[name] == pytest.approx(expected[name], rel=1e-5)

    @pytest.mark.fast_on("torch")
    def test_probabilities(self):
        found = robustness_metrics(linear("softmax"), X, Y, EPSILONS[0], **FEW)
        assert [found["clean_accuracy"], found["pgd_0.03_accuracy"]] == pytest.approx(accuracies("inf")[:2])
        assert found["gradient_norm_mean"] == pytest.approx(gradient_norms().mean(), rel=1e-5)
        # The Jacobian is that of the outputs: p (1 - p) w and its negative.
        p = 1 / (1 + np.exp(-SCORES))
        squares = 2 * (p * (1 - p)) ** 2 * (DIRECTION**2).sum()
        assert found["jacobian_norm"] == pytest.approx(math.sqrt(squares.mean()), rel=1e-5)

    @pytest.mark.fast_on("torch")
    def test_one_output(self):
        found = robustness_metrics(one_output(), X, Y, EPSILONS[1:], jacobian=False, **FEW)
        clean, _, attacked = accuracies("inf")
        names = ("clean_accuracy", "fgsm_0.1_accuracy", "pgd_0.1_accuracy", "gradient_norm_max")
        assert [found[n] for n in names] == pytest.approx([clean, attacked, attacked, gradient_norms().max()], rel=1e-5)
        assert "jacobian_norm" not in found and found["masked_gradients"] == 0

    def test_the_seed_repeats(self):
        once, again = (robustness_metrics(linear(), X, Y, EPSILONS, seed=5, **FEW) for _ in range(2))
        assert once == again

    def test_ties_are_no_answers(self):
        # A model that tells nothing apart is right nowhere, not everywhere.
        found = robustness_metrics(linear(scale=0), X, Y, jacobian=False, **FEW)
        assert found["clean_accuracy"] == found["pgd_0.1_accuracy"] == 0 and found["gradient_zero_share"] == 1


class TestMaskedGradients:
    def test_a_quantizing_model(self):
        found = robustness_metrics(quantizing(), X, Y, EPSILONS, **FEW)
        rounded = np.round(8 * X) / 8 @ DIRECTION + BIAS[1]
        clean = (rounded > 0) == (Y == 1)
        assert np.abs(rounded).min() > 1e-3 and found["clean_accuracy"] == pytest.approx(clean.mean())
        assert found["gradient_zero_share"] == 1 and found["gradient_norm_max"] == found["jacobian_norm"] == 0
        assert found["fgsm_0.1_accuracy"] == found["clean_accuracy"]
        assert found["masked_gradients"] >= 1

    def test_nothing_wrong_has_no_sign(self):
        numbers = {0.1: 0.5, 0.2: 0.3}
        assert signs_of_masking(numbers, numbers, numbers, 0.1, 0.1) == []

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (
                {"fgsm": {0.1: 0.48, 0.2: 0.3}},
                ["at strength 0.1, one step (FGSM, accuracy 48.0%)", "(PGD, accuracy 50.0%)"],
            ),
            (
                {"fgsm": {0.1: 0.5, 0.2: 0.1}},
                ["at strength 0.2, one step (FGSM, accuracy 10.0%)", "(PGD, accuracy 30.0%)"],
            ),
            (
                {"noise": {0.1: 0.25, 0.2: 0.3}},
                ["at strength 0.1, random noise (accuracy 25.0%)", "(PGD, accuracy 50.0%)"],
            ),
            ({"huge": 0.12}, ["the accuracy is 12.0%", "the 10.0% of guessing"]),
        ],
    )
    def test_each_sign_alone(self, change, words):
        numbers = {0.1: 0.5, 0.2: 0.3}
        (sign,) = signs_of_masking(
            **{"pgd": numbers, "fgsm": numbers, "noise": numbers, "huge": 0.1, "chance": 0.1, **change}
        )
        assert all(word in sign for word in words)

    @pytest.mark.parametrize("change", [{"fgsm": {0.1: 0.495}}, {"noise": {0.1: 0.495}}, {"huge": 0.105}])
    def test_one_point_is_no_sign(self, change):
        numbers = {0.1: 0.5}
        options = {"pgd": numbers, "fgsm": numbers, "noise": numbers, "huge": 0.1, "chance": 0.1, **change}
        assert signs_of_masking(**options) == []

    def test_all_signs_together(self):
        signs = signs_of_masking({0.1: 0.5, 0.2: 0.5}, {0.1: 0.3, 0.2: 0.3}, {0.1: 0.2, 0.2: 0.5}, 0.5, 0.1)
        assert len(signs) == 4


class TestErrors:
    @pytest.mark.parametrize("epsilons", [(), 0.0, -0.1, (0.1, 0.1), (0.1, math.nan), [math.inf], "0.1", None, (True,)])
    def test_epsilons(self, epsilons):
        with pytest.raises(ValueError, match="robustness_metrics expects a list of different positive .* `epsilons`"):
            robustness_metrics(linear(), X, Y, epsilons)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"jacobian": 1}, "robustness_metrics expects True or False as `jacobian`. Received: jacobian=1"),
            ({"batch_size": 0}, "robustness_metrics expects a positive integer as `batch_size`"),
            ({"verbose": "yes"}, "'auto', 0 or 1 as `verbose`. Received: verbose='yes'"),
            ({"norm": 1}, "2 or 'inf' as `norm`"),
            ({"clip": 1}, "range of the data as `clip`"),
            ({"clip": (0.4, 1.0)}, "robustness_metrics expects examples within the range `clip`"),
            ({"steps": 0}, "a positive integer as `steps`"),
            ({"restarts": 0}, "a positive integer as `restarts`"),
            ({"y": Y + 1}, "robustness_metrics expects classes from 0 to 1"),
            ({"x": X[0]}, "robustness_metrics expects examples of shape"),
            ({"model": lambda x: ops.sum(x)}, "robustness_metrics expects a classifier"),
        ],
    )
    def test_the_rest(self, change, message):
        options = {"model": linear(), "x": X, "y": Y, "verbose": 0, **change}
        with pytest.raises(ValueError, match=message):
            robustness_metrics(options.pop("model"), options.pop("x"), options.pop("y"), **options)
