"""`AdversarialTraining` against steps written in NumPy, inside Keras' own loops."""

import math

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_gradtools.attacks import FGSM, PGD, GaussianNoise
from keras_gradtools.models import AdversarialTraining
from tests.cases import close

RNG = np.random.default_rng(4)
N, D, K = 8, 5, 3
X = RNG.uniform(0.3, 0.7, (N, D)).astype("float32")
Y = RNG.integers(0, K, N)
W = RNG.normal(size=(D, K)).astype("float32")
SAMPLE_WEIGHT = RNG.uniform(0.2, 2.0, N).astype("float32")
EPSILON, RATE = 0.1, 0.2
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
MODES = [{"jit_compile": False}, {"run_eagerly": True}, {"jit_compile": True}]


def linear():
    model = keras.Sequential([keras.Input((D,)), layers.Dense(K, use_bias=False, name="out")])
    model.set_weights([W])
    return model


def adversarial(model=None, attack=None, seed=None, loss=LOSS, **kwargs):
    trained = AdversarialTraining(model or linear(), attack or FGSM(EPSILON), seed)
    trained.compile(keras.optimizers.SGD(RATE), loss, **kwargs)
    return trained


def softmax(z):
    return np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)


def attacked(w=W, x=X, norm="inf", y=Y):
    g = (softmax(x.astype("float64") @ w) - np.eye(K)[y]) @ w.T
    return x + EPSILON * (np.sign(g) if norm == "inf" else g / np.linalg.norm(g, axis=1, keepdims=True))


def cross_entropy(x, w=W, weights=1.0):
    return np.mean(-weights * np.log(softmax(x @ w.astype("float64"))[np.arange(N), Y]))


def descended(x, w=W, weights=1.0):
    error = (softmax(x @ w.astype("float64")) - np.eye(K)[Y]) * np.reshape(weights, (-1, 1))
    return w - RATE * x.T @ error / N


class Shift:
    """An attack of one's own."""

    def perturb(self, model, x, y, seed):
        return x + 0.1 * ops.cast(ops.reshape(y, (-1, 1)), x.dtype)


class TestOneStep:
    @pytest.mark.parametrize("mode", MODES, ids=lambda mode: "_".join(mode) + str(*mode.values()))
    @pytest.mark.parametrize("weighted", [False, True])
    def test_fgsm(self, mode, weighted):
        self.check(mode, weighted)

    def check(self, mode, weighted):
        trained = adversarial(**mode)
        weights = SAMPLE_WEIGHT if weighted else None
        logs = trained.train_on_batch(X, Y, sample_weight=weights, return_dict=True)
        w = SAMPLE_WEIGHT if weighted else 1.0
        assert logs["loss"] == pytest.approx(cross_entropy(attacked(), weights=w), rel=1e-5)
        close(trained.model.get_weights()[0], descended(attacked(), weights=w))

    @pytest.mark.parametrize("mode", MODES, ids=lambda mode: "_".join(mode) + str(*mode.values()))
    def test_each_step_attacks_the_weights_of_the_moment(self, mode):
        trained, w = adversarial(attack=FGSM(EPSILON, 2), **mode), W
        for _ in range(3):
            trained.train_on_batch(X, Y)
            w = descended(attacked(w, norm=2), w)
        close(trained.model.get_weights()[0], w, rtol=1e-4)

    def test_pgd_trains_on_the_end_of_its_run(self):
        trained = adversarial(attack=PGD(EPSILON, steps=3, seed=1), seed=2)
        # From anywhere in the ball three steps of 2.5 / 3 lead into its corner.
        w = np.array([[-2.0, 0.0, 2.0]] * D) * np.linspace(0.5, 1.5, D)[:, None]
        trained.set_weights([w])
        y = np.where(Y == 1, 0, Y)
        loss = trained.train_on_batch(X, y)
        x = X + EPSILON * np.where(y == 0, 1.0, -1.0)[:, None]
        assert loss == pytest.approx(np.mean(-np.log(softmax(x @ w)[np.arange(N), y])), rel=1e-5)

    def test_an_attack_of_ones_own(self):
        trained = adversarial(attack=Shift())
        trained.train_on_batch(X, Y)
        close(trained.model.get_weights()[0], descended(X + 0.1 * Y[:, None]))

    def test_strength_zero_trains_as_the_plain_model(self):
        trained, plain = adversarial(attack=FGSM(0.0)), linear()
        plain.compile(keras.optimizers.SGD(RATE), LOSS)
        for model in (trained, plain):
            model.fit(X, Y, batch_size=4, epochs=2, shuffle=False, verbose=0)
        close(trained.model.get_weights()[0], plain.get_weights()[0])

    def test_inputs_in_a_dict(self):
        inputs = {"a": keras.Input((D,), name="a")}
        model = keras.Model(inputs, layers.Dense(K, use_bias=False)(inputs["a"]))
        model.set_weights([W])
        trained = adversarial(model, attack=Shift())
        trained.train_on_batch({"a": X}, Y)
        close(model.get_weights()[0], descended(X + 0.1 * Y[:, None]))


