"""The curvature of the loss in the logs."""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_gradtools import validation
from keras_gradtools.callbacks.schedule import Schedule
from keras_gradtools.curvature.eigenvalues import EigenvalueConvergenceError
from keras_gradtools.curvature.hessian import Hessian

NAME = "CurvatureMonitor"


class CurvatureMonitor(keras.callbacks.Callback):
    r"""Measures the curvature of the loss on fixed data while `fit` trains, and logs it.

    The logs get:

    - `hessian_max_eigenvalue` (the sharpness) and `hessian_min_eigenvalue`, to `tol`;
    - `hessian_trace` and `hessian_trace_error`, an estimate and its standard error;
    - `sharpness_times_learning_rate`: gradient descent is stable below 2;
    - `gradient_norm`, the length of the gradient over the data.

    They are in the `History`, the progress bar, `CSVLogger` and `TensorBoard`, and callbacks that come after it in the
    list can act on them, given a direction: `keras.callbacks.EarlyStopping("gradient_norm", mode="min")`. Where it
    measures every n batches, the logs of an epoch have its last values. Nothing in the model changes, and it draws its
    own random vectors.

    Args:
        data: what the loss is of: see `kg.curvature.Hessian`. Some hundred examples are enough to watch it.
        every: `"epoch"`, or a number n of batches.
        variables: trainable variables in a list, or a layer; all of the model's by default.
        loss: what `compile` takes as `loss`; the compiled one by default, without what a wrapper of `kg.models` adds.
        training: whether the model is called as in training.
        tol: the relative precision of the eigenvalues.
        trace_matvecs: products for the trace, 6 or more; 0 leaves it out.
        seed: of the random vectors, the same ones in each measurement.
        batch_size: of arrays.

    Raises:
        ValueError: for options that do not fit; in `fit`, for a model without a loss, or data that do not fit it.

    Cost:
        In each measurement a gradient, some 10 to 40 products for the eigenvalues, and `trace_matvecs` for the trace,
        some 2.5 gradients each. An eigenvalue that has not converged after 100 of them is logged as it is.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False)])
    >>> model.compile(keras.optimizers.SGD(0.01), "mse")
    >>> x, y = np.array([[1.0, 2.0], [3.0, 4.0]], "float32"), np.zeros((2, 1), "float32")
    >>> monitor = kg.callbacks.CurvatureMonitor((x, y))
    >>> history = model.fit(x, y, epochs=2, verbose=0, callbacks=[monitor]).history
    >>> [round(value, 2) for value in history["hessian_max_eigenvalue"]], round(history["hessian_trace"][0], 2)
    ([29.87, 29.87], 30.0)

    Source: Cohen et al., "Gradient descent on neural networks typically occurs at the edge of stability"
    (arXiv:2103.00065, 2021) for the sharpness times the learning rate; see `kg.curvature` for the estimators.
    """

    def __init__(
        self,
        data,
        every="epoch",
        *,
        variables=None,
        loss=None,
        training=False,
        tol=1e-2,
        trace_matvecs=12,
        seed=0,
        batch_size=256,
    ):
        super().__init__()
        if not validation.is_number(tol) or not 0 < tol < 1:
            raise ValueError(f"{NAME} expects a number between 0 and 1 as `tol`. Received: tol={tol!r}.")
        is_count = isinstance(trace_matvecs, int) and not isinstance(trace_matvecs, bool)
        if not is_count or (trace_matvecs < 6 and trace_matvecs != 0):
            raise ValueError(
                f"{NAME} expects 0, or an integer of 6 or more, as `trace_matvecs`. Received: {trace_matvecs!r}."
            )
        self._schedule = Schedule(NAME, every)
        self._data, self._variables, self._loss, self._training = data, variables, loss, training
        self._tol, self._trace_matvecs, self._seed, self._batch_size = tol, trace_matvecs, seed, batch_size
        self._operator: Any = None
        self.last: dict[str, float] = {}

    def on_train_begin(self, logs=None):
        self._operator = Hessian(
            self.model,
            self._loss,
            self._data,
            self._variables,
            self._training,
            batch_size=self._batch_size,
            verbose=0,
        )
        self._schedule.begin()

    def on_train_batch_end(self, batch, logs=None):
        if self._schedule.is_due_after_batch():
            self._measure(logs)

    def on_epoch_end(self, epoch, logs=None):
        if self._schedule.is_due_after_epoch():
            self._measure(logs)
        elif logs is not None:
            logs.update(self.last)

    def on_train_end(self, logs=None):
        self._operator = None

    def _measure(self, logs):
        hessian = self._operator
        smallest, largest = self._ends(hessian)
        found = {
            "hessian_max_eigenvalue": largest,
            "hessian_min_eigenvalue": smallest,
            "gradient_norm": float(np.linalg.norm(hessian.gradient().astype("float64"))),
        }
        if self._trace_matvecs:
            trace = hessian.trace(self._trace_matvecs, seed=self._seed)
            found |= {"hessian_trace": float(trace.value), "hessian_trace_error": float(trace.standard_error)}
        rate = getattr(self.model.optimizer, "learning_rate", None)
        if rate is not None:
            found["sharpness_times_learning_rate"] = largest * float(ops.convert_to_numpy(rate))
        self.last = found
        if logs is not None:
            logs.update(found)

    def _ends(self, hessian):
        """The smallest and the largest eigenvalue."""
        n = hessian.shape[0]
        if n <= 2:
            values = np.linalg.eigvalsh(hessian.dense().astype("float64"))
            return float(values[0]), float(values[-1])
        basis = min(n, _BASIS)
        try:
            restarts = math.ceil(_MOST_PRODUCTS / basis)
            values, _ = hessian.eigsh(2, "BE", ncv=basis, tol=self._tol, max_restarts=restarts, seed=self._seed)
        except EigenvalueConvergenceError as error:
            values = error.eigenvalues
        except FloatingPointError:
            return math.nan, math.nan
        return float(values[0]), float(values[-1])


# Vectors of the basis of Lanczos' method, and products after which an eigenvalue is taken as it is.
_BASIS, _MOST_PRODUCTS = 12, 100
