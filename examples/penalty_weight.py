"""Chooses the weight of a penalty on input gradients by a sweep, for a robust digit classifier.

`kg.regularization.penalty_weight_sweep` trains the classifier with each weight, measures its accuracy on held-out
digits with and without an attack, and suggests a weight. The suggested weight, no penalty, and two guesses are then
compared on test digits, which were not used for the choice.

Run `python examples/penalty_weight.py`, with `KERAS_BACKEND=jax` or `torch` before it for another backend. It writes
penalty_weight.png to out/.
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

EPSILON = 0.1
PENALTY_WEIGHTS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
GUESSES = (0.1, 0.3)


def load_data():
    """Digits for training, for the choice of the weight, and for the final test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = (digits.images[..., None] / 16).astype("float32"), digits.target.astype("int32")
    order = np.random.default_rng(0).permutation(len(x))
    return [(x[part], y[part]) for part in np.split(order, [-800, -400])]


def build_classifier():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.Conv2D(32, 3, strides=2, padding="same", activation="relu"),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10),
        ]
    )


def train(penalty_weight, data, epochs):
    classifier = build_classifier()
    # The l1 norm of the gradient is dual to l-infinity attacks. ReLU has kinks, so the method is finite differences.
    model = kg.models.InputGradientRegularized(
        classifier, weight=penalty_weight, norm=1, method="finite_difference", step_size=EPSILON
    )
    rate = keras.optimizers.schedules.CosineDecay(2e-3, epochs * -(-len(data[0]) // 64))
    model.compile(keras.optimizers.Adam(rate), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(*data, batch_size=64, epochs=epochs, verbose=0)
    return classifier


def choose(data, held_out, epochs, penalty_weights=PENALTY_WEIGHTS, verbose="auto"):
    return kg.regularization.penalty_weight_sweep(
        lambda penalty_weight: train(penalty_weight, data, epochs),
        penalty_weights,
        *held_out,
        epsilon=EPSILON,
        batch_size=100,
        verbose=verbose,
    )


def accuracies(model, test):
    """The accuracies without an attack and under PGD."""
    metrics = kg.attacks.robustness_metrics(model, *test, (EPSILON,), jacobian=False, batch_size=100, verbose=0)
    return metrics["clean_accuracy"], metrics[f"pgd_{EPSILON:g}_accuracy"]


def draw(sweep, path):
    from matplotlib import pyplot

    figure, ax = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    kg.plots.plot_penalty_weight_sweep(sweep, ax)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one weight and a few epochs, and worse models")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="the folder for the picture")
    options = parser.parse_args(arguments)

    import matplotlib

    matplotlib.use("agg")
    data, held_out, test = load_data()
    epochs, penalty_weights = 30, PENALTY_WEIGHTS
    if options.quick:
        epochs, penalty_weights = 3, PENALTY_WEIGHTS[2:3]
        held_out, test = ([part[:100] for part in examples] for examples in (held_out, test))
    sweep = choose(data, held_out, epochs, penalty_weights)
    print(f"{keras.config.backend()}, {sweep}")

    compared = {"no penalty": 0.0, "suggested": sweep.suggestion, "guessed": GUESSES[0], "guessed higher": GUESSES[1]}
    results = {}
    for name, penalty_weight in compared.items():
        if options.quick and name != "suggested":
            continue
        keras.utils.set_random_seed(1)
        results[name] = clean, attacked = accuracies(train(penalty_weight, data, epochs), test)
        print(f"test digits, {name} ({penalty_weight:g}): {clean:.1%} clean, {attacked:.1%} under attack")
    options.out.mkdir(parents=True, exist_ok=True)
    draw(sweep, options.out / "penalty_weight.png")
    print(f"Picture: penalty_weight.png in {options.out}/")
    return sweep, results


if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as error:
        raise SystemExit(f'{error}: pip install "keras-gradtools[examples]"') from None
