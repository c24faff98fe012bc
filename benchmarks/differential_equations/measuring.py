"""One example: its steps until it is solved, and the times of a step with both kinds of layers."""

import contextlib
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
from unittest import mock

import keras
import numpy as np
from keras import ops

from benchmarks import hand_written, measure_backend
from benchmarks.differential_equations import nested_layers
from benchmarks.run import ROOT

ERROR = 1e-3
PHASES = "Adam", "Levenberg-Marquardt"
# The blocks of steps that are timed, for each way, their length, and the steps whose losses are compared.
BLOCKS, SECONDS = 5, 0.1
COMPARED = {"Adam": 20, "Levenberg-Marquardt": 3}


class Recorded(Exception):
    """The training of an example has been recorded."""


class Way:
    """One way to compute the derivatives: an example's network and residual, and the steps that train it."""

    def __init__(self, example, training):
        def record(*arguments):
            self.residual, self.points, self.watch, *epochs = arguments
            self.epochs = dict(zip(PHASES, epochs, strict=True))
            raise Recorded

        self._training, self.first_seconds = training, {}
        recording = mock.patch.object(example, "train", record), contextlib.suppress(Recorded)
        with tempfile.TemporaryDirectory() as folder, recording[0], recording[1]:
            example.main([f"--out={folder}"])

    def begin(self, phase, weights):
        """Makes the model that a phase trains from the given weights, and compiles it by its first steps."""
        self.watch.u.set_weights(weights)
        if phase == PHASES[0]:
            self._trainer = self._training.compile_adam(self.residual, self.epochs[phase])
        else:
            self._trainer = self._training.compile_levenberg_marquardt(self.residual)
        self._trainer.optimizer.build(self._trainer.trainable_variables)
        variables = [*self._trainer.trainable_variables, *self._trainer.optimizer.variables]
        self._start = [(v, np.array(ops.convert_to_numpy(v))) for v in variables]
        self.first_seconds[phase] = self.seconds_of(2)
        self.again()

    def again(self):
        """Goes back to where the phase began."""
        for v, value in self._start:
            v.assign(value)

    def losses(self, steps, *callbacks):
        data = self._training.data_of(self.points, steps, *callbacks)
        return np.array(self._trainer.fit(**data).history["loss"])

    def seconds_of(self, steps):
        start = time.process_time()
        self.losses(steps)
        return time.process_time() - start


class UntilSolved(keras.callbacks.Callback):
    """Counts the steps of a phase, and ends it at the error that is asked for."""

    def __init__(self, watch):
        super().__init__()
        self.steps, self._watch = 0, watch

    def on_epoch_end(self, epoch, logs=None):
        self.steps, self.error = self.steps + 1, self._watch.error()
        self.model.stop_training = self.is_solved = self.error < ERROR


def measure(name, save):
    """Measures an example, and saves the result after each phase."""
    sys.path.insert(0, os.fspath(ROOT / "examples" / "differential_equations"))
    example, training = importlib.import_module(name), importlib.import_module("training")
    hand_written.module().use_one_thread()
    with nested_layers.in_place():
        nested = Way(example, training)
    ours = Way(example, training)
    ways, phases = (nested, ours), []
    for phase in PHASES:
        weights = ours.watch.u.get_weights()
        # The first to compile also starts what is started once in a process, which should not favor this package.
        for way in (ours, nested):
            way.begin(phase, weights)
        first, second = (way.losses(COMPARED[phase]) for way in ways)
        steps = max(round(SECONDS / ours.seconds_of(1)), 1)
        # In turns, so that other load meets both.
        times = [[way.seconds_of(steps) / steps for way in ways] for _ in range(BLOCKS)]
        count = UntilSolved(ours.watch)
        ours.again()
        ours.losses(ours.epochs[phase], count)
        phases.append(
            {
                "phase": phase,
                "steps": count.steps,
                "error": float(f"{count.error:.3g}"),
                "ms": [round(1e3 * statistics.median(column), 3) for column in zip(*times, strict=True)],
                "ratio": round(statistics.median(a / b for a, b in times), 2),
                "first_seconds": [round(way.first_seconds[phase], 1) for way in ways],
                "losses_differ_by": float(f"{np.abs(first / second - 1).max():.1e}"),
            }
        )
        print(name, json.dumps(phases[-1]), flush=True)
        save({"machine": measure_backend.machine(), "is_solved": count.is_solved, "phases": phases})
        if count.is_solved:
            break
