"""Explains what a digit classifier looks at: saliency, integrated gradients and Grad-CAM.

Each method gives one number for each pixel. Integrated gradients add up to the change of the score from the baseline
(completeness), which the script checks. The digits are at random places in noisy images, so that the script can measure
how well each method finds the digit.

Source: Simonyan, Vedaldi & Zisserman (arXiv:1312.6034) for saliency; Sundararajan, Taly & Yan (arXiv:1703.01365) for
integrated gradients; Selvaraju et al. (arXiv:1610.02391) for Grad-CAM.

Run `python examples/saliency.py`, with `KERAS_BACKEND=jax` or `torch` before it for another backend. It writes
saliency.png to out/.
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
from keras import layers, ops

STEPS = (2, 8, 32, 128)
SIZE = 16
CHECKED = 20


def load_data():
    """Each digit at a random place of a noisy image, and where it is."""
    from sklearn.datasets import load_digits

    digits, rng = load_digits(), np.random.default_rng(0)
    x = rng.uniform(0.0, 0.4, (len(digits.images), SIZE, SIZE, 1)).astype("float32")
    inside = np.zeros(x.shape, bool)
    for image, place, digit, (row, column) in zip(
        x, inside, digits.images, rng.integers(0, SIZE - 8, (len(x), 2)), strict=True
    ):
        box = slice(row, row + 8), slice(column, column + 8), 0
        image[box] = np.maximum(image[box], digit / 16)
        place[box] = True
    y = digits.target.astype("int32")
    return (x[:-300], y[:-300]), (x[-300:], y[-300:], inside[-300:])


def build_classifier():
    # It returns logits. Gradients of probabilities are nearly zero where the model is sure.
    return keras.Sequential(
        [
            keras.Input((SIZE, SIZE, 1)),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.Conv2D(32, 3, strides=2, padding="same", activation="relu"),
            layers.Conv2D(64, 3, padding="same", activation="relu", name="features"),
            layers.GlobalMaxPooling2D(),
            layers.Dense(10),
        ]
    )


def score(logits, classes):
    """The logit of each image's class, of shape (batch,)."""
    return ops.sum(logits * ops.one_hot(classes, logits.shape[-1]), axis=-1)


def saliency(model, images, classes):
    """How much the score changes with each pixel: the gradient of the score with respect to the image."""
    with kg.GradientTape() as tape:
        tape.watch(images)
        scores = score(model(images), classes)
    return tape.gradient(scores, images)


def integrated_gradients(model, images, classes, baseline=0.0, steps=32):
    """The gradients along the line from the baseline to the image, averaged, times the difference of the two."""
    total = ops.zeros_like(images)
    for step in range(steps):
        # The midpoints of equal parts of the line.
        fraction = (step + 0.5) / steps
        total = total + saliency(model, baseline + fraction * (images - baseline), classes)
    return (images - baseline) * total / steps


def grad_cam(model, images, classes, layer="features"):
    """The channels of a convolution, weighted by the mean gradient of the score in each channel, where positive."""
    both = keras.Model(model.inputs, [model.get_layer(layer).output, model.outputs[0]])
    with kg.GradientTape() as tape:
        # Only the image is watched: the features depend on it, so the tape has them, too.
        tape.watch(images)
        features, logits = both(images)
        scores = score(logits, classes)
    weights = ops.mean(tape.gradient(scores, features), axis=(1, 2), keepdims=True)
    coarse = ops.relu(ops.sum(weights * features, axis=-1, keepdims=True))
    return ops.image.resize(coarse, images.shape[1:3], interpolation="bilinear", data_format="channels_last")


def completeness_error(model, images, classes, steps):
    """The largest difference between the sum of the integrated gradients and the change of the score."""
    found = ops.sum(integrated_gradients(model, images, classes, steps=steps), axis=(1, 2, 3))
    change = score(model(images), classes) - score(model(ops.zeros_like(images)), classes)
    return float(np.abs(ops.convert_to_numpy(found - change)).max())


def share_inside(values, inside):
    """The share of the positive part of a map that lies inside the digit, the mean over all images."""
    positive = np.maximum(values, 0.0)
    shares = (positive * inside).sum(axis=(1, 2, 3)) / np.maximum(positive.sum(axis=(1, 2, 3)), 1e-12)
    return float(shares.mean())


def draw(images, maps, labels, path):
    from matplotlib import pyplot

    rows = {"image": images, **maps}
    figure, axes = pyplot.subplots(len(rows), len(images), figsize=(1.35 * len(images) + 1.2, 1.45 * len(rows)))
    for line, (name, values) in zip(axes, rows.items(), strict=True):
        for ax, value, label in zip(line, values, labels, strict=True):
            if name == "image":
                ax.imshow(value[..., 0], cmap="Greys", vmin=0, vmax=1)
                ax.set_title(label)
            else:
                kg.plots.imshow_zero_center(value[..., 0], ax, colorbar=False)
            ax.set(xticks=[], yticks=[])
        line[0].set_ylabel(name.replace(" ", "\n"), rotation=0, ha="right", va="center")
    figure.suptitle("Red speaks for the digit, blue against it")
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--images", type=int, default=100, help="the number of images to explain")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="the folder for the picture")
    options = parser.parse_args(arguments)

    import matplotlib

    matplotlib.use("agg")
    keras.utils.set_random_seed(0)
    data, (x, y, inside) = load_data()
    model = build_classifier()
    model.compile(
        keras.optimizers.Adam(3e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"]
    )
    model.fit(*data, batch_size=64, epochs=options.epochs, verbose=0)
    print(f"{model.evaluate(x, y, verbose=0)[1]:.1%} of {len(x)} test digits read correctly, {keras.config.backend()}")

    x, y, inside = x[: options.images], y[: options.images], inside[: options.images]
    images, classes = ops.convert_to_tensor(x), ops.convert_to_tensor(y)
    errors = {steps: completeness_error(model, images[:CHECKED], classes[:CHECKED], steps) for steps in STEPS}
    for steps, error in errors.items():
        print(f"integrated gradients, {steps:3d} steps: the sums are off by at most {error:.4f}")

    maps = {
        "saliency": saliency(model, images, classes),
        "integrated gradients": integrated_gradients(model, images, classes),
        "Grad-CAM": grad_cam(model, images, classes),
    }
    maps = {name: ops.convert_to_numpy(values) for name, values in maps.items()}
    shares = {name: share_inside(values, inside) for name, values in maps.items()}
    for name, share in shares.items():
        print(f"{name}: {share:.0%} inside the digit, which covers {inside.mean():.0%} of the image")

    shown = [int(np.argmax(y == digit)) for digit in range(0, 10, 2)]
    options.out.mkdir(parents=True, exist_ok=True)
    draw(x[shown], {name: values[shown] for name, values in maps.items()}, y[shown], options.out / "saliency.png")
    print(f"Picture: saliency.png in {options.out}/")
    return errors, shares


if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as error:
        raise SystemExit(f'{error}: pip install "keras-gradtools[examples]"') from None
