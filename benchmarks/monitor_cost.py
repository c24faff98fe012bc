"""The cost of a monitor relative to an epoch of the digits demo: `python -m benchmarks.monitor_cost`.

Uses the classifier, the data and two of the four training methods of examples/demo.py (plain, and with the penalty), on
one core. A measurement at the end of an epoch is timed inside `fit`, with its preparations before the last step. The
reported share is the time of the measurement divided by that of its epoch, as the median over epochs. The first epochs,
which compile, are excluded. Writes benchmarks/results/BACKEND_monitor_cost.json. `--only TEXT` measures the monitors
with this text in their name, and keeps the others' rows. `--cpu` takes the CPU time of the process instead of the
clock's, which depends less on what else runs on the machine, and writes no file.
"""

import argparse
import json
import os
import subprocess
import sys
import time

from benchmarks.run import BACKENDS, RESULTS, ROOT, environment_of

EPOCHS, LEFT_OUT = 14, 4
TARGET = 0.1
CURVATURE_EXAMPLES = (8, 16, 64)
JACOBIAN_EXAMPLES = (8, 16)
GRADIENT_EXAMPLES = (8, 16, 64)
WAYS = ("plain", "penalty")


def monitors(x, y):
    """A dict from names in the table to monitors."""
    import keras_gradtools as kg

    norms = ("spectral_norm", "frobenius_norm", "condition_number", "effective_rank", "dynamical_isometry")
    return {
        **{
            f"CurvatureMonitor, {n} examples": kg.callbacks.CurvatureMonitor((x[:n], y[:n])) for n in CURVATURE_EXAMPLES
        },
        **{
            f"CurvatureMonitor, critical sharpness alone, {n} examples": kg.callbacks.CurvatureMonitor(
                (x[:n], y[:n]), quantities="critical_sharpness"
            )
            for n in CURVATURE_EXAMPLES
        },
        **{f"BatchJacobianMonitor, {n} examples": kg.callbacks.BatchJacobianMonitor(x[:n]) for n in JACOBIAN_EXAMPLES},
        **{
            f"BatchJacobianMonitor, {n} examples, without local_lipschitz": kg.callbacks.BatchJacobianMonitor(
                x[:n], quantities=norms
            )
            for n in JACOBIAN_EXAMPLES
        },
        **{f"GradientMonitor, {n} examples": kg.callbacks.GradientMonitor((x[:n], y[:n])) for n in GRADIENT_EXAMPLES},
    }


def timed(monitor, now):
    """A callback that times the epochs, and the measurements of `monitor` after them, by the clock `now`."""
    import keras

    class Timed(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            monitor.set_model(self.model)
            monitor.set_params(self.params)
            monitor.on_train_begin(logs)
            self.epochs, self.measurements = [], []

        def on_epoch_begin(self, epoch, logs=None):
            self.before = 0.0
            self.start = now()

        def on_train_batch_begin(self, batch, logs=None):
            if batch == self.params["steps"] - 1:
                # Wait for JAX to finish the previous steps, which are not part of the measurement.
                getattr(self.model, "jax_state_sync", lambda: None)()
                keras.ops.convert_to_numpy(self.model.trainable_variables[0])
            start = now()
            monitor.on_train_batch_begin(batch, logs)
            self.before += now() - start

        def on_epoch_end(self, epoch, logs=None):
            middle = now()
            monitor.on_epoch_end(epoch, logs)
            self.epochs.append(middle - self.start - self.before)
            self.measurements.append(now() - middle + self.before)

    return Timed()


def measure(only, now=time.perf_counter):
    import keras
    import numpy as np

    sys.path.insert(0, str(ROOT / "examples"))
    import demo

    (x, y), _ = demo.load_data()
    found = {"backend": keras.backend.backend(), "target": TARGET, "rows": []}
    for way in WAYS:
        for name, monitor in monitors(x, y).items():
            if only not in name:
                continue
            keras.utils.set_random_seed(0)
            model = demo.WAYS[way](demo.build_classifier())
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])
            times = timed(monitor, now)
            model.fit(x, y, batch_size=demo.BATCH_SIZE, epochs=EPOCHS, verbose=0, callbacks=[times])
            epochs, measurements = (np.array(t[LEFT_OUT:]) for t in (times.epochs, times.measurements))
            low, share, high = np.quantile(measurements / epochs, (0.25, 0.5, 0.75))
            row = {"way": way, "monitor": name, "epoch_ms": 1e3 * float(np.median(epochs))}
            row |= {"measurement_ms": 1e3 * float(np.median(measurements))}
            found["rows"].append(row | {"share": float(share), "quartiles": [float(low), float(high)]})
            print(f"{way}, {name}: {share:.0%} of an epoch of {row['epoch_ms']:.0f} ms", flush=True)
            keras.utils.clear_session()
    return found


def _in_order(rows):
    """The rows of one way of training after those of the other."""
    return sorted(rows, key=lambda row: WAYS.index(row["way"]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=BACKENDS, help="only this backend")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the monitors with this text in their name")
    parser.add_argument("--cpu", action="store_true", help="print shares of CPU time, and write no file")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.here:
        for backend in [options.backend] if options.backend else BACKENDS:
            arguments = ["--here", "--backend", backend, "--only", options.only, *["--cpu"] * options.cpu]
            command = [sys.executable, "-m", "benchmarks.monitor_cost", *arguments]
            subprocess.run(command, cwd=ROOT, env=environment_of(backend), check=True)
        return
    if options.backend == "torch":
        import torch

        torch.set_num_threads(1)
    if options.cpu:
        measure(options.only, time.process_time)
        return
    path = RESULTS / f"{os.environ['KERAS_BACKEND']}_monitor_cost.json"
    found = measure(options.only)
    if options.only and path.exists():
        kept = json.loads(path.read_text())["rows"]
        found["rows"] = _in_order([row for row in kept if options.only not in row["monitor"]] + found["rows"])
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"Wrote {path.name}")


if __name__ == "__main__":
    main()
