"""Gradients in the logs, layer by layer."""

import math
import os
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_gradtools import validation
from keras_gradtools.callbacks.event_file import EventFile
from keras_gradtools.callbacks.left_out import LeftOut
from keras_gradtools.callbacks.schedule import Schedule
from keras_gradtools.curvature.batches import Batches
from keras_gradtools.curvature.hessian import Hessian
from keras_gradtools.diagnostics.dead_units import rectifying_layers, zero_units
from keras_gradtools.diagnostics.gradient_noise import ExampleGradients
from keras_gradtools.diagnostics.layer_names import places_by_layer

NAME = "GradientMonitor"
QUANTITIES = ("gradient_norm", "dead_units", "update_to_weight_ratio", "gradient_noise_scale")


class GradientMonitor(keras.callbacks.Callback):
    r"""Measures the gradient of the loss on fixed data while `fit` trains, layer by layer, and logs it.

    The logs get, with $g$ the gradient of the mean loss of `data`,

    - `gradient_norm`, $\lVert g \rVert$, and `gradient_norm/LAYER` of the weights of each layer;
    - `dead_units`, the share of the units of ReLU layers that are zero on all of `data`, and `dead_units/LAYER`: see
      `kg.diagnostics.dead_units`; nothing where there is no such layer;
    - `update_to_weight_ratio`, $\lVert \Delta w \rVert / \lVert w \rVert$ of the last step before the measurement, and
      `update_to_weight_ratio/LAYER`: about a thousandth is common. NaN in a first epoch whose length is not known;
    - `gradient_noise_scale`, the batch size at which the noise of the gradient equals the gradient: see
      `kg.diagnostics.gradient_noise_scale`.

    They are in the `History`, `CSVLogger` and `TensorBoard`, and callbacks that come after it in the list can act on
    them, given a direction: `keras.callbacks.EarlyStopping("gradient_norm", mode="min")`. Where it measures every n
    batches, the logs of an epoch have its last values. With a `log_dir`, TensorBoard shows the same numbers and a
    histogram of the gradient of each variable. What is not finite is logged as NaN, and left out there. A quantity that
    this model does not have, the noise scale for one where an example cannot stand alone, is left out with a warning.
    Nothing in the model changes.

    Args:
        data: what the loss is of, as `kg.curvature.Hessian` takes it. Some dozens of examples are enough to watch it.
        every: `"epoch"`, or a number n of batches.
        quantities: which of the above, by their names; by default all.
        variables: trainable variables in a list, or a layer; all of the model's by default.
        loss: what `compile` takes as `loss`; the compiled one by default, without what a wrapper of `kg.models` adds.
        training: whether the model is called as in training.
        per_layer: whether the logs have the numbers of each layer as well. `layers` and TensorBoard always have them.
        log_dir: a folder for TensorBoard's files, which needs `pip install "keras-gradtools[tensorboard]"`. The step
            there is the number of the epoch, from 0 on as in Keras, or of the batch.
        batch_size: of arrays.

    Attributes:
        layers: for each quantity but the last a dict of lists: of each layer, in the order of the model, the values of
            all measurements. `kg.plots.plot_gradient_flow` draws `layers["gradient_norm"]`.
        last: what was logged last, layers included.

    Raises:
        ValueError: for options that do not fit; as `fit` begins, for a model without a loss, or data that do not fit
            it.
        ImportError: with a `log_dir`, without tensorboardX.

    Cost:
        In each measurement a gradient, a call of the model, two copies of the weights, and, for the noise scale, some
        three gradients more. `kg.diagnostics` has the functions for other loops.

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

    def __init__(
        self,
        data,
        every="epoch",
        quantities=None,
        *,
        variables=None,
        loss=None,
        training=False,
        per_layer=True,
        log_dir=None,
        batch_size=256,
    ):
        super().__init__()
        self._schedule = Schedule(NAME, every)
        validation.require_data(NAME, data)
        validation.require_loss(NAME, loss)
        validation.require_variables(NAME, variables)
        validation.require_flag(NAME, "training", training)
        validation.require_count(NAME, "batch_size", batch_size)
        chosen = (quantities,) if isinstance(quantities, str) else quantities
        known = chosen is None or (isinstance(chosen, (tuple, list)) and chosen and set(chosen) <= set(QUANTITIES))
        if not known:
            raise ValueError(
                f"{NAME} expects some of {', '.join(QUANTITIES)} as `quantities`. "
                f"Received: quantities={validation.shown(quantities)}."
            )
        if not isinstance(per_layer, bool):
            raise ValueError(
                f"{NAME} expects True or False as `per_layer`. Received: per_layer={validation.shown(per_layer)}."
            )
        if log_dir is not None and not isinstance(log_dir, (str, os.PathLike)):
            raise ValueError(f"{NAME} expects a path as `log_dir`. Received: {validation.describe(log_dir)}.")
        self._quantities = tuple(chosen or QUANTITIES)
        self._data, self._variables, self._loss, self._training = data, variables, loss, training
        self._per_layer, self._log_dir, self._batch_size = per_layer, log_dir, batch_size
        self._operator: Any = None
        self._examples: Any = None
        self._batches: Any = None
        self._rectifying: frozenset = frozenset()
        self._left_out = LeftOut(NAME)
        self._events: Any = None
        self._places: dict[str, list[int]] = {}
        self._before: list | None = None
        self._steps: int | None = None
        self._last_batch = 0
        # Keras may go on training while another thread calls what is due after a batch.
        self.async_safe = self._schedule.is_due_after_epoch()
        self.layers: dict[str, dict[str, list[float]]] = {}
        self.last: dict[str, float] = {}

    def on_train_begin(self, logs=None):
        self._left_out = LeftOut(NAME)
        common = (self._loss, self._data, self._variables, self._training)
        # Of the operator nothing but its gradient is asked for.
        self._operator = Hessian(self.model, *common, batch_size=self._batch_size, verbose=0)
        if "gradient_norm" in self._quantities or self._log_dir is not None:
            self._operator.check("gradient")
        self._places = places_by_layer(self._operator.model, self._operator.variables)
        if "gradient_noise_scale" in self._quantities:
            loss, data, variables, training = common
            self._examples = ExampleGradients(NAME, self.model, data, loss, variables, training, self._batch_size)
        if "dead_units" in self._quantities:
            self._batches = Batches(NAME, self._data, self._batch_size)
            self._rectifying = rectifying_layers(self._operator.model)
        if self._log_dir is not None:
            self._events = EventFile(NAME, self._log_dir)
        self._steps, self._before = (self.params or {}).get("steps"), None
        self._schedule.begin()

    def on_train_batch_begin(self, batch, logs=None):
        self._last_batch = batch
        if "update_to_weight_ratio" in self._quantities and self._is_measured_after(batch):
            self._before = self._weights()

    def on_train_batch_end(self, batch, logs=None):
        if self._schedule.is_due_after_batch():
            self._measure(logs, self._schedule.batches)

    def on_epoch_end(self, epoch, logs=None):
        if self._schedule.is_due_after_epoch():
            self._measure(logs, epoch)
        elif logs is not None:
            logs.update(self._logged())
        self._steps = self._last_batch + getattr(self.model, "steps_per_execution", 1)

    def on_train_end(self, logs=None):
        self._operator = self._examples = self._batches = self._before = None
        if self._events is not None:
            self._events.close()
            self._events = None

    def _is_measured_after(self, batch):
        """Whether a measurement follows the step, or the steps in one program, that begin with this batch."""
        if not self._schedule.is_due_after_epoch():
            return self._schedule.is_due_next()
        # How many there are, the first epoch of a generator finds out.
        steps = getattr(self.model, "steps_per_execution", 1)
        return self._steps is not None and batch + steps >= self._steps

    def _weights(self):
        """Copies of the weights, in NumPy."""
        self._sync()
        return [np.array(ops.convert_to_numpy(v), "float64") for v in self._operator.variables]

    def _sync(self):
        # Between the steps of a training on JAX, the weights are not in the variables.
        sync = getattr(self.model, "jax_state_sync", None)
        if sync is not None:
            sync()

    def _measure(self, logs, step):
        self._sync()
        found: dict[str, float] = {}
        gradient = None
        if "gradient_norm" in self._quantities or self._events is not None:
            gradient = self._left_out.tried("gradient_norm", self._gradient)
        if "gradient_norm" in self._quantities and gradient is not None:
            found |= self._by_layer("gradient_norm", gradient, _length)
        if "dead_units" in self._quantities:
            found |= self._left_out.tried("dead_units", self._dead_units) or {}
        if "update_to_weight_ratio" in self._quantities:
            found |= self._update_ratios()
        if "gradient_noise_scale" in self._quantities:
            noise = self._left_out.tried("gradient_noise_scale", self._examples.noise)
            if noise is not None:
                found["gradient_noise_scale"] = noise.noise_scale
        self.last = found
        if logs is not None:
            logs.update(self._logged())
        if self._events is not None:
            self._write(gradient, step)

    def _gradient(self):
        flat = self._operator.gradient()
        return [flat[place].astype("float64") for place in self._operator.slices]

    def _logged(self):
        return self.last if self._per_layer else {name: x for name, x in self.last.items() if "/" not in name}

    def _by_layer(self, quantity, parts, number):
        """The entries of the logs: `number` of all parts, and of those of each layer."""
        values = {name: number([parts[i] for i in places]) for name, places in self._places.items()}
        return self._entries(quantity, number(parts), values)

    def _entries(self, quantity, of_all, by_layer):
        history = self.layers.setdefault(quantity, {})
        for name, value in by_layer.items():
            history.setdefault(name, []).append(value)
        return {quantity: of_all} | {f"{quantity}/{name}": value for name, value in by_layer.items()}

    def _dead_units(self):
        found: dict[str, np.ndarray] = {}
        for x, _, _ in self._batches:
            for name, is_dead in zero_units(self._operator.model, x, self._training, self._rectifying).items():
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

    def _write(self, gradient, step):
        self._events.scalars(self.last, step)
        paths = [v.path for v in self._operator.variables]
        if gradient is not None:
            self._events.histograms({f"gradients/{p}": g for p, g in zip(paths, gradient, strict=True)}, step)
        self._events.flush()


def _length(parts):
    length = math.sqrt(sum(float(part.ravel() @ part.ravel()) for part in parts))
    return length if math.isfinite(length) else math.nan


def _ratio(pairs):
    update, weights = (_length(parts) for parts in zip(*pairs, strict=True))
    if weights == 0:
        return math.inf if update else 0.0
    return update / weights
