"""A look at a classifier under attack after each epoch."""

import warnings

import keras

from keras_gradtools import nesting, validation
from keras_gradtools.attacks.robustness_metrics import RobustnessMetrics
from keras_gradtools.callbacks.left_out import LeftOut

NAME = "RobustnessMonitor"


class RobustnessMonitor(keras.callbacks.Callback):
    """Attacks the model on held-out examples after each epoch, and logs what `kg.attacks.robustness_metrics` returns.

    The names begin with `val_`, as in `val_pgd_0.1_accuracy`. Callbacks that come after it in the list can act on
    them, given a direction: `keras.callbacks.EarlyStopping("val_pgd_0.1_accuracy", mode="max")`. They are in the
    `history` and in the progress bar, too. In epochs without a measurement they are missing, as the results of
    `validation_freq` are.

    A warning says when the model shows signs of masked gradients (PGD above FGSM or above noise, accuracy left at a
    huge strength), once for each run of epochs that do; `signs` holds those of the last measurement.

    Args:
        x: examples of shape `(batch, ...)`, floating-point numbers within `clip`, kept out of training.
        y: classes of shape `(batch,)`, or one-hot rows.
        epsilons: the strengths of the attacks, in units of `x`.
        every: the number of epochs from one measurement to the next.
        norm: `"inf"` or 2, what the strength is measured by.
        clip: the range of the data, `(smallest, largest)`, or None for none.
        steps: those of PGD, which runs on the cross-entropy and on the margin.
        restarts: the runs of PGD on each.
        jacobian: whether to measure the Jacobian of the outputs, at one gradient for each class and example.
        seed: an integer: every measurement draws the same random starts and noise. None draws anew.
        batch_size: how many examples go together.
        inputs: the name (key, or position) of the input to perturb, where `x` has several; the only floating-point one
            by default. The others stay as they are.

    Raises:
        ValueError: for options, or as `fit` begins for examples, labels or a model, that do not fit.

    Cost:
        That of `kg.attacks.robustness_metrics` in each measurement.

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
                "accuracy under attack says little about its robustness then.",
                stacklevel=2,
            )
