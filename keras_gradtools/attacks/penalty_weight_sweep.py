"""Training with several weights of a penalty, and the accuracy of each model on clean and attacked examples."""

import dataclasses
import math
from collections.abc import Sequence

import keras
import numpy as np

from keras_gradtools import validation
from keras_gradtools.annotations import ArrayLike, Function, InputNames, Nested, Verbose
from keras_gradtools.attacks.robustness_metrics import RobustnessMetrics
from keras_gradtools.display.html import Table
from keras_gradtools.display.progress import Progress
from keras_gradtools.display.results import displayed

NAME = "penalty_weight_sweep"
# Differences of accuracies below this are rounding.
_ROUNDING = 1e-9


@displayed
@dataclasses.dataclass(frozen=True, eq=False)
class PenaltyWeightSweep:
    """The result of `kg.regularization.penalty_weight_sweep`.

    `print` shows it as a table, and `kg.plots.plot_penalty_weight_sweep` as a figure.

    Attributes:
        penalty_weights: The weights of the penalty in ascending order, from 0, of shape `(weights,)`.
        clean: The accuracies without an attack, from 0 to 1, of shape `(weights, seeds)`.
        attacked: The accuracies under PGD, of the same shape.
        masked: Whether some model of that weight masks its gradients, of shape `(weights,)`. Its accuracy under attack
            then means nothing.
        max_drop: The accuracy without an attack that the suggested weight may cost, at most.
        epsilon: The strength of the attack.
        norm: The norm of the attack, `"inf"` or 2.
        examples: The number of examples.
    """

    penalty_weights: np.ndarray
    clean: np.ndarray
    attacked: np.ndarray
    masked: np.ndarray
    max_drop: float
    epsilon: float
    norm: int | str
    examples: int

    @property
    def suggestion(self) -> float:
        """The weight with the highest accuracy under attack among those that lose at most `max_drop` without one.

        Weights with masked gradients are left out. If several weights are equally good, it is the smallest of them. It
        is 0 if no weight is better than 0.
        """
        clean, attacked = self.clean.mean(axis=1), self.attacked.mean(axis=1)
        allowed = (clean >= clean[0] - self.max_drop - _ROUNDING) & ~self.masked
        allowed[0] = True
        best = attacked[allowed].max()
        return float(self.penalty_weights[np.argmax(allowed & (attacked >= best - _ROUNDING))])

    def standard_errors(self, accuracies: np.ndarray) -> np.ndarray:
        r"""The standard error of the mean of `clean` or `attacked`, of shape `(weights,)`.

        $\sqrt{p (1 - p) / n}$ for $n$ examples. It covers the choice of the examples, not the choice of the seeds.
        """
        share = accuracies.mean(axis=1)
        return np.sqrt(share * (1.0 - share) / self.examples)

    def _parts(self):
        return [self._title(), Table(list(self._rows()), ("weight", "clean", "attacked", "")), *self._remarks()]

    def __str__(self):
        rows = [("weight", "clean", "attacked", ""), *self._rows()]
        table = [
            f"{weight:>10}{clean:>10}{attacked:>10}  {remark}".rstrip() for weight, clean, attacked, remark in rows
        ]
        return "\n".join([self._title(), *table, *self._remarks()])

    def _title(self):
        norm, count = "l-infinity" if self.norm == "inf" else "l2", self.clean.shape[1]
        trainings = f"{count} training{'s'[: count > 1]}"
        return f"{self.examples} examples, PGD up to {self.epsilon:g} ({norm}), {trainings} for each weight"

    def _rows(self):
        found = zip(self.penalty_weights, self.clean.mean(axis=1), self.attacked.mean(axis=1), self.masked, strict=True)
        for weight, clean, attacked, masked in found:
            remark = "gradients are masked" if masked else "suggested" if weight == self.suggestion else ""
            yield f"{weight:g}", f"{clean:.1%}", f"{attacked:.1%}", remark

    def _remarks(self):
        error = max(self.standard_errors(self.clean).max(), self.standard_errors(self.attacked).max())
        yield (
            f"Suggested weight: {self.suggestion:g}, which loses at most {100 * self.max_drop:g} points without an "
            f"attack. Standard error of an accuracy: at most {100 * error:.1f} points."
        )
        if self.suggestion == self.penalty_weights[-1]:
            yield "It is the largest weight of the sweep: try larger ones."
        elif self.suggestion == 0:
            yield "No weight of the sweep is better than 0: try smaller ones."


