"""Trial points of a line search: losses and gradients whose vectors stay on the device of the model."""

from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_gradtools import backend
from keras_gradtools.curvature.data import batch_sums
from keras_gradtools.curvature.data.batches import batch_size_of
from keras_gradtools.curvature.data.data_sums import on_devices
from keras_gradtools.curvature.data.loss_state import program_key
from keras_gradtools.curvature.operators.solver_vectors import solver_dtype
from keras_gradtools.keras_state import layer_state
from keras_gradtools.transforms import compiled


class Trial(NamedTuple):
    """What is known at the weights plus a step.

    Attributes:
        loss: The loss there, a float.
        gradient, step, change: The gradient there, the step, and the change of the gradient by it, flat tensors.
        slope, former_slope: The products of the step with the gradient there and with the former gradient.
        curvature: The product of the step with the change.
        gradient_norm, step_norm, change_norm: The norms of the vectors.
    """

    loss: float
    gradient: Any
    step: Any
    change: Any
    slope: float
    former_slope: float
    curvature: float
    gradient_norm: float
    step_norm: float
    change_norm: float


class Trials:
    """Evaluates a loss and its gradient at steps away from the current weights.

    Args:
        totals: A function of a flat step that returns the sums of the loss and of the gradient over the examples, and
            their number.
        size: The number of weights.
        dtype: The NumPy dtype of the vectors.
    """

    def __init__(self, totals, size, dtype):
        self._totals, self.dtype, self._zeros = totals, np.dtype(dtype), np.zeros(size, dtype)

    def start(self):
        """The `Trial` at the weights themselves, by the same programs. Its change has no meaning."""
        return self.at(self._zeros, self._zeros)

    def at(self, step, gradient):
        """The `Trial` at a step, where `gradient` is that at the weights: both flat vectors."""
        (loss, total), count = self._totals(step)
        # An array, because a NumPy number in double precision is also a float of Python.
        found, change, numbers = _measured(total, np.array(count, self.dtype), step, gradient)
        slope, former, curvature, *squares = sum(ops.convert_to_numpy(numbers).astype("float64")).tolist()
        norms = [square**0.5 for square in squares]
        return Trial(float(loss) / count, found, step, change, slope, former, curvature, *norms)


def trials_of(sums):
    """The `Trials` of a `DataSums` of a single batch. Each of them calls two programs and reads a few numbers."""
    sums.prepare("gradient")
    (batch,) = sums.batches
    size, batch, values = batch_size_of(batch), on_devices(batch), sums.draws.values
    length, dtype = sums.parameters.size, solver_dtype(sums.parameters.dtype)
    run, seed = _program(sums, batch, np.zeros(length, dtype))

    def totals(step):
        found, _ = run((values, None, step, batch, seed), {})
        return backend.summed_over_processes(found, size)

    return Trials(totals, length, dtype)


def _program(sums, batch, zeros):
    """The program of the gradient, as a function of its arguments, and the seed, which is one of them.

    They are remembered for further batches, since searching for a program takes longer than a small one runs.
    """
    key = program_key(sums)
    if key is not None:
        key = *key, sums.draws.key, sums.loss.captured_values(), sums.spec.seed, layer_state.ambient()
        known = sums.reads.get("gradient")
        if known is not None and known[0] == key and compiled.may_run():
            return known[1]
    seed = sums.seed(0)
    found = sums.compiled("gradient", batch_sums.add_loss_and_gradient, None, zeros, batch, seed), seed
    if compiled.may_run():
        sums.reads["gradient"] = key, found
    return found


@backend.jit
def _measured(total, count, step, former):
    """The gradient, its change, and products of these and of the step."""
    count, step, former = map(ops.convert_to_tensor, (count, step, former))
    gradient = ops.cast(total, step.dtype) / count
    change = gradient - former
    pairs = [(step, gradient), (step, former), (step, change), (gradient, gradient), (step, step), (change, change)]
    return gradient, change, backend.dots(pairs)
