"""Finds wrong labels and a useful batch size from the gradients of single examples.

Some digits have a wrong label. Early in training, the gradients of these examples are longer than those of the others,
and point elsewhere. The variance of the same gradients gives the gradient noise scale, the batch size at which the
noise of the gradient equals the gradient. The script compares the predicted noise with that of real batches.

Source: Paul, Ganguli & Dziugaite (arXiv:2107.07075) for the norms; McCandlish et al. (arXiv:1812.06162) for the noise.

Run `python examples/per_example_gradients.py`, with `KERAS_BACKEND=jax` or `torch` before it for another backend. It
writes per_example_gradients.png to out/.
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

WRONG = 0.05
BATCH_SIZES = (4, 16, 64, 256)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def load_data():
    """The digits, their labels, some of them wrong, and which ones."""
    from sklearn.datasets import load_digits

    digits, rng = load_digits(), np.random.default_rng(0)
    x, y = (digits.data / 16).astype("float32"), digits.target.astype("int32")
    is_wrong = rng.uniform(size=len(y)) < WRONG
    y = np.where(is_wrong, (y + rng.integers(1, 10, len(y))) % 10, y).astype("int32")
    return x, y, is_wrong


def build():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((64,)), layers.Dense(32, "tanh"), layers.Dense(10)])
    model.compile(keras.optimizers.Adam(3e-3), LOSS)
    return model


def example_gradients(model, x, y):
    """The gradient of each example's loss with respect to all weights, one row for each example."""
    fun, weights = kg.functionalize(model)

    def loss(weights, x, y):
        return LOSS(y, fun(weights, x))

    gradients = kg.jit(kg.per_example_grad(loss))(weights, ops.convert_to_tensor(x), ops.convert_to_tensor(y))
    return np.concatenate([ops.convert_to_numpy(g).reshape(len(x), -1) for g in gradients], axis=1)


def suspects(gradients, count):
    """The examples with the longest gradients."""
    return np.argsort(np.linalg.norm(gradients, axis=1))[::-1][:count]


def noise_of_batches(gradients, size, draws=400):
    """The mean squared distance of the gradient of a random batch from that of all examples."""
    rng, mean = np.random.default_rng(1), gradients.mean(axis=0)
    batches = rng.integers(0, len(gradients), (draws, size))
    return float(np.mean([np.sum((gradients[batch].mean(axis=0) - mean) ** 2) for batch in batches]))


def draw(gradients, is_wrong, noise, measured, path):
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    norms = np.linalg.norm(gradients, axis=1)
    bins = np.linspace(0, norms.max(), 40)
    left.hist(norms[~is_wrong], bins, color="tab:blue", alpha=0.7, label="right labels")
    left.hist(norms[is_wrong], bins, histtype="step", hatch="///", color="tab:red", label="wrong labels")
    left.set(title="Gradient norms of single examples", xlabel="gradient norm", ylabel="examples", yscale="log")
    left.legend()
    sizes = np.geomspace(BATCH_SIZES[0], 4 * BATCH_SIZES[-1])
    right.loglog(sizes, noise.covariance_trace / sizes, label="predicted noise, tr(covariance) / B")
    right.loglog(list(measured), list(measured.values()), "o", label="noise of random batches")
    right.axhline(noise.squared_norm, linestyle="--", color="tab:green", label="squared gradient")
    right.axvline(noise.noise_scale, linestyle=":", color="0.4", label=f"noise scale: {noise.noise_scale:.0f} examples")
    right.set(title="Squared error of the gradient of a batch", xlabel="batch size B")
    right.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="the folder for the picture")
    options = parser.parse_args(arguments)

    import matplotlib

    matplotlib.use("agg")
    (x, y, is_wrong), model = load_data(), build()
    scales = [kg.diagnostics.gradient_noise_scale(model, None, (x, y)).noise_scale]
    model.fit(x, y, batch_size=64, epochs=options.epochs, verbose=0)
    gradients = example_gradients(model, x, y)
    found = is_wrong[suspects(gradients, is_wrong.sum())]
    print(f"{is_wrong.sum()} of {len(x)} labels are wrong, {keras.config.backend()}")
    print(f"{found.sum()} of the {len(found)} longest gradients belong to them, {found[:50].sum()} of the 50 longest")

    noise = kg.diagnostics.gradient_noise_scale(model, None, (x, y))
    scales.append(noise.noise_scale)
    print(f"gradient noise scale: {scales[0]:.1f} examples before training, {scales[1]:.0f} now")
    measured = {size: noise_of_batches(gradients, size) for size in BATCH_SIZES}
    for size, value in measured.items():
        print(f"noise of batches of {size:3d}: {value:.2e}, predicted {noise.covariance_trace / size:.2e}")
    options.out.mkdir(parents=True, exist_ok=True)
    draw(gradients, is_wrong, noise, measured, options.out / "per_example_gradients.png")
    print(f"Picture: per_example_gradients.png in {options.out}/")
    return gradients, is_wrong, noise, measured, scales


if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as error:
        raise SystemExit(f'{error}: pip install "keras-gradtools[examples]"') from None
