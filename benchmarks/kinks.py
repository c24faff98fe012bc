"""The effect of kinks on the exact penalty: `python -m benchmarks.kinks [--backend jax]`.

A digits classifier, with ReLU and with smooth activations, is trained with the squared l2 penalty (weight 1), computed
exactly and by finite differences. In both cases, the exact penalty on all digits is measured. For the models trained
with the exact penalty, the cosine between the weight gradients of the two penalties is measured for several steps h. It
takes two minutes. Writes docs/kinks.png and benchmarks/results/kinks.json.
"""

import argparse
import json
import os
import subprocess
import sys

from benchmarks.run import BACKENDS, RESULTS, ROOT, environment_of

ACTIVATIONS = ("relu", "leaky_relu", "gelu", "softplus", "tanh")
METHODS = ("exact", "finite_difference")
STEP_SIZES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)
WEIGHT, STEP_SIZE, EPOCHS = 1.0, 0.1, 30


def data():
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images / 16.0).astype("float32")[..., None], digits.target


def trained(activation, method):
    """A trained model, and the exact penalty after each epoch."""
    import keras
    from keras import layers

    import keras_gradtools as kg

    keras.utils.set_random_seed(0)
    x, y = data()
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", activation=activation),
            layers.Conv2D(32, 3, strides=2, padding="same", activation=activation),
            layers.Flatten(),
            layers.Dense(64, activation=activation),
            layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    regularized = kg.models.InputGradientRegularized(model, WEIGHT, method=method, step_size=STEP_SIZE)
    regularized.compile("adam", loss)
    measured = kg.models.InputGradientRegularized(model, 0.0, method="exact")
    measured.compile(loss=loss)
    penalties = []

    class Measure(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            _ = self.model  # on JAX, accessing the model updates its weights
            logs = measured.evaluate(x, y, batch_size=len(x), verbose=0, return_dict=True)
            penalties.append(logs["input_gradient_penalty"])

    regularized.fit(x, y, epochs=EPOCHS, verbose=0, callbacks=[Measure()])
    return model, penalties


def weight_gradient(model, x, y, method, step_size):
    """The gradient of the penalty with respect to all weights, as one vector."""
    import keras
    import numpy as np
    from keras import ops

    import keras_gradtools as kg

    options = {} if step_size is None else {"step_size": step_size}
    with kg.GradientTape() as tape:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        penalty = kg.regularization.input_gradient_penalty(model, x, y, loss=loss, method=method, **options)
    gradients = tape.gradient(penalty, model.trainable_variables, unconnected_gradients="zero")
    return np.concatenate([ops.convert_to_numpy(g).ravel() for g in gradients]).astype("float64")


def measure(activation):
    import numpy as np

    x, y = data()
    runs = {method: trained(activation, method) for method in METHODS}
    model, _ = runs["exact"]
    exact = weight_gradient(model, x, y, "exact", None)
    by_step = [weight_gradient(model, x, y, "finite_difference", h) for h in STEP_SIZES]
    cosines = [float(exact @ g / np.linalg.norm(exact) / np.linalg.norm(g)) for g in by_step]
    return {"activation": activation, "cosines": cosines} | {method: p for method, (_, p) in runs.items()}


def plot(results, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from keras_gradtools.drawing.styles import series_style

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for number, result in enumerate(results):
        left.semilogx(STEP_SIZES, result["cosines"], label=result["activation"], **series_style(number))
    left.set(
        title="Do the two training gradients agree?",
        xlabel="step size h",
        ylabel="cosine, exact with finite differences",
        ylim=(0, 1.05),
    )
    left.legend()
    for axes, activation in ((middle, "relu"), (right, "softplus")):
        (result,) = [r for r in results if r["activation"] == activation]
        names = {"exact": "trained with the exact penalty", "finite_difference": f"with differences, h = {STEP_SIZE}"}
        for number, (key, label) in enumerate(names.items()):
            axes.semilogy(range(1, EPOCHS + 1), result[key], label=label, markersize=3, **series_style(number))
        axes.set(title=f"The penalty in training: {activation}", xlabel="epoch", ylabel="exact penalty, all digits")
        axes.legend()
    middle.sharey(right)
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=BACKENDS, default="torch")
    options = parser.parse_args()
    if os.environ.get("KERAS_BACKEND") != options.backend:
        command = [sys.executable, "-m", "benchmarks.kinks", "--backend", options.backend]
        sys.exit(subprocess.run(command, cwd=ROOT, env=environment_of(options.backend)).returncode)
    results = [measure(activation) for activation in ACTIVATIONS]
    for result in results:
        shown = ", ".join(f"{h:g}: {c:.3f}" for h, c in zip(STEP_SIZES, result["cosines"], strict=True))
        print(f"{result['activation']:12s} cosine by step size  {shown}")
        for method in METHODS:
            print(f"{'':12s} exact penalty after training by {method}: {result[method][-1]:.3f}")
    kept = {"backend": options.backend, "step_sizes": STEP_SIZES, "results": results}
    (RESULTS / "kinks.json").write_text(json.dumps(kept, indent=1) + "\n")
    plot(results, ROOT / "docs" / "kinks.png")
    print("Wrote docs/kinks.png and benchmarks/results/kinks.json")


if __name__ == "__main__":
    main()
