"""`fgsm` and `pgd` against closed forms on linear models, and the attacks as objects."""

import functools
import json
import math
import random

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_gradtools.attacks import FGSM, PGD, GaussianNoise, fgsm, pgd
from keras_gradtools.attacks.ascent import CompiledAscent
from keras_gradtools.attacks.objectives import Objective
from tests.cases import close, tensor
from tests.compilers import compiled_by

RNG = np.random.default_rng(1)
N, D, K = 8, 4, 3
X = RNG.uniform(0.3, 0.7, (N, D)).astype("float32")
W = RNG.normal(size=(D, K)).astype("float32")
B = RNG.normal(size=K).astype("float32")
Y = RNG.integers(0, K, N)
EPSILON = 0.1
NORMS = ["inf", 2]


def linear(weights=W, bias=None, activation=None):
    model = _linear(weights.shape, activation)
    model.set_weights([weights, np.zeros(weights.shape[1]) if bias is None else bias])
    return model


# What is compiled is kept with the model: most of the time would go there.
@functools.cache
def _linear(shape, activation):
    return keras.Sequential([keras.Input(shape[:1]), layers.Dense(shape[1], activation=activation)])


@functools.cache
def network():
    """A classifier that bends."""
    model = keras.Sequential([keras.Input((D,)), layers.Dense(6, activation="tanh"), layers.Dense(K)])
    draw = np.random.default_rng(5).normal
    model.set_weights([3 * draw(size=(D, 6)), draw(size=6), 2 * draw(size=(6, K)), draw(size=K)])
    return model


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def cross_entropy_gradient(x=X, y=Y, w=W, b=0.0):
    p = softmax(x.astype("float64") @ w + b)
    return (p - np.eye(w.shape[1])[y]) @ w.T


def margins(model, x, y):
    z = ops.convert_to_numpy(model(x)).astype("float64")
    others = np.where(np.eye(K, dtype=bool)[y], -np.inf, z).max(axis=1)
    return others - z[np.arange(len(y)), y]


def step(g, norm, epsilon=EPSILON):
    return epsilon * (np.sign(g) if norm == "inf" else g / np.linalg.norm(g, axis=1, keepdims=True))


def near(actual, desired, atol=1e-6):
    assert isinstance(actual, np.ndarray)
    np.testing.assert_allclose(actual, desired, rtol=0, atol=atol)


def first_output(y, y_pred):
    return y_pred[:, 0]


