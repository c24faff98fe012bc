"""A callback that logs gradients for each layer."""

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_gradtools import validation
from keras_gradtools.annotations import Data, Loss, Variables
from keras_gradtools.curvature.data.batches import Batches
from keras_gradtools.curvature.operators.hessian import Hessian
from keras_gradtools.diagnostics.dead_units import rectifying_layers, zero_units
from keras_gradtools.diagnostics.gradient_noise import ExampleGradients
from keras_gradtools.diagnostics.layer_names import places_by_layer
from keras_gradtools.training.loss_on_data import LossOnData
from keras_gradtools.training.monitor import Monitor
from keras_gradtools.training.quantities import require_quantities

NAME = "GradientMonitor"
QUANTITIES = ("gradient_norm", "dead_units", "update_to_weight_ratio", "gradient_noise_scale")


class GradientMonitor(Monitor):
    r"""Logs the gradient of the loss on fixed data during `fit`, for the whole model and for each layer.

    With $g$ the gradient of the mean loss on `data`, it logs:

    - `gradient_norm`, $\lVert g \rVert$, and `gradient_norm/LAYER` for the weights of each layer.
    - `dead_units`, the fraction of units of ReLU layers that are zero on all of `data`, and `dead_units/LAYER`. See
      `kg.diagnostics.dead_units`. It is missing if the model has no such layer.
    - `update_to_weight_ratio`, $\lVert \Delta w \rVert / \lVert w \rVert$ of the last step before the measurement, and
      `update_to_weight_ratio/LAYER`. About 1/1000 is common. NaN in the first epoch if its length is unknown.
    - `gradient_noise_scale`, the batch size at which the noise of the gradient equals the gradient. See
      `kg.diagnostics.gradient_noise_scale`.

    The values appear in the `History`, `CSVLogger` and `TensorBoard`. Callbacks after this one in the list can use
    them, if you say whether lower or higher is better: `keras.callbacks.EarlyStopping("gradient_norm", mode="min")`.
    With `log_dir`, TensorBoard shows the same numbers and a histogram of the gradient of each variable. Values that are
    not finite are logged as NaN, and left out in TensorBoard. A quantity that cannot be measured for this model is left
    out with a warning, such as the noise scale if an example cannot be evaluated alone. Nothing in the model changes.

    Args:
        data: The data of the loss, as for `kg.curvature.Hessian`. A few dozen examples are enough.
        every: When to measure: `"epoch"`, a string such as `"5 epochs"`, or an integer n for every n batches. See
            `kg.callbacks.Monitor`.
        quantities: Names of the quantities above to log. Default: all.
        variables: Trainable variables in a list, or a layer. Default: all trainable variables of the model.
        loss: A loss as `compile` takes it. Default: the compiled loss, without the terms that a wrapper of `kg.models`
            adds.
        training: Whether the model is called in training mode.
        per_layer: Whether the logs contain the values of each layer. `layers` and TensorBoard always contain them.
        log_dir: Folder for TensorBoard files, which needs `pip install "keras-gradtools[tensorboard]"`. The step in
            these files is the number of the epoch, starting at 0 as in Keras, or the number of batches.
        batch_size: Number of examples per batch if `data` is arrays. Ignored for data that come in batches.
        progress_bar: Which of the numbers the progress bar shows. Default: `gradient_norm`. See
            `kg.callbacks.Monitor`.

    Attributes:
        layers: A dict with an entry for each quantity except `gradient_noise_scale`: a dict from the layers, in the
            order of the model, to the list of all measured values. `kg.plots.plot_gradient_flow` draws
            `layers["gradient_norm"]`.
        last: A dict of the values that were measured last, including those of the layers.

    Raises:
        ValueError: If an option is invalid. When `fit` begins, if the model has no loss, or if the data do not fit the
            model.
        ImportError: With `log_dir`, if tensorboardX is not installed.

    Cost:
        For each measurement, a gradient, a call of the model, two copies of the weights, and for the noise scale about
        three more gradients. `kg.diagnostics` has functions for custom training loops.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, name="out")])
    >>> model.compile(keras.optimizers.SGD(0.0), "mse")
    >>> model.set_weights([np.array([[1.0]])])
    >>> x, y = np.ones((2, 1), "float32"), np.zeros((2, 1), "float32")
    >>> monitor = kg.callbacks.GradientMonitor((x, y))
    >>> history = model.fit(x, y, epochs=2, verbose=0, callbacks=[monitor]).history
    >>> history["gradient_norm"], history["gradient_norm/out"], history["update_to_weight_ratio"]
    ([2.0, 2.0], [2.0, 2.0], [0.0, 0.0])

    Source: Glorot & Bengio, "Understanding the difficulty of training deep feedforward neural networks" (2010), for
    gradients by layer; McCandlish et al. (arXiv:1812.06162, 2018) for the noise scale.
    """

    KEY_NUMBERS: tuple[str, ...] = ("gradient_norm",)

    def __init__(
        self,
        data: Data,
        every: int | str = "epoch",
        quantities: str | Sequence[str] | None = None,
        *,
        variables: Variables = None,
        loss: Loss = None,
        training: bool = False,
        per_layer: bool = True,
        log_dir: str | os.PathLike[str] | None = None,
        batch_size: int = 256,
        progress_bar: bool | Sequence[str] | None = None,
    ) -> None:
        super().__init__(every, log_dir=log_dir, progress_bar=progress_bar)
        self._loss_on_data = LossOnData(NAME, data, variables, loss, training, batch_size)
        self._quantities = require_quantities(NAME, quantities, QUANTITIES) or QUANTITIES
        self._per_layer = validation.require_flag(NAME, "per_layer", per_layer)
        self._operator: Any = None
        self._examples: Any = None
        self._batches: Any = None
        self._rectifying: frozenset = frozenset()
        self._gradient: list | None = None
        self._places: dict[str, list[int]] = {}
        self._before: list | None = None
        self._steps: int | None = None
        self._epoch = self._last_batch = 0
        self.layers: dict[str, dict[str, list[float]]] = {}

    def begin(self) -> None:
        given = self._loss_on_data
        # Only the gradient of this operator is used.
        self._operator = given.operator(Hessian, self.model)
        if self._needs_gradient():
            self._operator.check("gradient")
        self._places = places_by_layer(self._operator.model, self._operator.variables)
        if "gradient_noise_scale" in self._quantities:
            common = (given.loss, given.data, given.variables, given.training, given.batch_size)
            self._examples = ExampleGradients(NAME, self.model, *common)
        if "dead_units" in self._quantities:
            self._batches = Batches(NAME, given.data, given.batch_size)
            self._rectifying = rectifying_layers(self._operator.model)
        self._steps, self._before = (self.params or {}).get("steps"), None

    def end(self) -> None:
        self._operator = self._examples = self._batches = self._before = self._gradient = None

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self._last_batch = batch
        if "update_to_weight_ratio" in self._quantities and self._is_measured_after(batch):
            self._before = self._weights()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        super().on_epoch_end(epoch, logs)
        self._steps = self._last_batch + getattr(self.model, "steps_per_execution", 1)

    def measure(self) -> dict[str, Any]:
        found: dict[str, float] = {}
        gradient = self.attempt("gradient_norm", self._gradients) if self._needs_gradient() else None
        if "gradient_norm" in self._quantities and gradient is not None:
            found |= self._by_layer("gradient_norm", gradient, _length)
        self._gradient = gradient if self._log_dir is not None else None
        if "dead_units" in self._quantities:
            found |= self.attempt("dead_units", self._dead_units) or {}
        if "update_to_weight_ratio" in self._quantities:
            found |= self._update_ratios()
        if "gradient_noise_scale" in self._quantities:
            noise = self.attempt("gradient_noise_scale", self._examples.noise)
            if noise is not None:
                found["gradient_noise_scale"] = noise.noise_scale
        return found

    def histograms(self) -> dict[str, np.ndarray]:
        if self._gradient is None:
            return {}
        pairs = zip(self._operator.variables, self._gradient, strict=True)
        return {f"gradients/{v.path}": part for v, part in pairs}

    def _needs_gradient(self):
        return "gradient_norm" in self._quantities or self._log_dir is not None

    def _is_measured_after(self, batch):
        """Whether a measurement follows the step (or the `steps_per_execution` steps) that begins with this batch."""
        steps = getattr(self.model, "steps_per_execution", 1)
        if not self._schedule.counts_epochs:
            return self._schedule.will_be_due_after_batch(batch + steps - 1)
        # With a generator, the number of steps is only known after the first epoch.
        is_last = self._steps is not None and batch + steps >= self._steps
        return is_last and self._schedule.is_due_after_epoch(self._epoch)

    def _weights(self):
        """Copies of the weights as NumPy arrays."""
        self.sync_weights()
        return [np.array(ops.convert_to_numpy(v), "float64") for v in self._operator.variables]

    def _gradients(self):
        flat = self._operator.gradient()
        return [flat[place].astype("float64") for place in self._operator.slices]

    def _logged(self):
        return self.last if self._per_layer else {name: x for name, x in self.last.items() if "/" not in name}

    def _by_layer(self, quantity, parts, number):
        """The log entries of a quantity: `number(...)` of all parts, and of the parts of each layer."""
        values = {name: number([parts[i] for i in places]) for name, places in self._places.items()}
        return self._entries(quantity, number(parts), values)

    def _entries(self, quantity, of_all, by_layer):
        history = self.layers.setdefault(quantity, {})
        for name, value in by_layer.items():
            history.setdefault(name, []).append(value)
        return {quantity: of_all} | {f"{quantity}/{name}": value for name, value in by_layer.items()}

    def _dead_units(self):
        found: dict[str, np.ndarray] = {}
        training = self._loss_on_data.training
        for x, _, _ in self._batches:
            for name, is_dead in zero_units(self._operator.model, x, training, self._rectifying).items():
                found[name] = found.get(name, True) & is_dead
        if not found:
            return {}
        shares = {name: float(is_dead.mean()) for name, is_dead in found.items()}
        return self._entries("dead_units", float(np.concatenate(list(found.values())).mean()), shares)

    def _update_ratios(self):
        if self._before is None:
            nan = dict.fromkeys(self._places, math.nan)
            return self._entries("update_to_weight_ratio", math.nan, nan)
        pairs = [(now - before, before) for before, now in zip(self._before, self._weights(), strict=True)]
        self._before = None
        return self._by_layer("update_to_weight_ratio", pairs, _ratio)


def _length(parts):
    length = math.sqrt(sum(float(part.ravel() @ part.ravel()) for part in parts))
    return length if math.isfinite(length) else math.nan


def _ratio(pairs):
    update, weights = (_length(parts) for parts in zip(*pairs, strict=True))
    if weights == 0:
        return math.inf if update else 0.0
    return update / weights
