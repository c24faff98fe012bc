"""A callback that logs the curvature of the loss."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_gradtools import validation
from keras_gradtools.annotations import Data, Loss, Variables
from keras_gradtools.curvature.estimators.critical_sharpness import along
from keras_gradtools.curvature.estimators.estimate import Estimate
from keras_gradtools.curvature.estimators.spectrum_ends import spectrum_ends
from keras_gradtools.curvature.operators.hessian import Hessian
from keras_gradtools.training.loss_on_data import LossOnData
from keras_gradtools.training.monitor import Monitor
from keras_gradtools.training.quantities import require_quantities

NAME = "CurvatureMonitor"
QUANTITIES = ("eigenvalues", "critical_sharpness")
# Matrices up to size `_SMALL` are formed. After `_MOST_PRODUCTS` products, eigenvalues are logged even if they have not
# converged.
_SMALL, _MOST_PRODUCTS = 16, 60


class CurvatureMonitor(Monitor):
    r"""Logs the curvature of the loss on fixed data during `fit`.

    It logs:

    - `hessian_max_eigenvalue` (the sharpness) and `hessian_min_eigenvalue`, with an error of about `tol` times the
      larger magnitude of the two.
    - `hessian_trace` and `hessian_trace_error`, an estimate of the trace and its standard error.
    - `sharpness_times_learning_rate`. Gradient descent is stable if it is below 2.
    - `gradient_norm`, the norm of the gradient over the data.
    - `critical_sharpness`, only if `quantities` names it: the sharpness along the gradient, from a gradient and fewer
      than ten evaluations of the loss, see `kg.curvature.critical_sharpness`. A step of gradient descent raises the
      loss if the learning rate times this number is above 2.

    The values appear in the `History`, `CSVLogger` and `TensorBoard`, and the most important ones in the progress bar.
    Callbacks after this one in the list can use all of them, if you say whether lower or higher is better:
    `keras.callbacks.EarlyStopping("gradient_norm", mode="min")`. Nothing in the model changes, and the random vectors
    do not come from the generators that the model uses.

    Args:
        data: The data of the loss, as for `kg.curvature.Hessian`. About a hundred examples are enough.
        every: When to measure: `"epoch"`, a string such as `"5 epochs"`, or an integer n for every n batches. See
            `kg.callbacks.Monitor`.
        variables: Trainable variables in a list, or a layer. Default: all trainable variables of the model.
        loss: A loss as `compile` takes it. Default: the compiled loss, without the terms that a wrapper of `kg.models`
            adds.
        training: Whether the model is called in training mode.
        quantities: `"eigenvalues"`, which includes the trace, `"critical_sharpness"`, or both. Critical sharpness alone
            is cheap enough for every epoch of a training.
        tol: Tolerance for both eigenvalues, relative to the larger magnitude of the two. It is checked with error
            estimates. If an eigenvalue has close neighbors, the error may be a few times larger.
        trace_matvecs: Number of products for the trace in addition to those for the eigenvalues, 2 or more. 0 leaves
            the trace out. These products are samples only of the part of the matrix outside the subspace that was found
            for the eigenvalues. Inside this subspace, the trace is exact.
        seed: An integer that seeds the random vectors. They are the same in every measurement.
        batch_size: Number of examples per batch if `data` is arrays. Ignored for data that come in batches.
        progress_bar: Which of the numbers the progress bar shows. Default: `hessian_max_eigenvalue` and
            `critical_sharpness`. See `kg.callbacks.Monitor`.

    Attributes:
        last: A dict of the values that were measured last.

    Raises:
        ValueError: If an option is invalid. When `fit` begins, if the model has no loss or returns different values for
            the same input, or if the data do not fit the model or differ from pass to pass.

    Cost:
        For each measurement, a gradient, 5 to 20 products for the eigenvalues and `trace_matvecs` for the trace, about
        two gradients each. The eigenvectors of the last measurement are the starting point. An eigenvalue that has not
        converged after 60 products is logged without a warning. For at most 16 weights, or `trace_matvecs` if that is
        more, the matrix is formed and all values are exact. Critical sharpness takes a gradient and fewer than ten
        evaluations of the loss.

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
    (arXiv:2103.00065, 2021) for the sharpness times the learning rate. See `kg.curvature` for the estimators.
    """

    KEY_NUMBERS: tuple[str, ...] = ("hessian_max_eigenvalue", "critical_sharpness")

    def __init__(
        self,
        data: Data,
        every: int | str = "epoch",
        *,
        variables: Variables = None,
        loss: Loss = None,
        training: bool = False,
        quantities: str | Sequence[str] = "eigenvalues",
        tol: float = 1e-2,
        trace_matvecs: int = 4,
        seed: int = 0,
        batch_size: int = 256,
        progress_bar: bool | Sequence[str] | None = None,
    ) -> None:
        super().__init__(every, progress_bar=progress_bar)
        self._quantities = require_quantities(NAME, quantities, QUANTITIES) or QUANTITIES[:1]
        self._tol = validation.require_number(NAME, "tol", tol, above=0, below=1)
        self._seed = validation.require_seed(NAME, seed)
        if not validation.is_count(trace_matvecs, 0) or trace_matvecs == 1:
            raise validation.refused(NAME, "0, or an integer of 2 or more,", "trace_matvecs", trace_matvecs)
        self._trace_matvecs = int(trace_matvecs)
        self._loss_on_data = LossOnData(NAME, data, variables, loss, training, batch_size)
        self._operator: Any = None
        self._start: Any = None
        self._can_start_spectrum: bool | None = None
        self._critical_step: float | None = None

    def begin(self) -> None:
        self._operator = self._loss_on_data.operator(Hessian, self.model)
        self._operator.check("product" if "eigenvalues" in self._quantities else "gradient")
        self._start = self._can_start_spectrum = self._critical_step = None

    def measure(self) -> dict[str, Any]:
        return self.attempt("the curvature", self._measured) or {}

    def end(self) -> None:
        self._operator = None

    def _measured(self):
        found = self._of_eigenvalues() if "eigenvalues" in self._quantities else {}
        return found | self._of_gradient() if "critical_sharpness" in self._quantities else found

    def _of_gradient(self):
        found, norm = along(self._operator, start=self._critical_step)
        # The step of the last measurement is close to the next one.
        self._critical_step = found.step if math.isfinite(found.step) else None
        return {"critical_sharpness": found.value, "gradient_norm": norm}

    def _of_eigenvalues(self):
        hessian = self._operator
        smallest, largest, trace, gradient_norm = self._spectrum(hessian)
        if gradient_norm is None:
            gradient_norm = float(np.linalg.norm(hessian.gradient().astype("float64")))
        found = {
            "hessian_max_eigenvalue": largest,
            "hessian_min_eigenvalue": smallest,
            "gradient_norm": gradient_norm,
        }
        if trace is not None:
            found |= {"hessian_trace": float(trace.value), "hessian_trace_error": float(trace.standard_error)}
        rate = getattr(self.model.optimizer, "learning_rate", None)
        if rate is not None:
            found["sharpness_times_learning_rate"] = largest * float(ops.convert_to_numpy(rate))
        return found

    def _spectrum(self, hessian):
        """The smallest and the largest eigenvalue, the trace or None, and the norm of the gradient or None."""
        n = hessian.shape[0]
        if n <= max(_SMALL, self._trace_matvecs):
            values = np.linalg.eigvalsh(hessian.dense().astype("float64"))
            trace = Estimate(values.sum(), 0.0) if self._trace_matvecs else None
            return float(values[0]), float(values[-1]), trace, None
        if self._can_start_spectrum is None:
            self._can_start_spectrum = hessian.can_start_spectrum(self._trace_matvecs)
        linearized, gradient_norm = functools.cache(hessian.linearized), None

        def begin(*args):
            nonlocal gradient_norm
            begun = hessian.spectrum_start(*args)
            gradient_norm = float(ops.convert_to_numpy(begun.gradient_norm))
            return begun

        try:
            found = spectrum_ends(
                lambda v: linearized() @ v,
                n,
                tol=self._tol,
                most=_MOST_PRODUCTS,
                start=self._start,
                samples=self._trace_matvecs,
                seed=self._seed,
                dtype="float64" if hessian.dtype == "float64" else "float32",
                begin=begin if self._can_start_spectrum else None,
            )
        except FloatingPointError:
            return math.nan, math.nan, Estimate(math.nan, math.nan) if self._trace_matvecs else None, gradient_norm
        self._start = found.start
        return found.smallest, found.largest, found.trace, gradient_norm