class TestState:
    GAMMA, BETA = np.array([1.0, -2.0, 0.5, 3.0, 1.0]), np.full(D, 0.1)
    MEAN, VARIANCE = np.full(D, 0.5), np.array([0.2, 1.0, 0.4, 2.0, 0.1])

    def model(self):
        model = keras.Sequential(
            [keras.Input((D,)), layers.BatchNormalization(momentum=0.9), layers.Dropout(0.5), layers.Dense(K)]
        )
        model.layers[0].set_weights([self.GAMMA, self.BETA, self.MEAN, self.VARIANCE])
        model.layers[-1].set_weights([W, np.zeros(K)])
        return model

    @pytest.mark.parametrize("steps", [1, pytest.param(4, marks=pytest.mark.fast_on("torch"))])
    @pytest.mark.parametrize("mode", MODES, ids=lambda mode: "_".join(mode) + str(*mode.values()))
    def test_statistics_are_updated_once_with_those_of_the_attacked_batch(self, mode, steps):
        model = self.model()
        attack = PGD(EPSILON, 2, steps=steps, step_size=EPSILON / steps, random_start=False)
        adversarial(model, attack, **mode).train_on_batch(X, Y)
        scale = self.GAMMA / np.sqrt(self.VARIANCE + 1e-3)
        x = X.astype("float64")
        for _ in range(steps):
            # Dropout is off, and the statistics are the moving ones.
            p = softmax(((x - self.MEAN) * scale + self.BETA) @ W)
            g = (p - np.eye(K)[Y]) @ W.T * scale
            x = x + EPSILON / steps * g / np.linalg.norm(g, axis=1, keepdims=True)
        close(model.layers[0].moving_mean, 0.9 * self.MEAN + 0.1 * x.mean(axis=0), rtol=1e-5)
        close(model.layers[0].moving_variance, 0.9 * self.VARIANCE + 0.1 * x.var(axis=0), rtol=1e-5)

    def test_dropout_draws_as_in_plain_training(self):
        weights = []
        for wrap in (lambda m: m, lambda m: AdversarialTraining(m, FGSM(0.0))):
            keras.utils.set_random_seed(1)
            model = self.model()
            trained = wrap(model)
            trained.compile(keras.optimizers.SGD(RATE), LOSS)
            trained.train_on_batch(X, Y)
            weights.append(model.layers[-1].get_weights()[0])
        close(weights[1], weights[0])

    def test_noise_of_the_right_deviation_reaches_the_model(self):
        model = keras.Sequential([keras.Input((D,)), layers.BatchNormalization(momentum=0.0), layers.Dense(K)])
        x, count = np.zeros((4000, D), "float32"), 4000
        adversarial(model, GaussianNoise(0.3), seed=0).train_on_batch(x, np.zeros(count, "int32"))
        deviation = np.sqrt(ops.convert_to_numpy(model.layers[0].moving_variance))
        np.testing.assert_allclose(deviation, 0.3, atol=5 * 0.3 / math.sqrt(2 * count))
        np.testing.assert_allclose(model.layers[0].moving_mean, 0.0, atol=5 * 0.3 / math.sqrt(count))

    @pytest.mark.parametrize("attack", [GaussianNoise(0.3), PGD(0.3, 2, steps=1)], ids=lambda a: a.name)
    def test_the_seed_makes_two_runs_equal(self, attack):
        def weights(seed):
            trained = adversarial(attack=attack, seed=seed)
            trained.fit(X, Y, batch_size=4, epochs=2, shuffle=False, verbose=0)
            return trained.model.get_weights()[0]

        once = weights(1)
        np.testing.assert_array_equal(weights(1), once)
        assert np.abs(weights(2) - once).max() > 1e-5

    def test_each_step_draws_anew(self):
        trained = AdversarialTraining(linear(), GaussianNoise(0.3), seed=1)
        trained.compile(keras.optimizers.SGD(0.0), LOSS)
        first, second = (trained.train_on_batch(X, Y) for _ in range(2))
        assert abs(first - second) > 1e-4