class TestFGSM:
    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("epsilon", [EPSILON, 0.5])
    def test_closed_form(self, norm, epsilon):
        expected = np.clip(X + step(cross_entropy_gradient(b=B), norm, epsilon), 0, 1)
        assert ((expected == 0) | (expected == 1)).any() == (epsilon == 0.5)
        near(fgsm(linear(bias=B), X, Y, epsilon, norm=norm, verbose=0), expected)

    def test_infinity_may_be_spelled_as_a_number(self):
        near(fgsm(linear(), X, Y, EPSILON, norm=math.inf, verbose=0), X + step(cross_entropy_gradient(), "inf"))

    def test_the_range_may_be_an_array(self):
        low, high = np.linspace(0.0, 0.28, D), np.linspace(0.72, 1.0, D)
        expected = np.clip(X + step(cross_entropy_gradient(), "inf", 0.4), low, high)
        near(fgsm(linear(), X, Y, 0.4, clip=(low, high), verbose=0), expected)

    def test_without_a_range_nothing_is_clipped(self):
        expected = X + step(cross_entropy_gradient(), "inf", 5.0)
        assert expected.min() < -3 and expected.max() > 4
        near(fgsm(linear(), X, Y, 5.0, clip=None, verbose=0), expected)

    @pytest.mark.parametrize("norm", NORMS)
    def test_targeted_goes_down_to_the_target(self, norm):
        expected = X - step(cross_entropy_gradient(), norm)
        near(fgsm(linear(), X, Y, EPSILON, norm=norm, targeted=True, verbose=0), expected)

    def test_labels_in_all_their_forms(self):
        expected = X + step(cross_entropy_gradient(), "inf")
        for y in (Y.tolist(), Y[:, None], Y.astype("float32"), np.eye(K)[Y], tensor(Y, "int32")):
            near(fgsm(linear(), X, y, EPSILON, verbose=0), expected)
        near(fgsm(linear(), X, 2, EPSILON, verbose=0), X + step(cross_entropy_gradient(y=np.full(N, 2)), "inf"))

    def test_the_margin_is_that_to_the_best_other_class(self):
        z = X @ W
        best = np.where(np.eye(K, dtype=bool)[Y], -np.inf, z).argmax(axis=1)
        near(fgsm(linear(), X, Y, EPSILON, norm=2, loss="margin", verbose=0), X + step((W[:, best] - W[:, Y]).T, 2))

    def test_images(self):
        x = X.reshape(N, 2, 2, 1)
        model = keras.Sequential([keras.Input((2, 2, 1)), layers.Flatten(), linear()])
        expected = X + step(cross_entropy_gradient(), 2)
        near(fgsm(model, x, Y, EPSILON, norm=2, verbose=0), expected.reshape(x.shape))

    @pytest.mark.parametrize("norm", NORMS)
    def test_probabilities_are_attacked_as_their_logits(self, norm):
        expected = X + step(cross_entropy_gradient(b=B), norm)
        near(fgsm(linear(bias=B, activation="softmax"), X, Y, EPSILON, norm=norm, verbose=0), expected, atol=1e-5)

    @pytest.mark.parametrize("activation", [None, "sigmoid"])
    @pytest.mark.parametrize("norm", NORMS)
    def test_one_output_is_that_of_class_one(self, activation, norm):
        w = W[:, :1]
        y = np.arange(N) % 2
        expected = X + step(np.where(y[:, None], -1.0, 1.0) * w[:, 0], norm)
        near(fgsm(linear(w, activation=activation), X, y, EPSILON, norm=norm, verbose=0), expected, atol=1e-5)

    def test_a_sigmoid_is_found_in_a_model_within_a_model(self):
        # After a squaring layer, a probability taken for a logit is right on the wrong side of a half.
        inner = keras.Sequential([keras.Input((D,)), layers.Dense(D, activation="relu"), layers.Dense(1)])
        inner.add(layers.Activation("sigmoid"))
        w = np.abs(W[:, :1])
        inner.set_weights([np.eye(D), np.zeros(D), w, -X.mean(axis=0) @ w])
        outer = keras.Sequential([keras.Input((D,)), inner])
        is_one = (X - X.mean(axis=0)) @ w[:, 0] > 0
        assert 0 < is_one.sum() < N
        found = pgd(outer, X, is_one.astype(int), EPSILON, clip=None, random_start=False, verbose=0)
        near(found, X + step(np.where(is_one[:, None], -1.0, 1.0) * w[:, 0], "inf"), atol=1e-5)

    def test_a_function_as_loss(self):
        near(fgsm(linear(), X, Y, EPSILON, norm=2, loss=first_output, verbose=0), X + step(np.tile(W[:, 0], (N, 1)), 2))

    @pytest.mark.parametrize("loss", [keras.losses.MeanSquaredError(), keras.losses.MeanSquaredError("sum"), "mse"])
    def test_a_keras_loss(self, loss):
        y = RNG.normal(size=(N, K)).astype("float32")
        g = 2 / K * (X @ W - y) @ W.T
        near(fgsm(linear(), X, y, EPSILON, norm=2, loss=loss, verbose=0), X + step(g, 2), atol=1e-5)

    def test_a_function_as_model(self):
        powers = X.astype("float64") ** 3
        found = fgsm(lambda x: x**4 / 4, X, 0, EPSILON, norm=2, loss=lambda y, z: ops.sum(z, axis=1), verbose=0)
        near(found, X + step(powers, 2))

    @pytest.mark.parametrize("norm", NORMS)
    def test_half_precision(self, norm):
        x = X.astype("float16")
        found = fgsm(linear(bias=B), x, Y, EPSILON, norm=norm, verbose=0)
        assert found.dtype == "float16"
        near(found.astype("float32"), X + step(cross_entropy_gradient(b=B), norm), atol=2e-3)

    @pytest.mark.parametrize("norm", NORMS)
    def test_mixed_precision(self, norm):
        dense = layers.Dense(K, dtype="mixed_float16")
        model = keras.Sequential([keras.Input((D,)), dense])
        model.set_weights([W, B])
        found = fgsm(model, X, Y, EPSILON, norm=norm, verbose=0)
        assert found.dtype == "float32"
        near(found, X + step(cross_entropy_gradient(b=B), norm), atol=2e-3)

    @pytest.mark.parametrize("norm", NORMS)
    def test_a_zero_gradient_leaves_the_examples(self, norm):
        for found in (
            fgsm(linear(0 * W), X, Y, EPSILON, norm=norm, verbose=0),
            pgd(linear(0 * W), X, Y, EPSILON, norm=norm, loss="margin", random_start=False, verbose=0),
            ops.convert_to_numpy(FGSM(EPSILON, norm).perturb(linear(0 * W), tensor(X), Y)),
        ):
            np.testing.assert_array_equal(found, X)

    @pytest.mark.parametrize("norm", NORMS)
    def test_strength_zero_leaves_the_examples(self, norm):
        for found in (
            fgsm(linear(), X, Y, 0.0, norm=norm, verbose=0),
            pgd(linear(), X, Y, 0, norm=norm, step_size=0.1, seed=0, verbose=0),
        ):
            np.testing.assert_array_equal(found, X)

    @pytest.mark.parametrize("batch_size", [1, 3, 4, N])
    def test_the_size_of_the_batches_does_not_matter(self, batch_size):
        expected = X + step(cross_entropy_gradient(), 2)
        near(fgsm(linear(), X, Y, EPSILON, norm=2, batch_size=batch_size, verbose=0), expected)

    def test_one_example(self):
        expected = (X + step(cross_entropy_gradient(), 2))[:1]
        near(fgsm(linear(), X[:1], Y[:1], EPSILON, norm=2, verbose=0), expected)

    def test_tensors_as_examples(self):
        near(fgsm(linear(), tensor(X), Y, EPSILON, verbose=0), X + step(cross_entropy_gradient(), "inf"))

    def test_a_progress_bar_only_where_it_is_asked_for(self, capsys):
        fgsm(linear(), X, Y, EPSILON, batch_size=3, verbose=0)
        assert capsys.readouterr().out == ""
        fgsm(linear(), X, Y, EPSILON, batch_size=3, verbose=1)
        assert "3/3" in capsys.readouterr().out


