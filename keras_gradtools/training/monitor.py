"""The base class of the callbacks that measure something while `fit` trains."""

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_gradtools import validation
from keras_gradtools.training import progress_line
from keras_gradtools.training.current_weights import sync_weights
from keras_gradtools.training.event_file import EventFile, require_writer
from keras_gradtools.training.failed_measurements import FailedMeasurements
from keras_gradtools.training.schedule import Schedule

_BATCH_HOOKS = ("on_batch_end", "on_train_batch_end", "on_test_batch_end", "on_predict_batch_end")


class Monitor(keras.callbacks.Callback):
    r"""Base class of callbacks that measure something during `fit`, after every epoch or every n batches, and log it.

    Override `measure`, which returns a dict of numbers. It finds the trained model in `self.model`, with its current
    weights on every backend: between training steps on JAX, Keras keeps them outside of the variables, and `Monitor`
    brings them back. `measure` may assign new values to the weights, as `kg.callbacks.NewtonStep` does.

    The numbers appear in the `History`, `CSVLogger` and `TensorBoard`. The progress bar shows those that `progress_bar`
    chooses. Callbacks after this one in the list can use all of them, if you say whether lower or higher is better:
    `keras.callbacks.EarlyStopping("name", mode="min")`.

    Override `begin`, which is called when `fit` begins, to prepare what depends on the model. If something cannot be
    measured, raise the error there, before the weights change. Override `end` to delete what `begin` has created. Use
    `attempt` for a computation that may fail for some models. If you override hooks of Keras such as `on_epoch_end`,
    also call those of this class.

    Args:
        every: When to measure. `"epoch"`: at the end of each epoch. `"5 epochs"`: at the end of every fifth epoch. The
            logs of the other epochs do not have the values, as with `validation_freq`. An integer n: after every n
            batches, counted over the epochs of one `fit`. The logs of each epoch have the last values. With
            `steps_per_execution`, several batches end at once. It then measures if they reach or pass a multiple of n.
        prefix: A string before each name in the logs.
        log_dir: Folder for TensorBoard files, which needs `pip install "keras-gradtools[tensorboard]"`. The step in
            these files is the number of the epoch, starting at 0 as in Keras, or the number of batches.
        progress_bar: Which of the numbers the progress bar of `fit` shows: None for the most important ones, which a
            subclass names in the class attribute `KEY_NUMBERS` (here: all), True for all, False for none, or a list of
            names as in the logs.

    Attributes:
        last: A dict of the values that were measured last, with their names in the logs.
        measured_at: A list with the `step` of each measurement, in all calls of `fit`.
        step_unit: What `step` counts: `"epoch"`, or `"batch"` if `every` is an integer.
        step: The number of the epoch after which the last measurement was made, starting at 0 as in Keras. If `every`
            is an integer, the number of batches before it.

    Raises:
        ValueError: If an option is invalid. In `fit`, if `measure` does not return a dict.
        RuntimeError: In `fit`, if `every` is an integer and `callbacks` is not a list.
        ImportError: With `log_dir`, if tensorboardX is not installed.

    Cost:
        That of `measure`. On JAX, the weights are also brought back into the variables.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> class WeightNorm(kg.callbacks.Monitor):
    ...     def measure(self):
    ...         return {"norm": np.sqrt(sum((w**2).sum() for w in self.model.get_weights()))}
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    >>> model.set_weights([np.array([[1.0]])])
    >>> model.compile(keras.optimizers.SGD(0.25), "mse")
    >>> x, y = np.ones((2, 1), "float32"), np.zeros((2, 1), "float32")
    >>> history = model.fit(x, y, epochs=3, verbose=0, callbacks=[WeightNorm(prefix="weight_")]).history
    >>> [round(float(norm), 4) for norm in history["weight_norm"]]
    [0.5, 0.25, 0.125]
    """

    # The names, without the prefix, of what the progress bar shows by default. None for all.
    KEY_NUMBERS: tuple[str, ...] | None = None

    def __init__(
        self,
        every: int | str = "epoch",
        *,
        prefix: str = "",
        log_dir: str | os.PathLike[str] | None = None,
        progress_bar: bool | Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self._owner = type(self).__name__
        self._schedule = Schedule(self._owner, every)
        if not isinstance(prefix, str):
            raise validation.refused(self._owner, "a string", "prefix", prefix)
        if log_dir is not None and not isinstance(log_dir, (str, os.PathLike)):
            raise validation.refused(self._owner, "a path", "log_dir", log_dir)
        if log_dir is not None:
            require_writer(self._owner)
        self._prefix, self._log_dir = prefix, log_dir
        self._progress_bar = _require_choice_of_names(self._owner, progress_bar)
        self._events: Any = None
        self._thread = 0
        self._failed = FailedMeasurements(self._owner)
        # Keras may run the batch hooks of an async-safe callback in another thread while training continues. The hooks
        # of this class do nothing if `every` counts epochs.
        has_own_hooks = any(getattr(type(self), hook) is not getattr(Monitor, hook) for hook in _BATCH_HOOKS)
        self.async_safe: bool = self._schedule.counts_epochs and not has_own_hooks
        self.last: dict[str, float] = {}
        self.step: Any = None
        self.measured_at: list[int] = []
        self.step_unit = "epoch" if self._schedule.counts_epochs else "batch"

    def begin(self) -> None:
        """Called when `fit` begins."""

    def measure(self) -> dict[str, Any]:
        """Override this to return a dict from names, without the prefix, to numbers."""
        raise NotImplementedError(f"{self._owner} has to override `measure`.")

    def histograms(self) -> dict[str, np.ndarray]:
        """Returns a dict from tags to NumPy arrays, whose histograms are written to `log_dir` after `measure`."""
        return {}

    def end(self) -> None:
        """Called when `fit` ends."""

    def attempt(self, quantity: str, compute: Callable[[], Any]) -> Any:
        """Returns `compute()`, or None if it raises. The first failure warns, and `quantity` is not tried again."""
        return self._failed.tried(quantity, compute)

    def shown(self) -> list[str]:
        """The names of the numbers in `last` that the progress bar shows."""
        if self._progress_bar is None:
            keys = self.last if self.KEY_NUMBERS is None else [f"{self._prefix}{name}" for name in self.KEY_NUMBERS]
            # Without any of the most important ones, the first is better than none.
            return [name for name in keys if name in self.last] or list(self.last)[:1]
        if isinstance(self._progress_bar, bool):
            return list(self.last) if self._progress_bar else []
        return list(self._progress_bar)

    def sync_weights(self) -> None:
        """Brings the current weights into the variables of the model, as before `measure`."""
        sync_weights(self.model)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._failed = FailedMeasurements(self._owner)
        self._thread = threading.get_ident()
        self.begin()
        if self._log_dir is not None:
            self._events = EventFile(self._owner, self._log_dir)
        self._schedule.begin((self.params or {}).get("steps"))
        progress_line.choose(self)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if not self._schedule.counts_epochs and threading.get_ident() != self._thread:
            raise RuntimeError(
                f"{self._owner} measures between training steps, but Keras runs its hooks while the next step changes "
                "the weights. It does so if `callbacks` is not a list. Received: a hook in another thread than that of "
                f"`fit`. Pass `callbacks=[...]`, a list with this {self._owner}."
            )
        if self._schedule.is_due_after_batch(batch):
            self._measure(logs, self._schedule.batches)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if self._schedule.is_due_after_epoch(epoch):
            self._measure(logs, epoch)
        elif logs is not None and not self._schedule.counts_epochs:
            logs.update(self._logged())

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        progress_line.release(self)
        self.end()
        if self._events is not None:
            self._events.close()
            self._events = None

    def _measure(self, logs, step):
        self.sync_weights()
        self.step = step
        found = self.measure()
        if not isinstance(found, dict):
            raise ValueError(
                f"{self._owner} expects that `measure` returns a dict of names and numbers. Received: "
                f"{validation.describe(found)}."
            )
        self.measured_at.append(step)
        self.last = {f"{self._prefix}{name}": _number(value) for name, value in found.items()}
        if logs is not None:
            logs.update(self._logged())
        if self._events is not None:
            self._events.scalars(self.last, step)
            self._events.histograms(self.histograms(), step)
            self._events.flush()

    def _logged(self):
        """The part of `last` that the logs contain."""
        return self.last


def _require_choice_of_names(owner, chosen):
    if chosen is None or isinstance(chosen, bool):
        return chosen
    if not isinstance(chosen, (list, tuple)) or not all(isinstance(name, str) for name in chosen):
        raise validation.refused(owner, "None, True, False or a list of names", "progress_bar", chosen)
    return tuple(chosen)


def _number(value):
    return float(ops.convert_to_numpy(value)) if ops.is_tensor(value) else value
