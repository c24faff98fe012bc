"""Adapts a classifier to a domain without labels, by reversing the gradient of a domain classifier.

Two half moons have labels. The same moons, turned by 35 degrees, have none. A domain classifier learns to tell the two
domains apart by the features. `kg.layers.ReverseGradient` reverses its gradient, so that the features learn to be the
same in both domains. So the label classifier also works on the turned moons.

Source: Ganin et al., "Domain-adversarial training of neural networks" (arXiv:1505.07818), section 5.1.

Run `python examples/gradient_reversal.py`, with `KERAS_BACKEND=jax` or `torch` before it for another backend. It writes
gradient_reversal.png to out/.
"""

import argparse
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Models this small do not profit from several threads, and slow down if the cores are busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import keras_gradtools as kg  # before Keras: it starts the backend that is installed

# isort: split
import keras
import numpy as np
from keras import layers

TURN = 35.0
COUNT = 512
NAMES = ("without reversal", "with reversal")


def moons(rng, degrees):
    """Points on two half moons around the origin, turned by an angle, and which of the two."""
    angle, y = np.pi * rng.uniform(size=COUNT), rng.integers(0, 2, COUNT)
    upper = np.stack([np.cos(angle) - 0.5, np.sin(angle) - 0.25], axis=1)
    x = np.where(y[:, None] == 0, upper, -upper) + rng.normal(0.0, 0.08, (COUNT, 2))
    turn = np.deg2rad(degrees)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return (x @ rotation.T).astype("float32"), y.astype("float32")


def build(scale):
    """The model to train, with an output for the label and one for the domain, and the label classifier in it."""
    x = keras.Input((2,))
    features = layers.Dense(32, "relu")(layers.Dense(32, "relu")(x))
    label = layers.Dense(1, name="label")(features)
    reverse = kg.layers.ReverseGradient(scale, name="reverse")
    domain = layers.Dense(1, name="domain")(layers.Dense(32, "relu")(reverse(features)))
    return keras.Model(x, {"label": label, "domain": domain}), keras.Model(x, label)


class Ramp(keras.callbacks.Callback):
    """Raises the scale of the reversal from 0 to 1, because the domain classifier is useless at first."""

    def __init__(self, epochs):
        super().__init__()
        self.epochs = epochs

    def on_epoch_begin(self, epoch, logs=None):
        progress = epoch / self.epochs
        # `self.model` first: on JAX, that brings the variables up to date.
        self.model.get_layer("reverse").scale = 2.0 / (1.0 + np.exp(-10.0 * progress)) - 1.0


def train(source, target, reversed_, epochs, seed):
    keras.utils.set_random_seed(seed)
    model, classifier = build(0.0)
    x = np.concatenate([source[0], target[0]])
    is_target = np.repeat([0.0, 1.0], COUNT).astype("float32")
    # The labels of the target domain are not used: their weight is 0.
    labels = {"label": np.concatenate([source[1], np.zeros(COUNT, "float32")]), "domain": is_target}
    weights = {"label": 2.0 * (1.0 - is_target), "domain": np.ones_like(is_target)}
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-3), {"label": loss, "domain": loss})
    callbacks = [Ramp(epochs)] if reversed_ else []
    model.fit(x, labels, sample_weight=weights, batch_size=128, epochs=epochs, verbose=0, callbacks=callbacks)
    return model, classifier


def accuracy(classifier, x, y):
    return float(np.mean((classifier.predict(x, batch_size=len(x), verbose=0)[:, 0] > 0) == y))


def draw(classifiers, accuracies, source, target, path):
    from matplotlib import pyplot

    axis = np.linspace(-2, 2, 201, dtype="float32")
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained", sharey=True)
    for ax, name in zip(axes, NAMES, strict=True):
        scores = classifiers[name].predict(grid, batch_size=len(grid), verbose=0).reshape(201, 201)
        ax.contourf(axis, axis, scores > 0, levels=[-1, 0.5, 2], colors=["white", "0.85"])
        ax.contour(axis, axis, scores, [0.0], colors="black", linewidths=1.5)
        for x, y, color, domain in ((*source, "tab:blue", "labeled"), (*target, "tab:orange", "without labels")):
            for label, marker in ((0, "o"), (1, "^")):
                ax.plot(*x[y == label][:120].T, marker, color=color, markersize=4, label=f"{domain}, moon {label + 1}")
        ax.set_title(f"{name}: {accuracies[name]:.1%} of the turned moons")
        ax.set(aspect="equal", xlim=(-2, 2), ylim=(-1.7, 1.7))
    axes[1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3, help="number of trainings of each kind")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="the folder for the picture")
    options = parser.parse_args(arguments)

    import matplotlib

    matplotlib.use("agg")
    rng = np.random.default_rng(0)
    source, target, test = moons(rng, 0.0), moons(rng, TURN), moons(rng, TURN)
    print(f"moons turned by {TURN:g} degrees, {options.seeds} trainings each, {keras.config.backend()}")
    classifiers, first, results = {}, {}, {}
    for name in NAMES:
        found = []
        for seed in range(options.seeds):
            model, classifier = train(source, target, name == "with reversal", options.epochs, seed)
            domain = model.predict(np.concatenate([source[0], target[0]]), batch_size=2 * COUNT, verbose=0)["domain"]
            told_apart = float(np.mean((domain[:, 0] > 0) == np.repeat([False, True], COUNT)))
            found.append((accuracy(classifier, *source), accuracy(classifier, *test), told_apart))
            classifiers.setdefault(name, classifier)
        first[name] = found[0][1]
        results[name] = np.array(found)
        labeled, turned, domains = results[name].mean(axis=0)
        low, high = results[name][:, 1].min(), results[name][:, 1].max()
        print(
            f"{name}: {labeled:.1%} of the labeled moons, {turned:.1%} ({low:.1%} to {high:.1%}) of the turned ones; "
            f"domains told apart: {domains:.1%}"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    draw(classifiers, first, source, target, options.out / "gradient_reversal.png")
    print(f"Picture: gradient_reversal.png in {options.out}/")
    return results


if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as error:
        raise SystemExit(f'{error}: pip install "keras-gradtools[examples]"') from None