@functools.cache
def with_state():
    model = keras.Sequential(
        [keras.Input((D,)), layers.BatchNormalization(), layers.Dropout(0.5, seed=1), layers.Dense(K)]
    )
    gamma, beta, mean = np.array([1.0, 2.0, 0.5, 3.0]), np.full(D, 0.1), np.full(D, 0.5)
    model.layers[0].set_weights([gamma, beta, mean, np.array([0.2, 1.0, 0.4, 2.0])])
    model.layers[-1].set_weights([W, B])
    return model


class TestNothingChanges:
    ATTACKS = [FGSM(EPSILON), PGD(EPSILON, steps=2, seed=4)]

    def test_the_model_is_called_in_inference_mode(self):
        gamma, beta, mean, variance = with_state().layers[0].get_weights()
        scale = gamma / np.sqrt(variance + 1e-3)
        g = cross_entropy_gradient((X - mean) * scale + beta, b=B) * scale
        near(fgsm(with_state(), X, Y, EPSILON, norm=2, verbose=0), X + step(g, 2), atol=1e-5)

    @pytest.mark.parametrize("attack", ATTACKS, ids=["FGSM", "PGD"])
    def test_weights_statistics_seeds_and_the_examples(self, attack):
        model, x = with_state(), X.copy()
        before = [ops.convert_to_numpy(v).copy() for v in model.variables]
        assert len(before) > 6  # the seed of the dropout as well
        attack.generate(model, x, Y, verbose=0)
        for was, now in zip(before, model.variables, strict=True):
            np.testing.assert_array_equal(ops.convert_to_numpy(now), was)
        np.testing.assert_array_equal(x, X)

    @pytest.mark.parametrize("attack", ATTACKS, ids=["FGSM", "PGD"])
    def test_generators_of_random_numbers(self, attack):
        def draws():
            return [random.random(), np.random.random(), *ops.convert_to_numpy(keras.random.normal((3,)))]

        model = with_state()
        keras.utils.set_random_seed(7)
        expected = draws()
        keras.utils.set_random_seed(7)
        attack.generate(model, X, Y, verbose=0)
        assert draws() == expected


