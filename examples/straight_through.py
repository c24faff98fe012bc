"""Trains a digit classifier whose weights have few bits, with a straight-through gradient through the rounding.

Rounding has the gradient zero almost everywhere. `kg.straight_through` gives it the gradient of the identity, so that
the weights before the rounding learn (quantization-aware training). For comparison, a trained model is rounded
afterwards, and a model is trained without the straight-through gradient.

Source: Bengio, Leonard & Courville (arXiv:1308.3432); Jacob et al. (arXiv:1712.05877).

Run `python examples/straight_through.py`, with `KERAS_BACKEND=jax` or `torch` before it for another backend. It writes
straight_through.png to out/.
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

BITS = (4, 3, 2, 1)
NAMES = ("trained with rounding", "rounded afterwards")
STYLES = ("o-", "s--")


def load_data():
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = (digits.data / 16).astype("float32"), digits.target.astype("int32")
    order = np.random.default_rng(0).permutation(len(x))
    train, test = order[:-500], order[-500:]
    return (x[train], y[train]), (x[test], y[test])


def rounded(kernel, bits):
    """The kernel on 2^bits evenly spaced values, symmetric about 0. With one bit, its sign times its mean size."""
    if bits == 1:
        return ops.where(kernel >= 0, 1.0, -1.0) * ops.stop_gradient(ops.mean(ops.abs(kernel)))
    half = 2 ** (bits - 1)
    scale = ops.stop_gradient(ops.max(ops.abs(kernel))) / half
    return (ops.clip(ops.floor(kernel / scale), -half, half - 1) + 0.5) * scale


class RoundedDense(layers.Dense):
    """A Dense layer that computes with a kernel of a few bits. `bits` is None for full precision."""

    def __init__(self, units, activation=None, bits=None, straight_through=True, **kwargs):
        super().__init__(units, activation, **kwargs)
        self.bits, self.straight_through = bits, straight_through

    def call(self, inputs):
        kernel = self.kernel
        if self.bits is not None:
            rounding = lambda k: rounded(k, self.bits)  # noqa: E731
            kernel = (kg.straight_through(rounding) if self.straight_through else rounding)(kernel)
        return self.activation(ops.matmul(inputs, kernel) + self.bias)


def build(bits=None, straight_through=True):
    keras.utils.set_random_seed(0)
    options = {"bits": bits, "straight_through": straight_through}
    hidden = [RoundedDense(32, "relu", **options) for _ in range(2)]
    model = keras.Sequential([keras.Input((64,)), *hidden, RoundedDense(10, **options)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-3), loss, metrics=["accuracy"])
    return model


def train(model, data, epochs):
    model.fit(*data, batch_size=64, epochs=epochs, verbose=0)
    return model


def accuracy(model, test):
    return model.evaluate(*test, batch_size=500, verbose=0, return_dict=True)["accuracy"]


def gradient_length(model, data):
    """The norm of the gradient of the loss with respect to the first kernel."""
    x, y = ops.convert_to_tensor(data[0]), ops.convert_to_tensor(data[1])
    kernel = model.layers[0].kernel
    with kg.GradientTape() as tape:
        loss = ops.mean(keras.losses.sparse_categorical_crossentropy(y, model(x), from_logits=True))
    return float(np.linalg.norm(ops.convert_to_numpy(tape.gradient(loss, kernel, unconnected_gradients="zero"))))


def draw(found, full, path):
    from matplotlib import pyplot

    figure, ax = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for name, style in zip(NAMES, STYLES, strict=True):
        ax.plot(range(len(found)), [100 * shares[name] for shares in found.values()], style, label=name)
    ax.axhline(100 * full, color="0.5", linewidth=1, label="full precision")
    ax.set_xticks(range(len(found)), list(found))
    ax.set(title="Digits read correctly", xlabel="bits of each weight", ylabel="accuracy (%)", ylim=(0, 103))
    ax.grid(alpha=0.3)
    ax.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--bits", type=int, nargs="+", default=BITS, help="the numbers of bits of a weight")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="the folder for the picture")
    options = parser.parse_args(arguments)

    import matplotlib

    matplotlib.use("agg")
    data, test = load_data()
    full = train(build(), data, options.epochs)
    print(f"full precision, {keras.config.backend()}: {accuracy(full, test):.1%} of {len(test[0])} test digits")
    found = {}
    for bits in options.bits:
        after = build(bits)
        after.set_weights(full.get_weights())
        models = train(build(bits), data, options.epochs), after
        found[bits] = {name: accuracy(model, test) for name, model in zip(NAMES, models, strict=True)}
        print(f"{bits} bits: " + ", ".join(f"{name} {share:.1%}" for name, share in found[bits].items()))
    fewest = min(options.bits)
    without = accuracy(train(build(fewest, straight_through=False), data, options.epochs), test)
    print(f"{fewest} bits, trained with rounding, but without straight-through: {without:.1%}")
    lengths = {flag: gradient_length(build(fewest, flag), data) for flag in (True, False)}
    print(f"norm of the first kernel's gradient: {lengths[True]:.3f}, without straight-through {lengths[False]:.3f}")
    options.out.mkdir(parents=True, exist_ok=True)
    draw(found, accuracy(full, test), options.out / "straight_through.png")
    print(f"Picture: straight_through.png in {options.out}/")
    return found, without, lengths


if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as error:
        raise SystemExit(f'{error}: pip install "keras-gradtools[examples]"') from None
