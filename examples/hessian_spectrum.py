"""Reads the spectrum of the Hessian of a digit classifier, before and after training.

After training, most eigenvalues are near zero, and a few outliers are much larger. The largest bounds the learning rate
of gradient descent: above 2 / lambda_max, a step increases the loss along that eigenvector. The outliers come from the
Gauss-Newton part of the Hessian.

Source: Sagun et al. (arXiv:1706.04454); Ghorbani, Krishnan & Xiao (arXiv:1901.10159); Papyan (arXiv:1811.07062).

Run `python examples/hessian_spectrum.py`, with `KERAS_BACKEND=jax` or `torch` before it for another backend. It writes
hessian_spectrum.png to out/.
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

CLASSES = 10
OUTLIERS = 12
SMALL = 0.02
RATES = (1.0, 1.9, 2.1)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def load_data(count):
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.data))[:count]
    return (digits.data[order] / 16).astype("float32"), digits.target[order].astype("int32")


def build():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((64,)), layers.Dense(24, "tanh"), layers.Dense(24, "tanh"), layers.Dense(10)])
    model.compile(keras.optimizers.Adam(1e-2), LOSS, metrics=["accuracy"])
    return model


def spectrum(model, data, probes, steps):
    """The density of all eigenvalues, the largest and the smallest ones, and the eigenvector of the largest."""
    h = kg.curvature.Hessian(model, LOSS, data, verbose=0)
    density = h.spectral_density(probes=probes, steps=steps)
    largest, vectors = h.eigsh(OUTLIERS, "LA")
    (smallest,), _ = h.eigsh(1, "SA")
    gauss_newton, _ = kg.curvature.GaussNewton(model, LOSS, data, verbose=0).eigsh(OUTLIERS, "LA")
    found = {
        "density": density,
        "largest": largest[::-1],
        "smallest": smallest,
        "gauss_newton": gauss_newton[::-1],
        "near zero": share_near_zero(density, 0.01 * largest[-1]),
    }
    return found, vectors[:, -1]


def share_near_zero(density, width):
    """The share of the eigenvalues of magnitude up to `width`: the nodes of the quadrature with their weights."""
    return float(np.nansum(np.where(np.abs(density.nodes) <= width, density.weights, 0.0)) / np.nansum(density.weights))


def growth(model, data, vector, rate):
    """The factor by which a step of gradient descent with this rate multiplies a small change along `vector`."""
    weights = model.get_weights()
    model.compile(keras.optimizers.SGD(float(rate)), LOSS)

    def after_step(length):
        moved, place = [], 0
        for w in weights:
            moved.append(w + length * vector[place : place + w.size].reshape(w.shape))
            place += w.size
        model.set_weights(moved)
        model.train_on_batch(*data)
        return np.concatenate([w.ravel() for w in model.get_weights()])

    factor = float((after_step(SMALL) - after_step(-SMALL)) @ vector / (2 * SMALL))
    model.set_weights(weights)
    return factor


def draw(found, path):
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(11, 4), layout="constrained", sharey=True)
    for ax, (name, result) in zip(axes, found.items(), strict=True):
        kg.plots.plot_spectral_density(result["density"], ax)
        level = ax.get_ylim()[0] * 1.5
        ax.plot(
            result["largest"], np.full(OUTLIERS, level), "|", color="tab:red", markersize=14, label="largest, eigsh"
        )
        ax.set_title(f"{name}, {result['near zero']:.0%} near zero")
        ax.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer digits, and a rougher density")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="the folder for the picture")
    options = parser.parse_args(arguments)

    import matplotlib

    matplotlib.use("agg")
    count, epochs, probes, steps = (256, 5, 2, 30) if options.quick else (1024, 30, 6, 80)
    data, model = load_data(count), build()
    found = {}
    found["before training"], _ = spectrum(model, data, probes, steps)
    model.fit(*data, batch_size=64, epochs=epochs, verbose=0)
    found["after training"], vector = spectrum(model, data, probes, steps)
    print(f"{model.count_params()} weights, {count} digits, {CLASSES} classes, {keras.config.backend()}")
    for name, result in found.items():
        print(
            f"{name}: from {result['smallest']:.3g} to {result['largest'][0]:.3g}, {result['near zero']:.0%} near zero"
        )
        print("  largest of the Hessian:     ", *(f"{value:6.2f}" for value in result["largest"]))
        print("  largest of its Gauss-Newton:", *(f"{value:6.2f}" for value in result["gauss_newton"]))
    top = found["after training"]["largest"][0]
    growths = {factor: growth(model, data, vector, factor / top) for factor in RATES}
    for factor, grown in growths.items():
        print(
            f"learning rate {factor:g} / lambda_max: a step multiplies a change along the top eigenvector by "
            f"{grown:.2f}; 1 - {factor:g} = {1 - factor:.2f}"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    draw(found, options.out / "hessian_spectrum.png")
    print(f"Picture: hessian_spectrum.png in {options.out}/")
    return found, growths


if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as error:
        raise SystemExit(f'{error}: pip install "keras-gradtools[examples]"') from None