class TestPGD:
    @pytest.mark.parametrize("epsilon", [0.05, 0.4])
    @pytest.mark.parametrize("norm", NORMS)
    def test_it_stays_in_the_ball_and_in_the_range(self, norm, epsilon):
        found = pgd(network(), X, Y, epsilon, norm=norm, clip=(0.1, 0.8), steps=5, restarts=2, seed=0, verbose=0)
        moved = np.linalg.norm(found - X, ord=np.inf if norm == "inf" else 2, axis=1)
        assert moved.max() <= epsilon + 1e-6 and moved.max() > 0.8 * epsilon
        assert found.min() >= np.float32(0.1) and found.max() <= np.float32(0.8)

    @pytest.mark.parametrize("epsilon", [EPSILON, 0.5])
    @pytest.mark.parametrize("targeted", [False, True])
    def test_the_worst_case_of_a_linear_model(self, epsilon, targeted):
        y = np.arange(N) % 2
        away = np.where(y[:, None], -1.0, 1.0) * (W[:, 1] - W[:, 0])
        expected = np.clip(X + step(-away if targeted else away, "inf", epsilon), 0, 1)
        near(pgd(linear(W[:, :2]), X, y, epsilon, targeted=targeted, seed=0, verbose=0), expected, atol=1e-5)

    def test_the_worst_case_of_a_linear_model_in_the_l2_ball(self):
        y = np.arange(N) % 2
        away = np.where(y[:, None], -1.0, 1.0) * (W[:, 1] - W[:, 0])
        found = pgd(linear(W[:, :2]), X, y, EPSILON, norm=2, clip=None, step_size=EPSILON, seed=0, verbose=0)
        near(found, X + step(away, 2), atol=2e-4)

    def test_it_is_at_least_as_bad_as_fgsm(self):
        model, options = network(), {"random_start": False, "step_size": EPSILON, "loss": "cross_entropy"}
        one = margins(model, fgsm(model, X, Y, EPSILON, verbose=0), Y)
        many = margins(model, pgd(model, X, Y, EPSILON, steps=5, verbose=0, **options), Y)
        assert (many >= one - 1e-5).all() and (many > one + 1e-3).any()

    def test_one_step_is_fgsm_where_that_is_worse(self):
        def loss(y, z):
            return -ops.square(z[:, 0] - 0.6)

        # The step goes too far from the second and from the fourth.
        x = np.array([[0.5], [0.58], [0.75], [0.63]], "float32")
        one = fgsm(lambda x: x, x, 0, 0.1, loss=loss, verbose=0)
        near(one, [[0.6], [0.68], [0.65], [0.53]])
        found = pgd(lambda x: x, x, 0, 0.1, loss=loss, steps=1, step_size=0.1, random_start=False, verbose=0)
        near(found, [[0.6], [0.58], [0.65], [0.63]])

    @pytest.mark.parametrize("peak", [0.5, 0.6, 0.7, 0.8])
    def test_the_worst_point_on_the_way_is_returned(self, peak):
        def loss(y, z):
            # Its gradient leads on and on, to 0.6, 0.7 and 0.8.
            return (ops.stop_gradient(-ops.square(z - peak)) + z - ops.stop_gradient(z))[:, 0]

        x = np.array([[0.5], [0.8]], "float32")
        found = pgd(lambda x: x, x, 0, 0.3, loss=loss, steps=3, step_size=0.1, random_start=False, verbose=0)
        near(found, [[peak], [0.8]])

    def test_what_is_worst_already_stays(self):
        def loss(y, z):
            return -ops.sum(ops.square(z - tensor(X)), axis=1)

        np.testing.assert_array_equal(pgd(lambda x: x, X, 0, EPSILON, loss=loss, seed=0, verbose=0), X)

    def test_the_margin_leads_on_where_the_cross_entropy_is_flat(self):
        # Logits apart by thousands: the probabilities are exactly 0 and 1.
        w = 1e4 * W[:, :2]
        y = (X @ w).argmax(axis=1)
        expected = X + step(np.where(y[:, None], -1.0, 1.0) * (W[:, 1] - W[:, 0]), "inf", 0.2)
        for loss in ("margin", None):
            near(pgd(linear(w), X, y, 0.2, loss=loss, random_start=False, steps=5, verbose=0), expected, atol=1e-5)

    def test_the_target_is_reached(self):
        target = (Y + 1) % K
        found = pgd(network(), X, target, 0.4, targeted=True, seed=0, verbose=0)
        own, others = margins(network(), found, target), margins(network(), X, target)
        assert (own <= others).all() and (own < 0).sum() > (others < 0).sum()