class TestOutsideTraining:
    def test_evaluation_is_of_clean_examples(self):
        trained = adversarial()
        assert trained.evaluate(X, Y, verbose=0) == pytest.approx(cross_entropy(X), rel=1e-5)
        history = trained.fit(X, Y, batch_size=N, validation_data=(X, Y), verbose=0).history
        assert history["loss"][0] == pytest.approx(cross_entropy(attacked()), rel=1e-5)
        assert history["val_loss"][0] == pytest.approx(cross_entropy(X, descended(attacked())), rel=1e-5)

    def test_calls_and_predictions_are_not_perturbed(self):
        trained = adversarial()
        trained.train_on_batch(X, Y)
        expected = X @ trained.model.get_weights()[0]
        close(trained.predict(X, verbose=0), expected)
        for training in (None, False, True):
            close(trained(X, training=training), expected)

    def test_save_and_load(self, tmp_path):
        trained = adversarial(attack=PGD(EPSILON, 2, (-1.0, 2.0), "margin", 3, random_start=False), seed=3)
        trained.fit(X, Y, verbose=0)
        trained.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        assert loaded.attack == trained.attack and loaded.get_config()["seed"] == 3
        np.testing.assert_array_equal(loaded.predict(X, verbose=0), trained.predict(X, verbose=0))
        # Keras 3.10 logs the mean over all steps since the last reset.
        for model in (loaded, trained):
            model.reset_metrics()
        assert loaded.train_on_batch(X, Y) == pytest.approx(trained.train_on_batch(X, Y), rel=1e-6)
        close(loaded.model.get_weights()[0], trained.model.get_weights()[0])

    def test_config_round_trip(self):
        config = AdversarialTraining(linear(), GaussianNoise(0.1), 5, name="robust").get_config()
        again = AdversarialTraining.from_config(config)
        assert again.name == "robust" and again.attack == GaussianNoise(0.1) and again.get_config() == config


@pytest.mark.usefixtures("needs_steps_per_execution")
def test_steps_per_execution_equals_single_steps():
    w = W
    for batch in (slice(0, 4), slice(4, 8)):
        x, y = X[batch], Y[batch]
        x = attacked(w, x, y=y)
        w = w - RATE * x.T @ (softmax(x @ w) - np.eye(K)[y]) / len(x)
    trained = adversarial(steps_per_execution=2)
    trained.fit(X, Y, batch_size=4, shuffle=False, verbose=0)
    close(trained.model.get_weights()[0], w)


class TestErrors:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: AdversarialTraining(layers.Dense(1), FGSM(0.1)), "expects a keras.Model as `model`"),
            (
                lambda: AdversarialTraining(keras.Sequential([layers.Dense(1)], name="raw"), FGSM(0.1)),
                "unbuilt .*'raw'",
            ),
            (lambda: AdversarialTraining(linear(), 0.1), "expects an attack, such as .* Received: attack=0.1"),
            (lambda: AdversarialTraining(linear(), None), "expects an attack, such as .* Received: attack=None"),
        ],
    )
    def test_arguments(self, make, message):
        with pytest.raises(ValueError, match=f"AdversarialTraining .*{message}|{message}"):
            make()

    def test_two_inputs(self):
        a, b = keras.Input((D,)), keras.Input((D,))
        with pytest.raises(ValueError, match="AdversarialTraining perturbs one floating-point input. Received: 2 of"):
            adversarial(keras.Model([a, b], layers.Dense(K)(a + b)))

    def test_no_labels(self):
        with pytest.raises(ValueError, match="trains on labels. Received: data without labels"):
            adversarial(loss=None).fit(X, verbose=0)

    def test_a_failed_step_leaves_nothing_behind(self):
        trained = adversarial(run_eagerly=True)
        with pytest.raises(Exception):  # noqa: B017 - the words are Keras'
            trained.train_on_batch(X, np.zeros((N, K + 2), "float32"))
        close(trained(X, training=True), X @ W)
        trained.train_on_batch(X, Y)
        close(trained.model.get_weights()[0], descended(attacked()))


def test_a_refused_step_leaves_nothing_behind():
    trained = adversarial(run_eagerly=True, loss=None)
    with pytest.raises(ValueError, match="trains on labels"):
        trained.fit(X, verbose=0)
    # What a later call in training mode would attack with. Keras on JAX has no weights left here to call it with.
    assert trained._step.labels is None
