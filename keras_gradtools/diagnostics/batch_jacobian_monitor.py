"""A callback that logs properties of the batch Jacobian."""

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from keras_gradtools import chosen_inputs, validation
from keras_gradtools.annotations import InputNames, Nested
from keras_gradtools.curvature.data.batch_loss import require_model
from keras_gradtools.diagnostics.jacobian_spectrum import (
    METHODS,
    JacobianSpectrum,
    chosen_method,
    require_float_examples,
    require_inputs,
    spectrum_of,
)
from keras_gradtools.diagnostics.local_lipschitz import largest_ratios, random_directions
from keras_gradtools.independence.batch_independence import batch_independence
from keras_gradtools.training.monitor import Monitor
from keras_gradtools.training.quantities import require_quantities

NAME = "BatchJacobianMonitor"
OF_ALL_VALUES = ("condition_number", "effective_rank", "dynamical_isometry")
QUANTITIES = ("spectral_norm", "frobenius_norm", *OF_ALL_VALUES, "local_lipschitz")
# Steps of the search for the local Lipschitz constant: in the first measurement, and in later ones, which continue it.
_FIRST_STEPS, _LIPSCHITZ_STEPS = 5, 1


class BatchJacobianMonitor(Monitor):
    r"""Logs properties of the model's Jacobian at fixed examples during `fit`.

    With the singular values $\sigma_1 \ge \dots \ge \sigma_r$ of the Jacobian of each example, it logs for

    - `"spectral_norm"`: `jacobian_spectral_norm_mean` and `_max`, mean and maximum of $\sigma_1$ over the examples.
    - `"frobenius_norm"`: `jacobian_frobenius_norm_mean` and `_max`.
    - `"condition_number"`: `jacobian_condition_number_median`, median of $\sigma_1 / \sigma_r$, which can be infinite.
    - `"effective_rank"`: `jacobian_effective_rank_mean`, the exponential of the entropy of the singular values.
    - `"dynamical_isometry"`: `jacobian_dynamical_isometry`, the root mean square of $\sigma_i - 1$, 0 for an isometry.
    - `"local_lipschitz"`: `jacobian_local_lipschitz_mean` and `_max`, see `kg.diagnostics.local_lipschitz`.

    The values appear in the `History`, `CSVLogger` and `TensorBoard`, and the most important ones in the progress bar.
    Callbacks after this one in the list can use all of them, if you say whether lower or higher is better:
    `keras.callbacks.EarlyStopping("jacobian_spectral_norm_max", mode="min")`. Before training,
    `kg.diagnostics.batch_independence` checks that the examples do not depend on one another, since otherwise a
    Jacobian of one example has no meaning. Nothing in the model changes. After the first measurement, nothing is traced
    again. A Jacobian that is not finite is logged as NaN. A quantity that cannot be measured for this model is left out
    with a warning.

    Args:
        x: The examples, tensors of shape `(batch, ...)` in any nested structure. A dozen examples are enough.
        every: When to measure: `"epoch"`, a string such as `"5 epochs"`, or an integer n for every n batches. See
            `kg.callbacks.Monitor`.
        quantities: Names of the quantities above to log. By default all. If the Jacobian is too large to form, those
            that need all singular values are left out.
        training: Whether the model is called in training mode.
        method: `"explicit"`, `"implicit"` or `"auto"`, see `kg.diagnostics.jacobian_spectrum`.
        radius: Radius for `"local_lipschitz"`, in units of `x`.
        seed: An integer that seeds the random start vectors. They are the same in every measurement.
        inputs: Names, keys or positions of the inputs to differentiate with respect to. Default: all floating-point
            inputs. The other inputs, such as integers and masks, are not changed.
        progress_bar: Which of the numbers the progress bar shows. Default: `jacobian_spectral_norm_max`. See
            `kg.callbacks.Monitor`.

    Attributes:
        spectra: A list with the singular values of each measurement, of shape `(batch, r)`.
            `kg.plots.plot_singular_values` draws it. Empty if the Jacobian is not formed.
        last: A dict of the values that were measured last.

    Raises:
        ValueError: If an option is invalid. In `fit`, if the examples do not fit the model or depend on one another, or
            if `quantities` needs all singular values and the Jacobian is too large to form.

    Cost:
        For each measurement, one `kg.batch_jacobian` at `x`, and one step of the search for a local Lipschitz constant.
        The search takes five steps in the first measurement and continues from there. In addition, six gradients when
        `fit` begins.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, use_bias=False)])
    >>> model.compile(keras.optimizers.SGD(0.0), "mse")
    >>> model.set_weights([np.array([[3.0, 0.0], [0.0, 1.0]])])
    >>> x = np.ones((4, 2), "float32")
    >>> monitor = kg.callbacks.BatchJacobianMonitor(x, quantities=("spectral_norm", "effective_rank"))
    >>> history = model.fit(x, x, epochs=1, verbose=0, callbacks=[monitor]).history
    >>> history["jacobian_spectral_norm_max"], [round(rank, 3) for rank in history["jacobian_effective_rank_mean"]]
    ([3.0], [1.755])

    Source: As for `kg.diagnostics.jacobian_spectrum` and `kg.diagnostics.local_lipschitz`.
    """

    KEY_NUMBERS: tuple[str, ...] = ("spectral_norm_max",)

    def __init__(
        self,
        x: Nested,
        every: int | str = "epoch",
        quantities: str | Sequence[str] | None = None,
        *,
        training: bool = False,
        method: Literal["auto", "explicit", "implicit"] = "auto",
        radius: float = 0.1,
        seed: int = 0,
        inputs: InputNames = None,
        progress_bar: bool | Sequence[str] | None = None,
    ) -> None:
        super().__init__(every, prefix="jacobian_", progress_bar=progress_bar)
        self._method = validation.require_choice(NAME, "method", method, METHODS)
        self._radius = validation.require_number(NAME, "radius", radius, above=0)
        self._seed = validation.require_seed(NAME, seed)
        self._quantities = require_quantities(NAME, quantities, QUANTITIES)
        require_float_examples(NAME, x)
        self._given, self._inputs = x, chosen_inputs.require_names(NAME, inputs)
        self._kwargs = {"training": validation.require_flag(NAME, "training", training)}
        self._examples: Any = None
        self._by: Any = None
        self._directions: Any = None
        self._chosen: tuple = ()
        self.spectra: list[JacobianSpectrum] = []

    def begin(self) -> None:
        model = require_model(NAME, self.model)
        self._examples = require_float_examples(NAME, self._given)
        self._by = require_inputs(NAME, model, self._examples, self._inputs)
        if len(self._by.parts(self._examples)[0]) > 1:
            report = batch_independence(model, self._examples, **self._kwargs, inputs=self._inputs)
            if report.independent is False:
                raise ValueError(f"{NAME}: {report}")
            if report.independent is None:
                warnings.warn(f"{NAME}: {report}", stacklevel=2)
        if self._method == "auto":
            self._method = chosen_method(model, self._examples, self._by, self._kwargs)
        self._chosen = self._measurable_quantities()
        self._directions = None

    def end(self) -> None:
        self._examples = self._by = self._directions = None

    def _measurable_quantities(self):
        if self._method == "explicit":
            return self._quantities or QUANTITIES
        impossible = [q for q in self._quantities or () if q in OF_ALL_VALUES]
        if impossible:
            raise ValueError(
                f"{NAME} needs the full Jacobian for some quantities, but it is too large to form, or "
                f"method='implicit' was given. Received: quantities with {', '.join(impossible)}. Leave them out, use "
                "fewer examples, or pass method='explicit'."
            )
        return tuple(q for q in self._quantities or QUANTITIES if q not in OF_ALL_VALUES)

    def measure(self) -> dict[str, Any]:
        model = require_model(NAME, self.model)
        found: dict[str, float] = {}
        spectrum: Any = None
        if set(self._chosen) - {"local_lipschitz"}:
            spectrum = self.attempt(
                "the singular values",
                lambda: spectrum_of(model, self._examples, self._by, self._kwargs, self._method, seed=self._seed),
            )
        if spectrum is not None:
            if spectrum.singular_values is not None:
                self.spectra.append(spectrum.singular_values)
            for quantity in self._chosen:
                if quantity != "local_lipschitz":
                    found |= _summary(quantity, getattr(spectrum, quantity))
        if "local_lipschitz" in self._chosen:
            ratios = self.attempt("local_lipschitz", lambda: self._lipschitz_ratios(model))
            if ratios is not None:
                found |= _summary("local_lipschitz", ratios)
        return found

    def _lipschitz_ratios(self, model):
        # The directions of the last measurement are good starting points, since the weights changed little.
        steps = _LIPSCHITZ_STEPS
        if self._directions is None:
            self._directions = random_directions(self._examples, self._by, self._radius, self._seed)
            steps = _FIRST_STEPS
        ratios, self._directions = largest_ratios(
            model, self._examples, self._by, self._kwargs, self._radius, steps, self._directions
        )
        return ratios


def _summary(quantity, values):
    """The log entries of one quantity, from its values for all examples."""
    if quantity == "condition_number":
        return {f"{quantity}_median": float(np.median(values))}
    if quantity == "effective_rank":
        return {f"{quantity}_mean": float(np.mean(values))}
    if quantity == "dynamical_isometry":
        return {quantity: float(np.sqrt(np.mean(values**2)))}
    return {f"{quantity}_mean": float(np.mean(values)), f"{quantity}_max": float(np.max(values))}
