"""Second-order training on one device or on several, and the differences between the two.

    python examples/distributed_second_order.py --out one.npz
    python examples/distributed_second_order.py --devices 2 --compare one.npz

Set `KERAS_BACKEND=jax` or `torch` for another backend. The function `train` is the same for all backends, and
examples/distributed.py has the function of each backend that distributes it. The devices are simulated on the CPU, so
the script runs everywhere.
"""

import argparse
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# The devices share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import keras_gradtools as kg  # before Keras: it starts the backend that is installed

# isort: split
import keras
import numpy as np
from keras import layers

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from distributed import LAUNCHERS

EXAMPLES, STEPS = 240, 5
POINTS, ENDS = 64, 16
# With less damping, the fifth step goes far along negative curvature, which amplifies the rounding differences between
# devices a hundred times.
OPTIMIZERS = {
    "Newton": lambda: kg.optimizers.Newton(damping=0.1),
    "LBFGS": lambda: kg.optimizers.LBFGS(),
    "BFGS": lambda: kg.optimizers.BFGS("ssbroyden"),
    "NewtonCG": lambda: kg.optimizers.NewtonCG(damping=1.0, max_iterations=20),
    # With a preconditioner, devices may stop one product earlier or later. A small `rtol` keeps the effect small.
    "NewtonCG, Gauss-Newton": lambda: kg.optimizers.NewtonCG(damping=0.5, curvature="gauss_newton", rtol=1e-5),
    "LevenbergMarquardt": lambda: kg.optimizers.LevenbergMarquardt(damping=0.1),
}
# These also solve a differential equation. TensorFlow's replicas would each compute its residuals at all points.
ON_RESIDUALS = ["LBFGS", "LevenbergMarquardt"] if keras.config.backend() != "tensorflow" else []


def load_data():
    """Digits of 4 by 4 pixels in a fixed order, and their labels: one batch that can be split evenly."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))[:EXAMPLES]
    x = digits.images[order].reshape(-1, 4, 2, 4, 2).mean(axis=(2, 4)).reshape(-1, 16) / 16
    return x.astype("float32"), digits.target[order].astype("int32")


def build_model():
    """A classifier with a regularizer, with the same weights on every backend."""
    l2 = keras.regularizers.L2(1e-3)
    parts = [keras.Input((16,)), layers.Dense(8, "tanh", kernel_regularizer=l2), layers.Dense(10)]
    model, rng = keras.Sequential(parts), np.random.default_rng(1)
    model.set_weights([0.3 * rng.normal(size=v.shape) for v in model.trainable_variables])
    return model


def train(optimizer, devices):
    """Loss, damping and accuracy at each of five steps, and the weights after them."""
    x, y = (devices.share(array) for array in load_data())
    model = build_model()
    trainer = kg.models.SecondOrder(model)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    trainer.compile(OPTIMIZERS[optimizer](), loss, metrics=["accuracy"])
    history = trainer.fit(x, y, batch_size=len(x), epochs=STEPS, shuffle=False, verbose=0).history
    results = {name: np.array(history[name]) for name in ("loss", "damping", "gradient_norm", "cg_iterations")}
    # A metric covers only the process's own examples.
    results["accuracy"] = devices.mean(history["accuracy"])
    return results | {f"weights/{i}": w for i, w in enumerate(model.get_weights())}


def residuals(model, points):
    """Of u'' = -pi^2 sin(pi x) with u(-1) = u(1) = 0."""
    x = points["inside"]
    return {
        "equation": kg.laplacian(model)(x) + np.pi**2 * keras.ops.sin(np.pi * x),
        "ends": model(points["ends"]),
    }


def train_on_residuals(optimizer, devices):
    """As `train`, on the points of a differential equation. Every process has as many points of each set."""
    rng = np.random.default_rng(2)
    points = {
        "inside": rng.uniform(-1, 1, size=(POINTS, 1)).astype("float32"),
        "ends": np.repeat([[-1.0], [1.0]], ENDS // 2, axis=0).astype("float32"),
    }
    points = {name: devices.share(array) for name, array in points.items()}
    model = keras.Sequential([keras.Input((1,)), layers.Dense(8, "tanh"), layers.Dense(1)])
    model.set_weights([rng.normal(size=v.shape) for v in model.trainable_variables])
    trainer = kg.models.SecondOrder(model)
    trainer.compile(OPTIMIZERS[optimizer](), kg.losses.SquaredResiduals(residuals, {"equation": 1.0, "ends": 100.0}))
    history = trainer.fit(points, epochs=STEPS, verbose=0).history
    results = {name: np.array(history[name]) for name in ("loss", "damping", "gradient_norm", "cg_iterations")}
    return results | {f"weights/{i}": w for i, w in enumerate(model.get_weights())}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--out", type=pathlib.Path, help="where to save the results, a .npz file")
    parser.add_argument("--compare", type=pathlib.Path, help="a saved file to compare the results with")
    options = parser.parse_args()
    options.arguments, options.script = sys.argv[1:], __file__

    def work(devices):
        results = {f"{name}/{key}": v for name in OPTIMIZERS for key, v in train(name, devices).items()}
        for name in ON_RESIDUALS:
            found = train_on_residuals(name, devices)
            results |= {f"{name}, residuals/{key}": v for key, v in found.items()}
        if devices.rank:
            return
        if options.out:
            np.savez(options.out, **results)
        expected = np.load(options.compare) if options.compare else None
        for name in [*OPTIMIZERS, *(f"{name}, residuals" for name in ON_RESIDUALS)]:
            losses = results[f"{name}/loss"]
            print(f"{name}: loss {losses[0]:.4f} -> {losses[-1]:.4f}", end="")
            if expected is not None:
                # The number of products may differ by one. Only the effect on the weights matters.
                left_out = f"{name}/cg_iterations"
                keys = [key for key in results if key.startswith(f"{name}/") and key != left_out]
                found = [np.abs(results[k] - expected[k]).max() / np.abs(expected[k]).max() for k in keys]
                print(f", differs from {options.compare} by at most {max(found):.0e} of the largest entry", end="")
            print()

    LAUNCHERS[keras.config.backend()](options, work)


if __name__ == "__main__":
    try:
        main()
    except ModuleNotFoundError as error:
        raise SystemExit(f'{error}: pip install "keras-gradtools[examples]"') from None
