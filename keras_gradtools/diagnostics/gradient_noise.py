"""The gradient noise scale, from the variance of per-example gradients."""

import dataclasses
import functools
import math

import keras
import numpy as np
from keras import ops

from keras_gradtools import nesting, validation
from keras_gradtools.annotations import Data, Loss, Variables
from keras_gradtools.curvature.data.batch_loss import BatchLoss, require_model
from keras_gradtools.curvature.data.batches import Batches, batch_size_of
from keras_gradtools.curvature.data.draws import Draws
from keras_gradtools.curvature.operators.parameters import Parameters
from keras_gradtools.display.results import displayed
from keras_gradtools.example_norms import numbers
from keras_gradtools.transforms import compiled
from keras_gradtools.transforms.per_example import per_example_grad

NAME = "gradient_noise_scale"
# Limits of a chunk of examples: the number of elements in their gradients, and the number of examples.
_MOST_NUMBERS, _MOST_EXAMPLES = 1 << 26, 256
# The relative difference allowed, for rounding, between the outputs of an example alone and in its batch.
_ALONE = 1e-2


@displayed
@dataclasses.dataclass(frozen=True)
class GradientNoise:
    r"""Statistics of the gradients $g_1, \dots, g_n$ of single examples.

    Attributes:
        noise_scale: $\operatorname{tr} \Sigma / \lVert G \rVert^2$, in examples. Gradients of much smaller batches are
            mostly noise, and much larger batches gain little. Infinite if `squared_norm` is not positive.
        covariance_trace: $\operatorname{tr} \Sigma$, an unbiased estimate of the trace of the covariance of the
            gradients of single examples.
        squared_norm: $\lVert G \rVert^2$, an unbiased estimate of the squared norm of the expected gradient. It can be
            negative.
        examples: $n$, the number of examples.
    """

    noise_scale: float
    covariance_trace: float
    squared_norm: float
    examples: int


def gradient_noise_scale(
    model: keras.Layer,
    loss: Loss,
    data: Data,
    variables: Variables = None,
    training: bool = False,
    *,
    batch_size: int = _MOST_EXAMPLES,
    chunk_size: int | None = None,
) -> GradientNoise:
    r"""Computes the gradient noise scale, the batch size at which the noise of the gradient equals the gradient.

    With $\bar g$ the mean of the gradients of the $n$ examples,

    $$\operatorname{tr} \Sigma = \frac{1}{n - 1} \sum_i \lVert g_i - \bar g \rVert^2, \qquad
    \lVert G \rVert^2 = \lVert \bar g \rVert^2 - \frac1n \operatorname{tr} \Sigma, \qquad
    \mathcal{B} = \frac{\operatorname{tr} \Sigma}{\lVert G \rVert^2}.$$

    The variance of the gradient of a batch of $B$ examples is $\operatorname{tr} \Sigma / B$. The model is called on
    each example as a batch of one, with its sample weight if there is one. Layers that mix examples see only that one.

    Args:
        model: A built Keras model. For a wrapper of `kg.models`, the wrapped model is used.
        loss: The loss, as `compile` takes it, or None for the compiled loss.
        data: Two or more examples, in the forms that `kg.curvature.Hessian` takes. The estimate is rough if $n$ is far
            below the noise scale.
        variables: A list of trainable variables, or a layer. By default, all trainable variables of the model.
        training: Whether the model is called in training mode.
        batch_size: Number of examples per batch if `data` holds arrays.
        chunk_size: Number of examples that are differentiated together. It bounds the memory and does not change the
            result. The default is at most 256, such that their gradients have at most 64 million elements.

    Returns:
        A `GradientNoise`.

    Raises:
        ValueError: If there are fewer than two examples, if the outputs of an example depend on the rest of its batch
            (contrastive models, one graph per batch), or if an argument is not valid.

    Cost:
        About three gradients of the data. On TensorFlow and JAX they are compiled once, and the program is cached on
        the model.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    >>> model.set_weights([np.array([[0.0]])])
    >>> x, y = np.ones((2, 1), "float32"), np.array([[1.0], [2.0]], "float32")  # the gradients are -2 and -4
    >>> noise = kg.diagnostics.gradient_noise_scale(model, "mse", (x, y))
    >>> noise.covariance_trace, noise.squared_norm, noise.noise_scale
    (2.0, 8.0, 0.25)

    Source: McCandlish, Kaplan, Amodei & the OpenAI Dota team, "An empirical model of large-batch training"
    (arXiv:1812.06162, 2018), equations 2.9 and A.2.
    """
    return ExampleGradients(NAME, model, loss, data, variables, training, batch_size, chunk_size).noise()


