"""The Hessian of a training loss."""

import functools
from typing import Any

from keras import ops

from keras_gradtools import backend
from keras_gradtools.curvature.data.batches import batch_size_of
from keras_gradtools.curvature.estimators.spectrum_start import spectrum_start
from keras_gradtools.curvature.operators.linear_maps import OfBatch, SecondDerivative
from keras_gradtools.curvature.operators.operator import CurvatureOperator
from keras_gradtools.curvature.operators.solver_vectors import solver_dtype

# Above these limits, one program for many products takes long to compile and saves little, because the overhead of a
# call is small compared with a product.
_MOST_WEIGHTS, _MOST_SAMPLES = 2**22, 8


class Hessian(CurvatureOperator):
    r"""The Hessian of a training loss with respect to the weights of a model, $H = \partial^2 L / \partial \theta^2$.

    $$L(\theta) = \frac{1}{N} \sum_b n_b L_b(\theta)$$

    where $L_b$ is the loss that `fit` would minimize on batch $b$ of $n_b$ examples, with sample weights, regularizers
    and `add_loss`, and $N = \sum_b n_b$. For the usual Keras losses, this is the loss of all examples as one batch. A
    loss with `reduction="sum"` depends on the batch size, as in `fit`.

    The matrix is never formed, except by `dense()` and `blocks()`. `operator @ v` computes
    $H v = \nabla (\nabla L \cdot v)$ batch by batch, at the current weights. The model is called in inference mode, or
    with `training=True` as in a training step. When the operator is created, it copies the states of the model's seeds,
    of Keras' global seed and of the framework's generators. Every call starts from these copies. So all products,
    losses and gradients use the same dropout masks, whatever is called in between, and also after `move`. A new
    operator, or `draw_anew()`, uses new masks. Nothing in the model or in these generators changes.

    Args:
        model: A built Keras model or layer. For a wrapper of `kg.models`, the wrapped model is used.
        loss: A loss as `compile` takes it, or a `kg.losses.SquaredResiduals`. None for the loss that the model was
            compiled with.
        data: `(x, y)` or `(x, y, sample_weight)`, arrays or tensors, or an iterable of such batches: a
            `tf.data.Dataset`, a `keras.utils.PyDataset`, a torch `DataLoader` or a list. Every product reads all of it,
            and it must contain the same examples each time. Their order may change if the loss is a mean over them.
        variables: Trainable variables of the model in a list or any nested structure, or one of its layers. Default:
            all trainable variables.
        training: Whether the model is called in training mode: dropout is on, and BatchNormalization uses the
            statistics of the batch.
        batch_size: Number of examples per batch if `data` is arrays. Ignored for data that come in batches. The last
            batch may be smaller.
        verbose: 1 for a progress bar, 0 for none, `"auto"` for a progress bar if the work takes more than 3 seconds.

    Attributes:
        shape, dtype, variables, slices: See `kg.curvature.CurvatureOperator`.

    Raises:
        ValueError: If an option or the data is invalid. At the first product, if the loss has no value for each
            example, if the model returns different values for the same input (the error names the layer), or if the
            data differ from pass to pass (the error names the cause).

    Cost:
        A product costs two to three gradients over the data, plus one compilation for each shape of a batch. Before the
        first product, two products with the first batch check that results repeat. Data other than arrays and lists are
        also read twice without calling the model, and cost two more products if their order changes.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False)])
    >>> x, y = np.array([[1.0, 2.0], [3.0, 4.0]], "float32"), np.zeros((2, 1), "float32")
    >>> hessian = kg.curvature.Hessian(model, "mse", (x, y))  # 2 x'x / N
    >>> hessian @ np.array([1.0, 0.0], "float32")
    array([10., 14.], dtype=float32)
    >>> [round(float(e), 3) for e in hessian.eigsh(k=1)[0]], round(hessian.trace().value, 3)
    ([29.866], 30.0)

    Source: Pearlmutter, "Fast exact multiplication by the Hessian" (1994), equation 3.
    """

    def can_start_spectrum(self, samples: int) -> bool:
        """Whether `spectrum_start` can be used: only for small models, data in one batch, and few samples."""
        if not self._sums.is_one_batch or samples > _MOST_SAMPLES:
            return False
        (batch,) = self._sums.batches
        is_small = self._sums.is_quick_to_trace and self.shape[0] <= _MOST_WEIGHTS
        return is_small and not backend.is_shared_by_replicas(batch, self.variables[0])

    def spectrum_start(self, first: Any, bits: Any, share: Any, steps: int) -> Any:
        """Computes the first Lanczos steps, the trace samples and the norm of the gradient: see `spectrum_start.py`."""
        vectors = [ops.convert_to_tensor(first, dtype=solver_dtype(self.dtype).name), ops.convert_to_tensor(bits)]
        add = functools.partial(_spectrum_start, share, steps)
        return self._sums.of_one_batch(("spectrum start", share, steps), add, vectors)

    def _make_spec(self):
        return _HessianOfBatch(self._loss)


class _HessianOfBatch(OfBatch):
    def of_batch(self, model, weights, batch, seed):
        return SecondDerivative("Hessian", lambda w: self.loss.total(model, w, *batch), weights)


class _FlatHessian:
    """The Hessian of one batch with respect to the flat vector of the weights, so that products need no conversion."""

    def __init__(self, loss, parameters, model, batch):
        self._size = batch_size_of(batch)
        flat = parameters.joined(parameters.variables_as_tensors())
        self._map = SecondDerivative("Hessian", lambda w: loss.total(model, parameters.split(w), *batch), flat)
        if backend.LINEARIZES_ONCE:
            self._map.linearize()

    def gradient(self):
        return self._mean(self._map.gradient()[0])

    def product(self, vector):
        return self._mean(self._map.apply([vector])[0])

    def quadratic_form(self, vector):
        return self._mean(self._map.quadratic_form([vector]))

    def _mean(self, x):
        """The mean over the processes that train together, weighted by their numbers of examples."""
        (total,), count = backend.summed_over_processes([self._size * ops.stop_gradient(x)], self._size)
        return total / count


def _spectrum_start(share, steps, spec, loss, parameters, model, vectors, batch, seed):
    hessian = _FlatHessian(spec.loss, parameters, model, batch)
    first, bits = vectors
    return spectrum_start(hessian, hessian.gradient(), first, bits, share, steps), None
