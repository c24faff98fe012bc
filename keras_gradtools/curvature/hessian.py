"""The Hessian of a training loss."""

import functools

from keras import ops

from keras_gradtools import backend
from keras_gradtools.curvature.batches import batch_size_of
from keras_gradtools.curvature.linear_maps import OfBatch, SecondDerivative
from keras_gradtools.curvature.operator import CurvatureOperator
from keras_gradtools.curvature.spectrum_start import spectrum_start

# Beyond these, a program of many products takes long to compile, and calls take no time beside products.
_MOST_WEIGHTS, _MOST_SAMPLES = 2**22, 8


class Hessian(CurvatureOperator):
    r"""The Hessian of a training loss by the weights of a model, $H = \partial^2 L / \partial \theta^2$.

    $$L(\theta) = \frac{1}{N} \sum_b n_b L_b(\theta)$$

    with $L_b$ the loss that `fit` would minimize on batch $b$ of $n_b$ examples, sample weights, regularizers and
    `add_loss` included, and $N = \sum_b n_b$: for Keras' usual losses, the loss of all examples as one batch. A loss
    with `reduction="sum"` depends on the batch size, as in `fit`.

    It is never formed: `operator @ v` is computed from $H v = \nabla (\nabla L \cdot v)$, batch by batch, with the
    weights of the moment; `dense()` forms it. The model is called in inference mode, or with `training=True` as in a
    training step. What it draws begins with the states that its seeds, Keras' global one and the framework's generators
    had when the operator was made: one mask for all products, losses and gradients, whatever is called in between, and
    after `move`. A new operator, or `draw_anew()`, takes another. Nothing in the model or in these generators changes.

    Args:
        model: a built Keras model or layer; a wrapper of `kg.models` stands for the model in it.
        loss: what `compile` takes as `loss`; None for the loss that the model was compiled with.
        data: `(x, y)` or `(x, y, sample_weight)` of arrays or tensors; or batches of these: a `tf.data.Dataset`, a
            `keras.utils.PyDataset`, a torch `DataLoader`, a list. It is gone through once for each product, and has to
            have the same examples each time. Their order may change where the loss is a mean over them.
        variables: trainable variables of the model in a list or any nesting, or one of its layers; all by default.
        training: whether the model is called as in training: dropout on, BatchNormalization by the batch.
        batch_size: of arrays; what data that comes in batches has its own of. The last batch may be smaller.
        verbose: 1 for a progress bar, 0 for none, `"auto"` for one where it takes long.

    Attributes:
        shape, dtype, variables, slices: see `kg.curvature.CurvatureOperator`.

    Raises:
        ValueError: for options and data that do not fit; at the first product, for a loss without a value for each
            example, for a model that does not compute the same twice, naming the layer, and for data that differ from
            pass to pass, naming the cause.

    Cost:
        A product costs two to three gradients over the data, and one compilation for each shape of a batch. Before the
        first one, two products with the first batch; and other data than arrays and lists are read twice, without the
        model, with two products more where their order changes.

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

    def begins_spectra(self, samples):
        """Whether `spectrum_start` may be called: for small models, data in one batch, and few samples."""
        if self._batches.count != 1 or samples > _MOST_SAMPLES:
            return False
        (batch,) = self._batches
        is_small = self._is_quick_to_trace and self.shape[0] <= _MOST_WEIGHTS
        return is_small and not backend.is_shared_by_replicas(batch, self.variables[0])

    def spectrum_start(self, first, bits, share, steps):
        """See `kg.curvature.spectrum_start`: one program that takes the first steps, the samples and the gradient."""
        dtype = "float64" if self.dtype == "float64" else "float32"
        vectors = [ops.convert_to_tensor(first, dtype=dtype), ops.convert_to_tensor(bits)]
        add = functools.partial(_spectrum_start, share, steps)
        return self._of_one_batch(("spectrum start", share, steps), add, vectors)

    def _make_spec(self):
        return _HessianOfBatch(self._loss)


class _HessianOfBatch(OfBatch):
    def of_batch(self, model, weights, batch, seed):
        return SecondDerivative("Hessian", lambda w: self.loss.total(model, w, *batch), weights)


class _FlatHessian:
    """The Hessian of one batch by the flat vector of the weights: no product takes one apart, or puts it together."""

    def __init__(self, loss, parameters, model, batch):
        self._size = batch_size_of(batch)
        flat = parameters.joined(parameters.variables_as_tensors())
        self._map = SecondDerivative("Hessian", lambda w: loss.total(model, parameters.split(w), *batch), flat)
        if backend.LINEARIZES_ONCE:
            self._map.keep()

    def gradient(self):
        return self._mean(self._map.gradient()[0])

    def product(self, vector):
        return self._mean(self._map.apply([vector])[0])

    def quadratic_form(self, vector):
        return self._mean(self._map.quadratic_form([vector]))

    def _mean(self, x):
        """That over the processes which train together."""
        (total,), count = backend.summed_over_processes([self._size * ops.stop_gradient(x)], self._size)
        return total / count


def _spectrum_start(share, steps, spec, loss, parameters, model, vectors, batch, seed):
    hessian = _FlatHessian(spec.loss, parameters, model, batch)
    first, bits = vectors
    return spectrum_start(hessian, hessian.gradient(), first, bits, share, steps), None
