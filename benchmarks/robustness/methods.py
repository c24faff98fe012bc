"""The methods of the robustness study: how each trains the same classifier, and what is measured on it."""

import dataclasses
import functools
import time
from typing import Any

STRENGTHS = (0.05, 0.1, 0.15, 0.2)
STRENGTH = 0.1
ATTACK = {"steps": 40, "restarts": 2}  # on cross-entropy and margin, the default losses
EPOCHS, BATCH_SIZE, LEARNING_RATE = 60, 64, 2e-3
TESTED, HELD_OUT = 500, 297


@dataclasses.dataclass(frozen=True)
class Method:
    """A training method: its name, the activation of the classifier, and the wrapper `kind` with its `options`."""

    name: str
    kind: str = "plain"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    activation: str = "relu"

    def wrap(self, model, seed):
        import keras

        import keras_gradtools as kg

        if self.kind == "plain":
            # Compiled as the other methods are. On TensorFlow and JAX, Keras itself does that.
            return kg.models.CompiledTraining(model) if keras.backend.backend() == "torch" else model
        if self.kind == "penalty":
            return kg.models.InputGradientRegularized(model, **self.options)
        attack = {"noise": kg.attacks.GaussianNoise, "fgsm": kg.attacks.FGSM, "pgd": kg.attacks.PGD}[self.kind]
        return kg.models.AdversarialTraining(model, attack(**self.options), seed=seed)

    @property
    def settings(self):
        return {
            "kind": self.kind,
            "activation": self.activation,
            **self.options,
            "epochs": EPOCHS,
            "batch_size": BATCH_SIZE,
            "learning_rate": LEARNING_RATE,
        }


def penalty(name, activation="relu", **options):
    return Method(name, "penalty", options, activation)


def _finite_differences(norm, step_size, weights, activation="relu"):
    name = f"finite differences, l{norm} squared, h = {step_size}"
    options = {"method": "finite_difference", "norm": norm, "step_size": step_size}
    return {name: [penalty(name, activation, weight=w, **options) for w in weights]}


def _exact(activation, weights):
    name = f"exact, l2 squared, {activation}"
    return {name: [penalty(name, activation, weight=w, method="exact") for w in weights]}


def _attacked(name, kind, option, values, **others):
    return {name: [Method(name, kind, {option: value, **others}) for value in values]}


# The candidate settings of each method. Each method is compared with plain training of the same activation.
SETTINGS = {
    "plain": [Method("plain")],
    "plain, gelu": [Method("plain, gelu", activation="gelu")],
    "plain, softplus": [Method("plain, softplus", activation="softplus")],
    **_attacked("Gaussian noise", "noise", "stddev", (0.1, 0.2, 0.3, 0.4)),
    **_exact("relu", (0.3, 0.6, 1.0, 1.5)),
    **_exact("gelu", (0.6, 1.0, 2.0, 3.0)),
    **_exact("softplus", (1.0, 2.0, 3.0, 5.0)),
    **_finite_differences(2, 0.1, (0.6, 1.0, 1.5, 2.0)),
    **_finite_differences(2, 0.5, (0.3, 0.6, 1.0)),
    **_finite_differences(1, 0.1, (0.01, 0.02, 0.03, 0.05)),
    **_attacked("FGSM training", "fgsm", "epsilon", (0.1, 0.15, 0.2)),
    **_attacked("PGD training, 7 steps", "pgd", "epsilon", (0.1, 0.15, 0.2), steps=7),
}


@functools.cache
def data(held_out=False):
    """Images and labels for training and for testing. With `held_out`, both are parts of the training data."""
    import numpy as np
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = (digits.images[..., None] / 16).astype("float32"), digits.target.astype("int32")
    order = np.random.default_rng(0).permutation(len(x))
    train, test = order[:-TESTED], order[-TESTED:]
    if held_out:
        train, test = train[:-HELD_OUT], train[-HELD_OUT:]
    return (x[train], y[train]), (x[test], y[test])


def classifier(activation):
    import keras
    from keras import layers

    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(32, 3, padding="same", activation=activation),
            layers.Conv2D(64, 3, strides=2, padding="same", activation=activation),
            layers.Flatten(),
            layers.Dense(64, activation=activation),
            layers.Dense(10),
        ]
    )


def compiled(method, seed, examples):
    """The classifier, and the compiled model that trains it. Methods with the same activation start equal."""
    import keras

    keras.utils.set_random_seed(seed)
    model = classifier(method.activation)
    trained = method.wrap(model, seed)
    steps = EPOCHS * -(-examples // BATCH_SIZE)
    trained.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(LEARNING_RATE, steps)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=True if keras.backend.backend() == "torch" else "auto",
    )
    return model, trained


def run(method, seed, held_out=False, strengths=STRENGTHS):
    """Trains and measures once, and returns a dict that can be saved as JSON."""
    import keras

    (x, y), test = data(held_out)
    model, trained = compiled(method, seed, len(x))
    keras.utils.set_random_seed(seed)
    start = time.perf_counter()
    trained.fit(x, y, batch_size=BATCH_SIZE, epochs=EPOCHS, verbose=0)
    seconds = time.perf_counter() - start
    return {
        "method": method.name,
        "seed": seed,
        "settings": method.settings,
        **measured(model, *test, strengths),
        "train_seconds": round(seconds, 1),
    }


def measured(model, x, y, strengths):
    """The accuracy on clean images and under both attacks."""
    import keras_gradtools as kg

    def accuracy(images):
        return float((model.predict(images, batch_size=len(x), verbose=0).argmax(axis=1) == y).mean())

    options = {"batch_size": len(x), "verbose": 0}
    return {
        "clean": accuracy(x),
        "fgsm": [accuracy(kg.attacks.fgsm(model, x, y, s, **options)) for s in strengths],
        "pgd": [accuracy(kg.attacks.pgd(model, x, y, s, **ATTACK, seed=0, **options)) for s in strengths],
    }
