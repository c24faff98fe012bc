"""Trial points of a line search: losses and gradients whose vectors stay on the device of the model."""

import functools
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
        along: A function of a `Direction` that returns a function of numbers t and a gradient. This returns the `Trial`
            at t times the direction, and what else the direction computes. This is one program, or two if
            `backend.CONTRACTS_PRODUCTS`. None if there is no such program.
    """

    def __init__(self, totals, size, dtype, along=None):
        self.totals, self.dtype, self._zeros = totals, np.dtype(dtype), np.zeros(size, dtype)
        self._along = along

    @property
    def can_follow(self):
        """Whether `along` can be used."""
        return self._along is not None

    def along(self, direction):
        """See the arguments of the class."""
        return self._along(direction)

    def start(self, direction=None):
        """The `Trial` at the weights themselves, by the same programs. Its change has no meaning.

        With a `Direction`, it is by the program of `along`.
        """
        if direction is None:
            return self.at(self._zeros, self._zeros)
        trial, _ = self.along(direction)(0.0, self._zeros)
        return trial

    def at(self, step, gradient):
        """The `Trial` at a step, where `gradient` is that at the weights: both flat vectors."""
        (loss, total), count = self.totals(step)
        # An array, because a NumPy number in double precision is also a float of Python.
        found, change, numbers = _measured(total, np.array(count, self.dtype), step, gradient)
        return _trial(float(loss) / count, found, step, change, numbers)


def _trial(loss, gradient, step, change, numbers):
    slope, former, curvature, *squares = sum(ops.convert_to_numpy(numbers).astype("float64")).tolist()
    norms = [square**0.5 for square in squares]
    return Trial(loss, gradient, step, change, slope, former, curvature, *norms)


class Direction(NamedTuple):
    """A direction that a program computes from the gradient, together with the trial along it.

    Attributes:
        compute: A function of the gradient and `arguments`, which returns the direction and more tensors. It holds
            nothing but its code, because its programs are cached as long as the model lives.
        arguments: Arrays.
    """

    compute: Any
    arguments: tuple


def trials_of(sums):
    """The `Trials` of a `DataSums` of a single batch.

    Each of them calls two programs and reads a few numbers. Those along a `Direction` call one.
    """
    sums.prepare("gradient")
    (batch,) = sums.batches
    size, batch, values = batch_size_of(batch), on_devices(batch), sums.draws.values
    length, dtype = sums.parameters.size, solver_dtype(sums.parameters.dtype)
    zeros = np.zeros(length, dtype)

    def totals(step):
        run, seed = _program(sums, "gradient", batch_sums.add_loss_and_gradient, (None, zeros, batch), batch)
        found, _ = run((values, None, step, batch, seed), {})
        return backend.summed_over_processes(found, size)

    def along(direction):
        count, given = np.array(size, dtype), direction.arguments
        what: Any
        if backend.CONTRACTS_PRODUCTS:
            # In one program, the weights plus t times the direction might be other than those that are assigned.
            known, what, body, given = [], "trial", _at_step, ()
            args = count, zeros, zeros
        else:
            what, body = ("along", direction.compute), functools.partial(_along, direction.compute)
            args = count, count, zeros, *given
        run, seed = _program(sums, what, body, (args, batch), batch)

        def at(t, gradient):
            more = None
            if not backend.CONTRACTS_PRODUCTS:
                args = np.array(t, dtype), count, gradient, *given
            elif t == 0.0:
                args = count, gradient, zeros
            else:
                if not known:
                    known.append(_computed(direction.compute)(gradient, *direction.arguments))
                ((found, more),) = known
                args = count, gradient, found if t == 1.0 else found * dtype.type(t)
            found, _ = run((values, args, batch, seed), {})
            gradient, step, change, numbers, *rest = found
            numbers = ops.convert_to_numpy(numbers)
            trial = _trial(float(numbers[0, -1]) / size, gradient, step, change, numbers[:, :-1])
            return trial, rest[0] if rest else more

        return at

    return Trials(totals, length, dtype, along if sums.can_evaluate_at_once() else None)


def _program(sums, what, body, args, batch):
    """The program of `body`, as a function of its arguments, and the seed, which is the last one of them.

    They are remembered for further batches, since searching for a program takes longer than a small one runs.
    """
    key = program_key(sums)
    if key is not None:
        key = *key, sums.draws.key, sums.loss.captured_values(), sums.spec.seed, layer_state.ambient()
        known = sums.reads.get(what)
        if known is not None and known[0] == key and compiled.may_run():
            return known[1]
    seed = sums.seed(0)
    found = sums.compiled(what, body, *args, seed), seed
    if compiled.may_run():
        sums.reads[what] = key, found
    return found


def _along(compute, spec, loss, parameters, model, args, batch, seed):
    """As `_at_step`, at t times a direction, with what else the direction computes."""
    t, count, former, *arguments = map(ops.convert_to_tensor, args)
    direction, more = compute(former, *arguments)
    found, note = _at_step(spec, loss, parameters, model, (count, former, t * direction), batch, seed)
    return (*found, more), note


def _at_step(spec, loss, parameters, model, args, batch, seed):
    """The vectors of the trial at a step, and its numbers with the loss as the last one."""
    count, former, step = map(ops.convert_to_tensor, args)
    (value, total), _ = batch_sums.add_loss_and_gradient(spec, loss, parameters, model, None, step, batch, seed)
    gradient, change, numbers = _numbers(total, count, step, former)
    value = ops.cast(value, step.dtype)
    column = ops.stack([value, ops.zeros_like(value)])[:, None]
    return (gradient, step, change, ops.concatenate([numbers, column], axis=1)), None


@functools.cache
def _computed(compute):
    """What a `Direction` computes, by a program of its own."""
    return backend.jit(lambda *args: compute(*map(ops.convert_to_tensor, args)))


def _numbers(total, count, step, former):
    """The gradient, its change, and products of these and of the step."""
    gradient = ops.cast(total, step.dtype) / count
    change = gradient - former
    pairs = [(step, gradient), (step, former), (step, change), (gradient, gradient), (step, step), (change, change)]
    return gradient, change, backend.dots(pairs)


@backend.jit
def _measured(total, count, step, former):
    return _numbers(total, *map(ops.convert_to_tensor, (count, step, former)))