class ExampleGradients:
    """Computes the `GradientNoise` of fixed data at the current weights, any number of times."""

    def __init__(self, owner, model, loss, data, variables, training, batch_size, chunk_size=None):
        self._owner = owner
        self._model = require_model(owner, model)
        validation.require_loss(owner, loss)
        self._parameters = Parameters(owner, self._model, variables)
        of = model if loss is None else self._model
        self._loss = BatchLoss(owner, of, loss, self._parameters.variables, training)
        self._draws = Draws(self._model)
        self._is_checked = False
        self._batches = Batches(owner, data, batch_size)
        most = min(max(_MOST_NUMBERS // max(self._parameters.size, 1), 1), _MOST_EXAMPLES)
        self._chunk_size = validation.require_count(owner, "chunk_size", chunk_size, may_be_none=True) or most

    def noise(self):
        """The `GradientNoise` of all examples.

        Raises `ValueError` if an example has other outputs alone than in its batch. Only the last example of the first
        batch is checked.
        """
        count, squares, total = 0, 0.0, np.zeros(self._parameters.size)
        for batch in self._batches:
            if not self._is_checked:
                self._require_examples_that_stand_alone(batch)
                self._is_checked = True
            size = batch_size_of(batch)
            count += size
            for start in range(0, size, self._chunk_size):
                gradient, square = self._sums(_part(batch, start, start + self._chunk_size))
                total += gradient
                squares += square
        if count < 2:
            raise ValueError(f"{self._owner} expects two examples or more. Received: {count}.")
        # The sum of squared differences from the mean, in double precision because large terms cancel.
        mean_square = float(total @ total) / count**2
        trace = (squares - count * mean_square) / (count - 1)
        squared_norm = mean_square - trace / count
        if not math.isfinite(trace):
            return GradientNoise(math.nan, math.nan, math.nan, count)
        return GradientNoise(trace / squared_norm if squared_norm > 0 else math.inf, trace, squared_norm, count)

    def _require_examples_that_stand_alone(self, batch):
        # In training mode, outputs may differ: layers that mix examples are meant to see only one.
        size = batch_size_of(batch)
        if self._loss.training or size == 1:
            return
        loss, weights = self._loss.drawing(self._draws), self._parameters.variables_as_tensors()
        whole = nesting.flatten(loss.outputs(self._model, weights, batch[0]))
        alone = nesting.flatten(loss.outputs(self._model, weights, _part(batch[0], size - 1, size)))
        for together, y in zip(whole, alone, strict=True):
            if tuple(y.shape) == (1, *together.shape[1:]) and together.shape[0] == size:
                last, y = numbers(together)[-1:], numbers(y)
                if np.allclose(last, y, rtol=_ALONE, atol=_ALONE * np.abs(last).max(initial=0.0), equal_nan=True):
                    continue
            raise ValueError(
                f"{self._owner} calls the model on each example alone, and expects the same output as in a batch. "
                f"Received: from a batch of {size}, {validation.describe(together)}; from its last example alone, "
                f"{validation.describe(y)}, with different values."
            )

    def _sums(self, batch):
        """The sum of the gradients of a batch as a flat array, and the sum of their squared lengths."""
        body = functools.partial(_sums_of_batch, self._loss, self._parameters, self._draws)
        key = NAME, self._loss.key, self._draws.key
        (total, squares), _ = compiled.run(self._owner, self._model, body, key, (batch, self._draws.values), {})
        return ops.convert_to_numpy(total).astype("float64"), float(squares)


def _part(batch, start, stop):
    return nesting.map_structure(lambda a: None if a is None else a[start:stop], batch)


def _sums_of_batch(loss, parameters, draws, model, batch, values):
    loss = loss.drawing(draws.with_values(values))
    leaves = nesting.flatten(batch)
    places = [i for i, leaf in enumerate(leaves) if leaf is not None]

    def of_example(weights, *present):
        filled = list(leaves)
        for place, leaf in zip(places, present, strict=True):
            filled[place] = leaf
        return loss.total(model, weights, *nesting.pack_as(batch, filled))

    gradients = per_example_grad(of_example)(parameters.variables_as_tensors(), *(leaves[i] for i in places))
    # Squares would overflow in half precision.
    gradients = [ops.cast(g, "float64" if parameters.dtype == "float64" else "float32") for g in gradients]
    total = ops.concatenate([ops.reshape(ops.sum(g, axis=0), (-1,)) for g in gradients])
    squares = sum(ops.sum(ops.square(g)) for g in gradients)
    return (ops.stop_gradient(total), ops.stop_gradient(squares)), None
