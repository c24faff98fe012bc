"""TensorFlow's tutorial "Adversarial example using FGSM", on any backend, with images that need no download.

The tutorial attacks MobileNetV2 on one photograph with pixels from -1 to 1. Here, a small network with a softmax
classifies a digit. Run `python examples/fgsm.py`, with `KERAS_BACKEND=jax` or `torch` before it for another backend. It
writes its plots to out/.
"""

import argparse
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import keras_gradtools as kg  # before Keras: it starts the backend that is installed

# isort: split
import keras
import numpy as np
from keras import layers, ops

EPSILONS = (0.0, 0.1, 0.2, 0.3)


def load_data():
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = (digits.images[..., None] / 8 - 1).astype("float32"), digits.target
    return (x[:-300], y[:-300]), (x[-300:], y[-300:])


def build_classifier():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.Conv2D(32, 3, strides=2, padding="same", activation="relu"),
            layers.Flatten(),
            layers.Dense(10, activation="softmax"),
        ]
    )


def create_adversarial_pattern(model, input_image, input_label):
    """The sign of the gradient of the loss with respect to the image, as in the tutorial, by `kg.GradientTape`."""
    loss_object = keras.losses.SparseCategoricalCrossentropy()
    with kg.GradientTape() as tape:
        tape.watch(input_image)
        prediction = model(input_image)
        loss = loss_object(input_label, prediction)
    return ops.sign(tape.gradient(loss, input_image))


def read(model, image):
    """The predicted digit and its probability."""
    probabilities = model.predict(image, verbose=0)[0]
    return int(probabilities.argmax()), float(probabilities.max())


def show(images, titles, path):
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(images), figsize=(2.6 * len(images), 3), layout="constrained")
    for ax, image, title in zip(axes, images, titles, strict=True):
        ax.imshow(image[0, ..., 0], cmap="Greys", vmin=-1, vmax=1)
        ax.set(title=title, xticks=[], yticks=[])
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="the folder for the plots")
    options = parser.parse_args(arguments)

    import matplotlib

    matplotlib.use("agg")
    options.out.mkdir(parents=True, exist_ok=True)

    keras.utils.set_random_seed(0)
    (x, y), (x_test, y_test) = load_data()
    model = build_classifier()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(), metrics=["accuracy"])
    model.fit(x, y, epochs=15, verbose=0)

    image, label = x_test[1:2], y_test[1:2]
    perturbations = ops.convert_to_numpy(create_adversarial_pattern(model, ops.convert_to_tensor(image), label))
    found = []
    for epsilon in EPSILONS:
        adversarial = np.clip(image + epsilon * perturbations, -1, 1)
        digit, sure = read(model, adversarial)
        found.append((adversarial, digit, sure))
        # The same in one line, for any number of images. In float32, the tape's gradient through the softmax is zero if
        # a probability is rounded to 1. The gradient of `kg.attacks.fgsm` is not.
        in_one = kg.attacks.fgsm(model, image, label, epsilon, clip=(-1.0, 1.0), verbose=0)
        difference = np.abs(in_one - adversarial).max()
        print(f"epsilon = {epsilon}: read as {digit}, {sure:.1%} sure (kg.attacks.fgsm differs by {difference:g})")

    images, digits, sure = zip(*found, strict=True)
    titles = [f"epsilon = {e}\n{d}: {s:.1%}" for e, d, s in zip(EPSILONS, digits, sure, strict=True)]
    show([perturbations, *images], ["perturbation", *titles], options.out / "fgsm.png")
    for epsilon in EPSILONS:
        attacked = kg.attacks.fgsm(model, x_test, y_test, epsilon, clip=(-1.0, 1.0), verbose=0)
        accuracy = model.evaluate(attacked, y_test, verbose=0, return_dict=True)["accuracy"]
        print(f"epsilon = {epsilon}: {accuracy:.1%} of {len(x_test)} test digits are read correctly")
    print(f"Pictures: fgsm.png in {options.out}/")
    return found


if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as error:
        raise SystemExit(f'{error}: pip install "keras-gradtools[examples]"') from None
