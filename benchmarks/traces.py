"""The errors of trace estimates, and how well their standard errors cover them: `python -m benchmarks.traces`.

Hutchinson's estimator and Hutch++, with 99 products and 100 seeds each, estimate the trace of the Hessian of a trained
digits classifier (64-32-10, tanh, 2,410 weights). The true trace is that of the dense matrix, which also computes the
products. For the first seeds, the operator must give the same estimate. Writes benchmarks/results/traces.json.
"""

import argparse
import json
import os
import subprocess
import sys

from benchmarks.run import BACKENDS, RESULTS, ROOT, environment_of

MATVECS, SEEDS, WITH_THE_OPERATOR = 99, 100, 2
EPOCHS = 30


def trained_hessian():
    """Returns the Hessian of the loss of a trained classifier over its training data."""
    import keras
    from keras import layers
    from sklearn.datasets import load_digits

    import keras_gradtools as kg

    keras.utils.set_random_seed(0)
    x, y = load_digits(return_X_y=True)
    x, y = (x / 16).astype("float32"), y.astype("int32")
    model = keras.Sequential([layers.Input((64,)), layers.Dense(32, activation="tanh"), layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-2), loss)
    model.fit(x, y, batch_size=64, epochs=EPOCHS, verbose=0)
    return kg.curvature.Hessian(model, loss, (x, y), verbose=0)


def measure():
    import numpy as np

    import keras_gradtools as kg
    from keras_gradtools.backend import name

    hessian = trained_hessian()
    dense = hessian.dense().astype("float64")
    exact = np.trace(dense)
    result = {"backend": name(), "trace": float(exact), "matvecs": MATVECS, "seeds": SEEDS}
    for method in ("hutchinson", "hutch++"):
        found = [kg.curvature.trace(dense, MATVECS, method, seed) for seed in range(SEEDS)]
        for seed in range(WITH_THE_OPERATOR):
            by_operator = hessian.trace(MATVECS, method, seed).value
            if not abs(by_operator - found[seed].value) <= 1e-4 * exact:
                raise AssertionError(
                    f"The estimate by the operator is {by_operator}, by the dense matrix {found[seed].value}."
                )
        errors = np.array([f.value - exact for f in found])
        covered = sum(abs(e) <= 2 * f.standard_error for e, f in zip(errors, found, strict=True))
        result[method] = {"rms_error": float(np.sqrt(np.mean(errors**2))), "covered": int(covered)}
    result["closer"] = result["hutchinson"]["rms_error"] / result["hutch++"]["rms_error"]
    print(json.dumps(result))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="may be repeated")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        return measure()
    results = []
    for backend in options.backend or BACKENDS:
        command = [sys.executable, "-m", "benchmarks.traces", "--here"]
        environment = {**os.environ, **environment_of(backend)}
        done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print(
            f"{backend}: trace {results[-1]['trace']:.3g}; "
            + "; ".join(
                f"{method}: error {results[-1][method]['rms_error']:.3g}, {results[-1][method]['covered']} of {SEEDS} "
                "within two standard errors"
                for method in ("hutchinson", "hutch++")
            )
            + f"; {results[-1]['closer']:.1f} times closer",
            flush=True,
        )
    if not options.backend:
        (RESULTS / "traces.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
