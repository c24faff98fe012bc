"""A callback that attacks a classifier during training and logs its robustness."""

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from keras_gradtools import nesting, validation
from keras_gradtools.annotations import Data, InputNames
from keras_gradtools.attacks.robustness_metrics import RobustnessMetrics
from keras_gradtools.training.monitor import Monitor

NAME = "RobustnessMonitor"


class RobustnessMonitor(Monitor):
    """Attacks the model on held-out examples during `fit`, and logs the `kg.attacks.robustness_metrics`.

    The names begin with `val_`, as in `val_pgd_0.1_accuracy`. The values appear in the `History`, and the most
    important ones in the progress bar. Callbacks after this one in the list can use all of them, if you say whether
    lower or higher is better: `keras.callbacks.EarlyStopping("val_pgd_0.1_accuracy", mode="max")`.

    A warning is given if the model shows signs of masked gradients: accuracy under PGD above that under FGSM or noise,
    or accuracy above guessing under an attack that may replace the whole example. Consecutive measurements with such
    signs give one warning.

    Args:
        data: Held-out examples in a tuple `(x, y)`: `x` of shape `(batch, ...)`, floating-point numbers within `clip`,
            and `y`, classes of shape `(batch,)`, or one-hot vectors.
        every: When to measure: `"epoch"`, a string such as `"5 epochs"`, or an integer n for every n batches. See
            `kg.callbacks.Monitor`.
        epsilons: Strengths of the attacks, in units of `x`.
        norm: Norm in which the strength is measured, `"inf"` or 2.
        clip: Range of the data, `(smallest, largest)`, or None for no range.
        steps: Number of steps of PGD.
        restarts: Number of PGD runs for each of its two losses, the cross-entropy and the margin.
        jacobian: Whether to measure the Jacobian of the outputs, at a cost of one gradient for each class and example.
        seed: An integer, so that every measurement draws the same random starts and noise, or None for new ones in
            each measurement.
        batch_size: Number of examples per batch.
        inputs: Name, key or position of the input to perturb if `x` has several. Default: the only floating-point
            input. The other inputs are not changed.
        progress_bar: Which of the numbers the progress bar shows. Default: the accuracy under PGD of the first
            strength. See `kg.callbacks.Monitor`.

    Attributes:
        signs: The signs of masked gradients in the last measurement, a list of sentences.
        last: A dict of the values that were measured last.

    Raises:
        ValueError: If an option is invalid. When `fit` begins, if the examples, the labels or the model are invalid.

    Cost:
        That of `kg.attacks.robustness_metrics` for each measurement.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, use_bias=False)])
    >>> model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    >>> x, y = np.array([[0.75, 0.5], [0.0, 1.0]], "float32"), np.array([0, 1])
    >>> monitor = kg.callbacks.RobustnessMonitor((x, y), every="2 epochs", epsilons=(0.1,))
    >>> history = model.fit(x, y, epochs=4, verbose=0, callbacks=[monitor])
    >>> len(history.history["val_pgd_0.1_accuracy"])
    2

    Source: As for `kg.attacks.robustness_metrics`.
    """

    def __init__(
        self,
        data: Data,
        every: int | str = "epoch",
        *,
        epsilons: Sequence[float] = (0.1,),
        norm: Literal["inf", 2] = "inf",
        clip: tuple[float, float] | None = (0.0, 1.0),
        steps: int = 20,
        restarts: int = 1,
        jacobian: bool = True,
        seed: int = 0,
        batch_size: int = 128,
        inputs: InputNames = None,
        progress_bar: bool | Sequence[str] | None = None,
    ) -> None:
        super().__init__(every, prefix="val_", progress_bar=progress_bar)
        expected = f"{NAME} expects arrays of shape (batch, ...) in a tuple (x, y) as `data`"
        if not isinstance(data, (tuple, list)) or len(data) != 2:
            raise ValueError(f"{expected}. Received: data={validation.describe(data)}.")
        x, y = data
        parts = nesting.flatten(x) or [None]
        if len(parts) > 1:
            parts = [a for a in parts if a is not None and len(getattr(a, "shape", ()))] or [None]
        labels, *arrays = [validation.as_array(a, expected) for a in (y, *parts)]
        if not arrays[0].ndim or (labels.ndim and any(len(a) != len(labels) for a in arrays)):
            raise ValueError(
                f"{NAME} expects one label for each example. Received: x={validation.describe(x)} and "
                f"y={validation.describe(y)}."
            )
        self.signs: list[str] = []
        self._examples = (x, y)
        strengths: list[Any] = list(epsilons) if isinstance(epsilons, (list, tuple, np.ndarray)) else [epsilons]
        self._metrics = RobustnessMetrics(
            epsilons, norm, clip, steps, restarts, jacobian, seed, batch_size, NAME, inputs
        )
        self.KEY_NUMBERS = (f"pgd_{float(strengths[0]):g}_accuracy",)

    def begin(self) -> None:
        self._metrics.require_examples(self.model, *self._examples)

    def measure(self) -> dict[str, Any]:
        had_signs = bool(self.signs)
        measured = self.attempt("all metrics", lambda: self._metrics.measure(self.model, *self._examples))
        if measured is None:
            return {}
        metrics, self.signs = measured
        if self.signs and not had_signs:
            when = f"epoch {self.step + 1}" if self._schedule.counts_epochs else f"batch {self.step}"
            warnings.warn(
                f"After {when} the model shows signs of masked gradients: {'; '.join(self.signs)}. Its "
                "accuracy under attack then says little about its robustness.",
                stacklevel=2,
            )
        return metrics
