"""A callback that attacks a classifier after each epoch and logs its robustness."""

import warnings

import keras

from keras_gradtools import nesting, validation
from keras_gradtools.attacks.robustness_metrics import RobustnessMetrics
from keras_gradtools.callbacks.left_out import LeftOut

NAME = "RobustnessMonitor"


class RobustnessMonitor(keras.callbacks.Callback):
    """Attacks the model on held-out examples after each epoch, and logs the `kg.attacks.robustness_metrics`.

    The names begin with `val_`, as in `val_pgd_0.1_accuracy`. The values appear in the `History` and in the progress
    bar. Callbacks after this one in the list can use them, if you give them a direction:
    `keras.callbacks.EarlyStopping("val_pgd_0.1_accuracy", mode="max")`. They are missing in epochs without a
    measurement, as validation results are with `validation_freq`.

    A warning is given when the model shows signs of masked gradients: accuracy under PGD above that under FGSM or
    noise, or accuracy left at a huge strength. Consecutive measurements with signs give one warning. `signs` holds the
    signs of the last measurement.

    Args:
        x: Held-out examples of shape `(batch, ...)`, floating-point numbers within `clip`.
        y: Classes of shape `(batch,)`, or one-hot vectors.
        epsilons: Strengths of the attacks, in units of `x`.
        every: Number of epochs from one measurement to the next.
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
    >>> monitor = kg.callbacks.RobustnessMonitor(x, y, epsilons=(0.1,), every=2)
    >>> history = model.fit(x, y, epochs=4, verbose=0, callbacks=[monitor])
    >>> len(history.history["val_pgd_0.1_accuracy"])
    2
    """

    def __init__(
        self,
        x,
        y,
        epsilons=(0.1,),
        every=1,
        *,
        norm="inf",
        clip=(0.0, 1.0),
        steps=20,
        restarts=1,
        jacobian=True,
        seed=0,
        batch_size=128,
        inputs=None,
    ):
        super().__init__()
        validation.require_count(NAME, "every", every)
        expected = f"{NAME} expects arrays of shape (batch, ...) as `x` and `y`"
        parts = nesting.flatten(x) or [None]
        if len(parts) > 1:
            parts = [a for a in parts if a is not None and len(getattr(a, "shape", ()))] or [None]
        labels, *arrays = [validation.as_array(a, expected) for a in (y, *parts)]
        if not arrays[0].ndim or (labels.ndim and any(len(a) != len(labels) for a in arrays)):
            raise ValueError(
                f"{NAME} expects one label for each example. Received: x={validation.describe(x)} and "
                f"y={validation.describe(y)}."
            )
        self.signs = []
        self._left_out = LeftOut(NAME)
        self._examples, self._every = (x, y), every
        self._metrics = RobustnessMetrics(
            epsilons, norm, clip, steps, restarts, jacobian, seed, batch_size, NAME, inputs
        )

    def on_train_begin(self, logs=None):
        self._left_out = LeftOut(NAME)
        self._metrics.checked(self.model, *self._examples)

    def on_epoch_end(self, epoch, logs=None):
        if (epoch + 1) % self._every:
            return
        had_signs = bool(self.signs)
        measured = self._left_out.tried("all metrics", lambda: self._metrics.measure(self.model, *self._examples))
        if measured is None:
            return
        metrics, self.signs = measured
        if logs is not None:
            logs.update({f"val_{name}": value for name, value in metrics.items()})
        if self.signs and not had_signs:
            warnings.warn(
                f"After epoch {epoch + 1} the model shows signs of masked gradients: {'; '.join(self.signs)}. Its "
                "accuracy under attack then says little about its robustness.",
                stacklevel=2,
            )