def starts(**options):
    """Where the starts lead that are worse than the examples: no step is taken."""
    options = {"seed": 0, "loss": first_output, "steps": 1, "step_size": 0.0, "verbose": 0, **options}
    return pgd(linear(), X, 0, EPSILON, **options)


class TestRandomStarts:
    @pytest.mark.parametrize("norm", NORMS)
    def test_the_seed_repeats_them(self, norm):
        found = starts(norm=norm)
        np.testing.assert_array_equal(starts(norm=norm), found)
        assert not np.array_equal(starts(norm=norm, seed=1), found)
        assert 0 < (found != X).any(axis=1).sum() < N

    def test_without_a_seed_they_come_from_pythons_generator(self):
        random.seed(3)
        found = [starts(seed=None) for _ in range(2)]
        assert not np.array_equal(*found)
        random.seed(3)
        np.testing.assert_array_equal(starts(seed=None), found[0])

    def test_each_batch_has_its_own(self):
        x = np.tile(X[:1], (4, 1))
        options = {"loss": first_output, "steps": 1, "step_size": 0.0, "restarts": 8, "seed": 0, "verbose": 0}
        found = pgd(linear(), x, 0, EPSILON, batch_size=2, **options)
        assert len(np.unique(found, axis=0)) == 4

    @pytest.mark.parametrize("norm", NORMS)
    def test_the_worst_of_all_restarts_is_returned(self, norm):
        one, many = ((starts(norm=norm, restarts=r) @ W)[:, 0] for r in (1, 5))
        assert (many >= one - 1e-6).all() and (many > one + 1e-3).any() and (many > X @ W[:, 0] + 1e-3).all()

    def test_there_are_none_if_not_asked_for(self):
        np.testing.assert_array_equal(starts(random_start=False), X)


class TestPerturb:
    @pytest.mark.parametrize("norm", NORMS)
    def test_fgsm(self, norm):
        expected = X + step(cross_entropy_gradient(), norm)
        close(FGSM(EPSILON, norm).perturb(linear(), tensor(X), tensor(Y, "int32")), expected)

    def test_pgd_is_the_end_of_one_run_on_the_first_loss(self):
        attack = PGD(EPSILON, steps=2, step_size=0.04, random_start=False)
        g = cross_entropy_gradient()
        middle = X + step(g, "inf", 0.04)
        close(attack.perturb(linear(), tensor(X), Y), middle + step(cross_entropy_gradient(middle), "inf", 0.04))

    def test_pgd_starts_at_random(self):
        attack, seeds = PGD(EPSILON, loss=first_output, steps=1, step_size=0.0), keras.random.SeedGenerator(1)
        found = [ops.convert_to_numpy(attack.perturb(linear(), tensor(X), Y, seeds)) for _ in range(2)]
        assert np.abs(found[0] - found[1]).max() > 0.01
        for each in found:
            assert 0.5 * EPSILON < np.abs(each - X).max() <= EPSILON + 1e-6

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_noise_has_its_deviation(self, dtype):
        noise = self.noise(dtype)
        assert abs(noise.mean()) < 5 * 0.3 / math.sqrt(noise.size)
        assert abs(noise.std() - 0.3) < 5 * 0.3 / math.sqrt(2 * noise.size)

    def test_noise_is_clipped(self):
        noise = self.noise("float32", (0.4, 0.6))
        # P(|z| > 1/3) of a normal distribution.
        share = math.erfc(1 / 3 / math.sqrt(2))
        assert np.abs(noise).max() < 0.1001 and abs((np.abs(noise) > 0.0999).mean() - share) < 0.01

    @staticmethod
    def noise(dtype, clip=None):
        found = GaussianNoise(0.3, clip).perturb(None, tensor(np.full((1000, 100), 0.5), dtype), None, seed=0)
        assert keras.backend.standardize_dtype(found.dtype) == dtype
        return ops.convert_to_numpy(found).astype("float64") - 0.5


