"""Draws the picture of README.md and of the site's front page: `python -m benchmarks.front_picture`.

The picture compares two digit classifiers of `examples/demo.py`, one trained plainly and one with the penalty. It shows
the gradient of the margin with respect to the pixels, and the accuracy under attack. It takes about a minute.
"""

import importlib.util
import os
import pathlib

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import keras
import numpy as np
from keras import ops

import keras_gradtools as kg

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHOWN = ("plain", "penalty")
DIGITS = (0, 2, 3, 5, 8)
EPOCHS = 30
# Two colors of Okabe and Ito, told apart without color by their markers.
LINES = {"plain": {"color": "#d55e00", "marker": "o"}, "penalty": {"color": "#0072b2", "marker": "s"}}
STYLES = {"light": {}, "dark": {"color": "#e8e8e8", "background": "#14181e"}}


def load_demo():
    """The module `examples/demo.py`."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    return demo


def train(demo, x, y):
    """The classifiers named in SHOWN, trained from the same initial weights."""
    keras.utils.set_random_seed(0)
    trained = {}
    for name, classifier, model in zip(demo.WAYS, *demo.wrapped_classifiers(), strict=True):
        if name in SHOWN:
            rate = keras.optimizers.schedules.CosineDecay(2e-3, EPOCHS * -(-len(x) // demo.BATCH_SIZE))
            model.compile(keras.optimizers.Adam(rate), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
            model.fit(x, y, batch_size=demo.BATCH_SIZE, epochs=EPOCHS, verbose=0)
            trained[name] = classifier
    return trained


def margin_gradients(model, x, y):
    """The gradient of each image's margin with respect to its pixels: its digit's logit minus the largest other one."""
    images, is_digit = ops.convert_to_tensor(x), ops.one_hot(y, 10)
    with kg.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(images)
        logits = model(images)
        others = ops.max(logits - 1e9 * is_digit, axis=1)
        margins = ops.sum(logits * is_digit, axis=1) - others
    return ops.convert_to_numpy(tape.gradient(margins, images))[..., 0]


def draw(images, gradients, curves, strengths, style, path):
    from matplotlib import pyplot

    color, background = style.get("color", "black"), style.get("background", "white")
    with pyplot.rc_context(
        {key: color for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")}
        | {
            "figure.facecolor": background,
            "axes.facecolor": background,
            "font.size": 11,
            "legend.facecolor": background,
        }
    ):
        figure = pyplot.figure(figsize=(11, 3.9), layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1), wspace=0.04)
        axes = left.subplots(3, len(images), gridspec_kw={"wspace": 0.02, "hspace": 0.02})
        limit = np.quantile(np.abs(gradients["plain"]), 0.995)
        for column in range(len(images)):
            axes[0, column].imshow(images[column], cmap="Greys", vmin=0, vmax=1)
            for row, name in enumerate(SHOWN, 1):
                axes[row, column].imshow(gradients[name][column], cmap="RdBu_r", vmin=-limit, vmax=limit)
        for ax in axes.flat:
            ax.set(xticks=[], yticks=[])
        for ax, label in zip(axes[:, 0], ("digit", "plain\ntraining", "with a\npenalty"), strict=True):
            ax.set_ylabel(label, rotation=0, ha="right", va="center")
        left.suptitle("Which pixels change the decision, and how much", fontsize=12)

        ax = right.subplots()
        for name, label in zip(SHOWN, ("plain training", "with a penalty on input gradients"), strict=True):
            ax.plot(strengths, curves[name], label=label, linewidth=2, **LINES[name])
        ax.set(xlabel="largest change of a pixel (PGD attack)", ylabel="digits read correctly (%)", ylim=(0, 103))
        ax.grid(alpha=0.25)
        ax.legend(loc="lower left", frameon=False)
        right.suptitle("Accuracy under attack", fontsize=12)
        figure.savefig(path, dpi=150, facecolor=background)
        pyplot.close(figure)


def main():
    import matplotlib

    matplotlib.use("agg")
    demo = load_demo()
    (x, y), (x_test, y_test) = demo.load_data()
    trained = train(demo, x, y)
    chosen = [int(np.argmax(y_test == digit)) for digit in DIGITS]
    gradients = {name: margin_gradients(model, x_test[chosen], y_test[chosen]) for name, model in trained.items()}
    curves = {name: 100 * np.array(demo.attack(model, x_test, y_test, 20)["PGD"]) for name, model in trained.items()}
    print({name: curve.round(1).tolist() for name, curve in curves.items()})
    for name, style in STYLES.items():
        path = ROOT / "docs" / "_static" / f"front_{name}.png"
        draw(x_test[chosen][..., 0], gradients, curves, demo.CURVE, style, path)
        print(f"Wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
