"""The targets that a penalty differentiates: the loss, all outputs, or a custom number for each example."""

import dataclasses
import math

import keras
from keras import ops

from keras_gradtools import nesting, validation
from keras_gradtools.example_norms import at_least_single
from keras_gradtools.input_gradients.masks import without_padding
from keras_gradtools.keras_state import example_losses
from keras_gradtools.tape import jacobian_plans

# The value of `projections` that stands for all outputs without projection.
ALL = -1


class Target:
    """The base class of targets.

    `gradients(call)` is the gradient of each example's target with respect to its inputs, None for unconnected ones.
    `parts()` are the targets that finite differences are taken of, each with one number for each example.
    """

    def recomputed(self):
        """The same target for another call, without values cached from the first one."""
        return self

    def gradients(self, call):
        values = self.recorded(call)
        return call.vjp([values], [ops.ones_like(values)])

    def parts(self):
        return [self]

    def each(self, outputs):
        """The target of each example as a function of the outputs, of shape `(batch,)`."""
        raise NotImplementedError

    def recorded(self, call):
        """`each` for the outputs of a call, recorded on its tape."""
        return call.recorded(lambda: self.each(call.outputs))


class LossTarget(Target):
    """The compiled loss, as the sum of the losses of its examples.

    `total` and `losses` (of the examples), both without sample weights, may be set to values that are already recorded
    with the call, so that they are not computed again.
    """

    def __init__(self, owner, compile_loss, y):
        self._owner, self._compile_loss, self._y = owner, compile_loss, y
        self.total = self.losses = None

    def recomputed(self):
        return LossTarget(self._owner, self._compile_loss, self._y)

    def gradients(self, call):
        loss = self.total
        if loss is None:
            loss = call.recorded(lambda: example_losses.total_loss(self._compile_loss, self._y, call.outputs))
        # The factor is applied to the cotangent, because in half precision the gradients of a mean may underflow.
        factor = example_losses.off_replica(ops.cast(call.batch_size, loss.dtype))
        return call.vjp([loss], [ops.broadcast_to(factor, ops.shape(loss))])

    def recorded(self, call):
        return super().recorded(call) if self.losses is None else self.losses

    def each(self, outputs):
        losses = example_losses.example_losses(self._compile_loss, self._y, outputs)
        if losses is None:
            raise ValueError(
                f"{self._owner} with method='finite_difference' needs the loss of each example. Received: a loss that "
                "returns one number for the whole batch. Let it return one value for each example, which Keras "
                "averages, or use method='exact'."
            )
        return losses


class FunctionTarget(Target):
    """A function of the labels and the outputs, or only of the outputs, that returns one number for each example."""

    def __init__(self, owner, fun, *arguments):
        self._owner, self._fun, self._arguments = owner, fun, arguments

    def each(self, outputs):
        values = self._fun(*self._arguments, outputs)
        if ops.is_tensor(values) and len(values.shape) == 2 and values.shape[1] == 1:
            values = values[:, 0]
        if not ops.is_tensor(values) or len(values.shape) != 1:
            raise ValueError(
                f"The function given to {self._owner} as `target` must return one number for each example, of shape "
                f"(batch,). Received: {validation.describe(values)}. Reduce over all axes except the batch axis."
            )
        return values


class OutputsTarget(Target):
    r"""All outputs, whose gradients are the rows of the Jacobian, or random projections of them.

    A projection is $v \cdot y_i$, with $v$ uniform on the unit sphere in the space of the $C$ outputs of one example.
    With the factor $\sqrt{C / P}$, the expected sum of the squared gradient norms of $P$ projections is
    $\lVert J_i \rVert_F^2$.
    """

    def __init__(self, outputs, projections, seed):
        self._outputs = float_outputs(outputs)
        # Drawn here, because the place where they are used may be a branch that is traced separately.
        self._mixtures = None if projections == ALL else _mixtures(self._outputs, projections, seed)

    def gradients(self, call):
        outputs = call.recorded(lambda: float_outputs(call.outputs))
        if self._mixtures is None:
            blocks = jacobian_plans.jacobians(call.tape, outputs, call.sources, "reverse", None, False, batch_axes=1)
            return [block for row in blocks for block in row]
        scale, stacks = self._mixtures
        found = call.vjp_batch(outputs, stacks)
        return [None if g is None else scale * at_least_single(ops.moveaxis(g, 0, 1)) for g in found]

    def parts(self):
        if self._mixtures is not None:
            scale, stacks = self._mixtures
            return [_Mixture(scale, [stack[i] for stack in stacks]) for i in range(stacks[0].shape[0])]
        return [_Element(place, i) for place, y in enumerate(self._outputs) for i in range(math.prod(y.shape[1:]))]


@dataclasses.dataclass
class _Element(Target):
    """One element of one output, as a target."""

    place: int
    element: int

    def each(self, outputs):
        y = float_outputs(outputs)[self.place]
        return ops.reshape(y, (ops.shape(y)[0], -1))[:, self.element]


@dataclasses.dataclass
class _Mixture(Target):
    """A weighted sum of all elements of all outputs, as a target."""

    scale: float
    weights: list

    def each(self, outputs):
        mixed = [at_least_single(w) * y for w, y in zip(self.weights, float_outputs(outputs), strict=True)]
        return self.scale * sum(ops.sum(ops.reshape(m, (ops.shape(m)[0], -1)), axis=1) for m in mixed)


def _mixtures(outputs, count, seed):
    """The factor, and the weights of `count` projections for each output, of shape `(count, batch, ...)`."""
    sizes = [math.prod(y.shape[1:]) for y in outputs]
    # One draw for all outputs, because several draws with the same integer seed would give equal numbers.
    drawn = keras.random.normal((count, ops.shape(outputs[0])[0], sum(sizes)), seed=seed)
    units = drawn / ops.sqrt(ops.sum(ops.square(drawn), axis=2, keepdims=True))
    stacks, start = [], 0
    for y, size in zip(outputs, sizes, strict=True):
        part = units[:, :, start : start + size]
        stacks.append(ops.cast(ops.reshape(part, (count, *ops.shape(y))), y.dtype))
        start += size
    return math.sqrt(sum(sizes) / count), stacks


def float_outputs(outputs):
    """The list of floating-point outputs, of shape `(batch, ...)`, set to zero where they are masked."""
    return [
        without_padding(y) for y in nesting.flatten(outputs) if keras.backend.is_float_dtype(validation.dtype_of(y))
    ]