KERAS_LOSS = keras.losses.MeanSquaredError("sum")


class TestConfig:
    ATTACKS = [
        FGSM(0.1),
        FGSM(0.3, 2, None, "margin", True),
        FGSM(0.1, loss=KERAS_LOSS, clip=(np.zeros(D), np.ones(D))),
        PGD(0.1),
        PGD(0.2, 2, (-1, 2), "margin", 3, 2, 0.05, False, True, 5),
        PGD(0.1, loss=KERAS_LOSS),
        GaussianNoise(0.3),
        GaussianNoise(0.3, (0, 1)),
    ]

    @pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.name)
    def test_round_trip(self, attack):
        saved = json.loads(json.dumps(keras.saving.serialize_keras_object(attack)))
        for again in (type(attack).from_config(attack.get_config()), keras.saving.deserialize_keras_object(saved)):
            assert type(again) is type(attack) and again.get_config() == attack.get_config()
            assert again == attack and hash(again) == hash(attack) and repr(again) == repr(attack)

    def test_a_loaded_loss_attacks_as_before(self):
        y = RNG.normal(size=(N, K)).astype("float32")
        attack = FGSM(EPSILON, 2, loss=KERAS_LOSS)
        again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(attack))
        near(again.generate(linear(), X, y, verbose=0), X + step((X @ W - y) @ W.T, 2), atol=1e-5)

    def test_other_options_are_another_attack(self):
        assert len(set(self.ATTACKS)) == len(self.ATTACKS)
        assert FGSM(0.1) != FGSM(0.2) and PGD(0.1) != PGD(0.1, seed=0) and FGSM(0.1) != PGD(0.1) and FGSM(0.1) != 0.1
        assert FGSM(0.1) == FGSM(0.1, "inf", (0, 1), "cross_entropy") and FGSM(0.1, math.inf) == FGSM(0.1)

    def test_repr_names_the_options(self):
        assert repr(GaussianNoise(0.3)) == "GaussianNoise(stddev=0.3, clip=None)"
        expected = "FGSM(epsilon=0.1, norm='inf', clip=(0.0, 1.0), loss='cross_entropy', targeted=False)"
        assert repr(FGSM(0.1)) == expected

    def test_objects_attack_as_the_functions_do(self):
        options = {"steps": 2, "norm": 2, "seed": 3}
        expected = pgd(linear(), X, Y, EPSILON, verbose=0, **options)
        np.testing.assert_array_equal(PGD(EPSILON, **options).generate(linear(), X, Y, verbose=0), expected)