def penalty_weight_sweep(
    train: Function,
    penalty_weights: Sequence[float],
    x: Nested,
    y: ArrayLike,
    epsilon: float = 0.1,
    *,
    max_drop: float = 0.005,
    seeds: Sequence[int] = (0,),
    norm: str = "inf",
    clip: tuple[float, float] | None = (0.0, 1.0),
    steps: int = 20,
    restarts: int = 1,
    batch_size: int = 128,
    verbose: Verbose = "auto",
    inputs: InputNames = None,
) -> PenaltyWeightSweep:
    r"""Trains a classifier with each weight of a penalty, and suggests the weight to use.

    Let $c_w$ be the accuracy of the model trained with the weight $w$, and $a_w$ its accuracy under PGD, both on
    examples that it was not trained on. The suggested weight is

    $$\arg\max_w a_w \quad \text{where} \quad c_w \ge c_0 - \text{max\_drop}.$$

    The weight 0 is always trained, as the model to compare with. The same sweep chooses any other strength: pass a
    `train` that takes the strength of the attack in adversarial training, or the standard deviation of noise.

    Args:
        train: A function that takes the weight of the penalty, builds a new model, trains it and returns it: a
            classifier as in `kg.attacks.robustness_metrics`, or its wrapper.
        penalty_weights: A list of positive numbers. Weights that differ by factors of 3 are a good start.
        x: Examples of shape `(batch, ...)` that `train` does not use. Keep other examples for the final test, because
            the accuracy of the suggested weight is too high on the examples that chose it.
        y: Classes of shape `(batch,)`, or one-hot rows.
        epsilon: The strength of the attack, in units of `x`.
        max_drop: The accuracy without an attack that the suggested weight may cost, at most. 0.005 is half a
            percentage point.
        seeds: A list of integers. Each weight is trained once with each seed, which is passed to
            `keras.utils.set_random_seed`. So all weights start from the same initial weights and see the same batches.
        norm: The norm that measures the strength of the attack: `"inf"` or 2.
        clip: The range of the data, `(smallest, largest)`, or None for no range.
        steps: Number of steps of each PGD run.
        restarts: Number of PGD runs on the cross-entropy and on the margin.
        batch_size: Number of examples per batch of the attack.
        verbose: 1 for a progress bar of the trainings, 0 for none, `"auto"` for one if they take more than 3 seconds.
        inputs: As in `kg.attacks.robustness_metrics`.

    Returns:
        A `PenaltyWeightSweep`.

    Raises:
        ValueError: If an option, the examples or the labels are not valid, or if `train` does not return a classifier.

    Cost:
        One training for each weight and seed, with one for the weight 0, and one call of
        `kg.attacks.robustness_metrics` for each model.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> def train(penalty_weight):  # stands for a training that makes the second input count less
    ...     model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, use_bias=False)])
    ...     model.set_weights([np.array([[1.0, 0.0], [0.0, 1.0 - penalty_weight]], "float32")])
    ...     return model
    >>> x, y = np.array([[0.75, 0.5], [0.25, 0.5]], "float32"), [0, 1]
    >>> sweep = kg.regularization.penalty_weight_sweep(train, [0.25, 0.6], x, y, epsilon=0.2, verbose=0)
    >>> sweep.clean[:, 0].tolist(), sweep.attacked[:, 0].tolist(), sweep.suggestion
    ([1.0, 1.0, 0.5], [0.0, 0.5, 0.5], 0.25)

    Source: the rule of the study in docs/robustness.md.
    """
    if not callable(train):
        raise validation.refused(NAME, "a function of the weight that returns a trained model", "train", train)
    weights = [0.0, *_require_penalty_weights(penalty_weights)]
    epsilon = validation.require_number(NAME, "epsilon", epsilon, above=0)
    max_drop = validation.require_number(NAME, "max_drop", max_drop, least=0)
    seeds = _require_seeds(seeds)
    validation.require_verbose(NAME, verbose)
    metrics = RobustnessMetrics(
        [epsilon], norm, clip, steps, restarts, jacobian=False, batch_size=batch_size, owner=NAME, inputs=inputs
    )
    examples = 0
    found = np.empty((3, len(weights), len(seeds)))
    with Progress(found[0].size, "sweep of the weight of a penalty", verbose, "training") as progress:
        for row, column in np.ndindex(found.shape[1:]):
            keras.utils.set_random_seed(seeds[column])
            model = _trained(train, weights[row])
            examples = len(metrics.require_examples(model, x, y).y)
            measured, _ = metrics.measure(model, x, y)
            clean, attacked = measured["clean_accuracy"], measured[f"pgd_{epsilon:g}_accuracy"]
            found[:, row, column] = clean, attacked, measured["masked_gradients"]
            progress.note(f"weight {weights[row]:g}: {clean:.1%} clean, {attacked:.1%} attacked")
            progress.update()
    clean, attacked, signs = found
    masked = np.asarray(signs.any(axis=1))
    return PenaltyWeightSweep(np.asarray(weights), clean, attacked, masked, max_drop, epsilon, norm, examples)


def _trained(train, weight):
    model = train(weight)
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"{NAME} expects that `train` returns the trained keras.Model. "
            f"Received: {validation.describe(model)} from train({weight:g})."
        )
    return model


def _require_penalty_weights(given):
    given = list(given) if isinstance(given, (list, tuple, np.ndarray)) else [given]
    is_right = given and all(validation.is_number(w) and 0 <= w < math.inf for w in given)
    positive = sorted({float(w) for w in given if w > 0}) if is_right else []
    if not positive:
        expected = "a list of positive numbers"
        raise validation.refused(NAME, expected, "penalty_weights", given, "For example, [0.01, 0.03, 0.1, 0.3, 1.0].")
    return positive


def _require_seeds(given):
    seeds = list(given) if isinstance(given, (list, tuple, np.ndarray, range)) else [given]
    if not seeds or not all(validation.is_count(seed, 0) for seed in seeds):
        raise validation.refused(NAME, "a list of integers of 0 or more", "seeds", given)
    return [int(seed) for seed in seeds]