class TestErrors:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: FGSM(-0.1), "FGSM expects a number of 0 or more as `epsilon`. Received: epsilon=-0.1"),
            (lambda: FGSM(True), "epsilon=True"),
            (lambda: FGSM("0.1"), "epsilon='0.1'"),
            (lambda: PGD(math.nan), "PGD expects a number .* as `epsilon`. Received: epsilon=nan"),
            (lambda: FGSM(0.1, norm=1), "FGSM expects 2 or 'inf' as `norm`.* Received: norm=1"),
            (lambda: FGSM(0.1, clip=(1, 0)), "range of the data as `clip`.* Received: clip=\\(1, 0\\)"),
            (lambda: FGSM(0.1, clip=1.0), "range of the data as `clip`"),
            (lambda: FGSM(0.1, clip=(0.0, math.nan)), "range of the data as `clip`"),
            (lambda: FGSM(0.1, targeted=1), "True or False as `targeted`. Received: targeted=1"),
            (lambda: FGSM(0.1, loss=3), "a function \\(y, y_pred\\) as `loss`. Received: loss=3"),
            (lambda: FGSM(0.1, loss=()), "as `loss`. Received: loss=\\(\\)"),
            (lambda: FGSM(0.1, loss=("cross_entropy", "margin")), "one loss, as there is one step, as `loss`"),
            (lambda: PGD(0.1, loss=("margin", first_output)), "both in a tuple.* as `loss`"),
            (lambda: PGD(0.1, steps=0), "PGD expects a positive integer as `steps`. Received: steps=0"),
            (lambda: PGD(0.1, steps=2.0), "a positive integer as `steps`. Received: steps=2.0"),
            (lambda: PGD(0.1, restarts=True), "a positive integer as `restarts`. Received: restarts=True"),
            (lambda: PGD(0.1, step_size=-1), "0 or more, or None, as `step_size`. Received: step_size=-1"),
            (lambda: PGD(0.1, random_start=None), "True or False as `random_start`. Received: random_start=None"),
            (lambda: GaussianNoise(-1), "GaussianNoise expects .* as `stddev`. Received: stddev=-1"),
            (lambda: GaussianNoise(math.inf), "as `stddev`. Received: stddev=inf"),
            (lambda: GaussianNoise(0.1, (0, 0)), "GaussianNoise expects the range .* as `clip`"),
        ],
    )
    def test_options(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"model": "model"}, "expects a Keras model or a function as `model`. Received: 'model'"),
            ({"x": [X, X]}, "perturbs one floating-point input. Received: 2 of them.* Choose one by `inputs`"),
            ({"x": {"a": X}}, "structure of `inputs`"),
            ({"x": 0.5}, "expects examples of shape \\(batch, ...\\)"),
            ({"x": (255 * X).astype("uint8")}, "perturbs floating-point examples.* uint8.* cast them"),
            ({"x": X[:, 0]}, "expects examples of shape \\(batch, ...\\)"),
            ({"x": X[:0], "y": Y[:0]}, "expects examples of shape \\(batch, ...\\)"),
            ({"y": Y[:3]}, "one label for each example. Received: x=.* and y="),
            ({"x": np.full((N, D), np.nan)}, "expects finite examples.* NaN or infinity"),
            ({"x": X + 1}, "within the range `clip`.* from 1.* to 1"),
            ({"x": X - 1}, "within the range `clip`"),
            ({"y": Y + 1}, "classes from 0 to 2 as `y`.* from . to 3"),
            ({"y": Y - 1}, "classes from 0 to 2 as `y`.* from -1 to"),
            ({"y": Y + 0.5}, "classes from 0 to 2 as `y`"),
            ({"y": np.full((N, K), 1 / K)}, "one-hot rows of 3"),
            ({"y": np.eye(4)[Y]}, "one-hot rows of 3"),
            ({"model": lambda x: ops.sum(x)}, "expects a classifier, .* shape \\(batch, classes\\)"),
            ({"model": lambda x: [x, x]}, "expects a classifier"),
            ({"batch_size": 0}, "a positive integer as `batch_size`. Received: batch_size=0"),
            ({"batch_size": 2.0}, "a positive integer as `batch_size`"),
            ({"verbose": 2}, "'auto', 0 or 1 as `verbose`. Received: verbose=2"),
            ({"loss": lambda y, z: ops.mean(z)}, "one value for each example"),
        ],
    )
    @pytest.mark.parametrize("attack", [fgsm, pgd])
    def test_examples_and_labels(self, attack, change, message):
        options = {"model": linear(), "x": X, "y": Y, "verbose": 0, **change}
        with pytest.raises(ValueError, match=f"(?s){message}"):
            attack(options.pop("model"), options.pop("x"), options.pop("y"), EPSILON, **options)

    def test_a_model_without_a_gradient(self):
        def model(x):
            return ops.cast(ops.cast(8 * x, "int32"), "float32")

        with pytest.raises(ValueError, match="outputs that depend differentiably on the input. Received:"):
            fgsm(model, X, 0, EPSILON, loss=first_output, verbose=0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", [None, "softmax"])
@pytest.mark.parametrize("scale", [10.0, 30.0])
def test_the_direction_is_kept_where_the_model_is_sure(scale, activation, norm):
    # Logits apart by 20 and 40: in single precision the probability of the answer is 1.
    w = (scale * W).astype("float32")
    z = X.astype("float64") @ w
    y = z.argmax(axis=1)
    odds = np.exp(z - z[np.arange(N), y][:, None])
    # In this form nothing cancels.
    g = np.einsum("nk,dnk->nd", odds, w[:, None, :] - w[:, y][:, :, None])
    near(fgsm(linear(w, activation=activation), X, y, EPSILON, norm=norm, verbose=0), X + step(g, norm), atol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_a_zero_gradient_moves_nothing_in_half_precision(norm):
    x = X.astype("float16")
    for found in (
        fgsm(linear(0 * W), x, Y, EPSILON, norm=norm, verbose=0),
        pgd(linear(0 * W), x, Y, EPSILON, norm=norm, steps=2, random_start=False, verbose=0),
        ops.convert_to_numpy(FGSM(EPSILON, norm).perturb(linear(0 * W), tensor(x, "float16"), Y)),
    ):
        np.testing.assert_array_equal(found, x)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_noise_is_clipped_to_arrays(dtype):
    x = tensor(np.full((1000, 100), 0.5), dtype)
    found = GaussianNoise(0.3, ([0.4] * 100, 0.6)).perturb(None, x, None, seed=0)
    assert keras.backend.standardize_dtype(found.dtype) == dtype
    noise = ops.convert_to_numpy(found).astype("float64") - 0.5
    assert 0.09 < np.abs(noise).max() < 0.1005


class Subclassed(keras.Model):
    def __init__(self, activation):
        super().__init__()
        self.dense, self.activation_of_call = layers.Dense(2, use_bias=False), activation
        self.build((None, 2))

    def build(self, shape):
        self.dense.build(shape)
        self.built = True

    def call(self, x):
        return self.activation_of_call(self.dense(x))


def functional(make):
    x = keras.Input((2,))
    return keras.Model(x, make(x))


ENDS = {
    "functional, a softmax operation": (lambda: functional(lambda x: ops.softmax(layers.Dense(2)(x))), True),
    "a softmax layer": (lambda: keras.Sequential([keras.Input((2,)), layers.Dense(2), layers.Softmax()]), True),
    "a nested softmax": (lambda: functional(keras.Sequential([layers.Dense(2, activation="softmax")])), True),
    "a softmax in `call`": (lambda: Subclassed(ops.softmax), True),
    "functional, linear": (lambda: functional(layers.Dense(2)), False),
    "a nested linear layer": (lambda: functional(keras.Sequential([layers.Dense(2)])), False),
}


@pytest.mark.parametrize("name", ENDS)
def test_logits_that_look_like_probabilities_are_told_from_them(name):
    make, is_softmax = ENDS[name]
    model = make()
    model.set_weights([np.eye(2, dtype="float32"), np.zeros(2, "float32")][: len(model.weights)])
    x = np.array([[0.75, 0.25]], "float32")  # is its own vector of logits, and sums to 1
    seen = CompiledAscent(model, "inf", None).slopes(Objective("margin", 1.0), tensor(x), tensor([0], "int32"))[0]
    # The margin in logits is -1/2, with or without a softmax; as logarithms of these logits it would be -log 3.
    close(seen, [-0.5], atol=1e-5)
    assert is_softmax != np.allclose(model.predict(x, verbose=0), x)


def test_a_second_attack_runs_no_python_of_the_model():
    calls = []

    def counted(x):
        calls.append(1)
        return x

    model = Subclassed(counted)
    attack = functools.partial(pgd, model, np.full((4, 2), 0.5, "float32"), [0, 1, 0, 1], steps=3, verbose=0)
    compiled_by(lambda: attack(epsilon=0.1))
    traced = len(calls)
    calls.clear()
    model.set_weights([-2 * w for w in model.get_weights()])
    moved = attack(epsilon=0.2)
    # Whether the labels are classes of the model is looked at once for each attack.
    assert traced > len(calls) == 1
    # The weights of the moment were used, and the strength.
    gradient = np.diff(ops.convert_to_numpy(model.dense.kernel), axis=1)[:, 0]
    np.testing.assert_allclose(moved[0], 0.5 + 0.2 * np.sign(gradient), atol=1e-6)
