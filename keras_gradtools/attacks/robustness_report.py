"""Estimates of the distance from each example to a misclassification: by gradients, by bounds and by an attack."""

import dataclasses
import math
from typing import Literal

import numpy as np
from keras import ops

from keras_gradtools import chosen_inputs, validation
from keras_gradtools.annotations import Function, InputNames, Nested, Verbose
from keras_gradtools.attacks import norm_balls
from keras_gradtools.attacks.ascent import CompiledAscent
from keras_gradtools.attacks.batches import map_batches, require_examples, require_labels, seeds_from
from keras_gradtools.attacks.data_range import extent
from keras_gradtools.attacks.objectives import Objective
from keras_gradtools.attacks.pgd import PGD
from keras_gradtools.display.descriptions import short
from keras_gradtools.display.html import Table
from keras_gradtools.display.progress import Progress
from keras_gradtools.display.results import displayed
from keras_gradtools.example_norms import for_each

NAME = "robustness_report"
# A misclassified label has a probability of 1/2 or less.
LEAST_LOSS_OF_AN_ERROR = math.log(2)
HALVINGS = 12
# The loss and its slope are sampled at these fractions of the attack's distance.
SAMPLED = (0.25, 0.5, 1.0)
# The smallest sampling distance, as a fraction of the largest strength. Below it, second differences are mostly noise.
LEAST_WAY = 1 / 128
LINES = {
    "first_order": "first order, margin / ||g||",
    "lipschitz_bound": "bound by the slope L",
    "curvature_bound": "bound by the curvature C",
    "attack": "found by the attack",
}


@displayed
@dataclasses.dataclass(frozen=True, eq=False)
class RobustnessReport:
    """The result of `kg.attacks.robustness_report`: arrays of shape `(batch,)`, distances in units of the examples.

    `print` shows it as a table, and `kg.plots.plot_robustness` as a figure.

    Attributes:
        correct: Whether the classifier is right on each example. All distances are 0 where it is not.
        margin: The logit of the label minus the largest other logit.
        loss: The cross-entropy of each example.
        first_order: The margin divided by the dual norm of its gradient.
        lipschitz_bound: The distance estimated from the loss and the largest slope, `lipschitz`.
        curvature_bound: The distance estimated from the loss, its slope at the example and the largest curvature,
            `curvature`.
        attack: The norm of the smallest successful perturbation that the attack found, or infinity if it found none.
        lipschitz: L, the largest sampled slope of the loss.
        curvature: C, the largest sampled curvature of the loss, at least 0.
        norm: The norm of the perturbations, `"inf"` or 2.
    """

    correct: np.ndarray
    margin: np.ndarray
    loss: np.ndarray
    first_order: np.ndarray
    lipschitz_bound: np.ndarray
    curvature_bound: np.ndarray
    attack: np.ndarray
    lipschitz: float
    curvature: float
    norm: int | str

    def _parts(self):
        first, *_, last = str(self).splitlines()
        right = self.correct
        rows = [
            (title, *map(short, _quantiles(distances)), f"{np.mean(distances <= self.attack[right]):.1%}")
            for name, title in LINES.items()
            if len(distances := getattr(self, name)[right])
        ]
        return [first, Table(rows, ("distance", "10%", "median", "90%", "at most the attack's")), last]

    def __str__(self) -> str:
        count, right = len(self.correct), self.correct
        norm = "l-infinity" if self.norm == "inf" else "l2"
        lines = [
            f"{count} examples, {right.mean():.1%} of them classified correctly; their {norm} distances to an error:",
            f"{'':28}{'10%':>9}{'median':>9}{'90%':>9}{'<= attack':>12}",
        ]
        for name, title in LINES.items():
            distances = getattr(self, name)[right]
            shown = "".join(f"{q:9.4g}" for q in _quantiles(distances))
            share = (
                "" if name == "attack" else f"{np.mean(distances <= self.attack[right]):12.1%}" if right.any() else ""
            )
            lines.append(f"{title:28}{shown}{share}")
        lines.append(
            f"L = {self.lipschitz:.4g} and C = {self.curvature:.4g} are the largest sampled values. "
            "All distances are estimates; <= attack: the share of examples where one is at most what the attack found."
        )
        return "\n".join(lines)


def _quantiles(distances):
    if not len(distances):
        return [math.nan] * 3
    return np.quantile(distances, [0.1, 0.5, 0.9], method="lower")


def robustness_report(
    model: Function,
    x: Nested,
    y: Nested,
    *,
    norm: Literal["inf", 2] = "inf",
    clip: tuple[float, float] | None = (0.0, 1.0),
    max_epsilon: float | None = None,
    steps: int = 20,
    restarts: int = 1,
    seed: int = 0,
    batch_size: int = 128,
    verbose: Verbose = "auto",
    inputs: InputNames = None,
) -> RobustnessReport:
    r"""Estimates in four ways how far each example can be moved before a classifier errs.

    Let $m$ be the margin (the logit of the label minus the largest other logit), $\ell$ the cross-entropy,
    $\ell_0 = \log 2$ its smallest value for a misclassified example, and $\lVert \cdot \rVert_*$ the dual of the norm
    of the perturbation (the l1 norm for inf, the l2 norm for 2). The four distances are

    - to first order, $m / \lVert \nabla m \rVert_*$;
    - by the slope, $(\ell_0 - \ell) / L$, $\; L = \max \lVert \nabla \ell \rVert_*$;
    - by the curvature,
      $\bigl(-\lVert \nabla \ell \rVert_* + \sqrt{\lVert \nabla \ell \rVert_*^2 + 2 C (\ell_0 - \ell)}\bigr) / C$,
      $\; C = \max \, 2 \, (\ell(x + h d) - \ell(x) - h \lVert \nabla \ell \rVert_*) / h^2$, along the steepest
      direction $d$;
    - the norm of the smallest successful perturbation that PGD finds, by bisection of its strength.

    The second and the third would be lower bounds if L and C held everywhere. But L and C are only the largest values
    that were sampled, over all examples, along the steepest direction up to the attack's distance. The two distances
    are therefore estimates without a guarantee. The attack's distance is an upper bound of the true one.

    Args:
        model: A classifier that returns logits or probabilities, as in `kg.attacks.fgsm`. It is called in inference
            mode and is not changed.
        x: Examples of shape `(batch, ...)`, floating-point numbers within `clip`.
        y: Classes of shape `(batch,)`, or one-hot rows.
        norm: The norm of the perturbations: `"inf"` or 2.
        clip: The range of the data, `(smallest, largest)`, or None for no range.
        max_epsilon: The largest strength that the attack tries, in units of `x`. By default, the extent of the range.
        steps: Number of steps of each PGD run. PGD runs on the cross-entropy and on the margin.
        restarts: Number of PGD runs on each of the two.
        seed: An integer that makes the random starts reproducible, or None.
        batch_size: Number of examples per batch.
        verbose: 1 for a progress bar, 0 for none, `"auto"` for one if it takes long.
        inputs: The name, key or position of the input to perturb if `x` has several. By default, the only
            floating-point input. The other inputs are not changed.

    Returns:
        A `kg.attacks.RobustnessReport` with the four arrays of distances, of shape `(batch,)`, and the quantities that
        they are computed from.

    Raises:
        ValueError: If an option, the examples or the labels are not valid. The message names the argument.

    Cost:
        For each example, `26 * steps * restarts` gradients for the attack and 5 more.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, use_bias=False)])
    >>> model.set_weights([np.array([[1.0, 0.0], [0.0, 1.0]], "float32")])  # class 0 where x[0] > x[1]
    >>> x = np.array([[0.75, 0.25], [1.0, 0.0]], "float32")
    >>> report = kg.attacks.robustness_report(model, x, [0, 0], verbose=0)
    >>> report.first_order.tolist()  # of a linear model, the distance itself
    [0.25, 0.5]
    >>> bool(np.allclose(report.attack, report.first_order, atol=1e-3))
    True

    Source: Finlay & Oberman, "Scaleable input gradient regularization for adversarial robustness" (arXiv:1905.11468,
    2019), section 3, for the bounds.
    """
    attack = PGD(0.0, norm, clip, None, steps, restarts, seed=seed)
    batch_size = validation.require_count(NAME, "batch_size", batch_size)
    validation.require_verbose(NAME, verbose)
    examples = require_examples(NAME, model, x, y, attack.clip, chosen_inputs.require_names(NAME, inputs))
    require_labels(NAME, model, examples)
    measure = _measure_batch(model, attack, _largest_strength(max_epsilon, attack, examples.x), examples)
    rows = map_batches(measure, examples.arrays, batch_size, verbose, NAME)
    margin, margin_slope, loss, loss_slope, largest_slope, curvature, found = (row.astype("float64") for row in rows)
    correct = margin > 0
    lipschitz, curvature = float(largest_slope.max()), max(float(curvature.max()), 0.0)
    left = np.where(correct, np.maximum(LEAST_LOSS_OF_AN_ERROR - loss, 0.0), 0.0)
    return RobustnessReport(
        correct=correct,
        margin=margin,
        loss=loss,
        first_order=_ratio(np.maximum(margin, 0.0), margin_slope),
        lipschitz_bound=_ratio(left, np.full_like(left, lipschitz)),
        # The formula of the docstring, rearranged so that it also holds for C = 0.
        curvature_bound=_ratio(2 * left, loss_slope + np.sqrt(loss_slope**2 + 2 * curvature * left)),
        attack=np.where(correct, found, 0.0),
        lipschitz=lipschitz,
        curvature=curvature,
        norm=attack.norm,
    )


def _ratio(numerator, denominator):
    """`numerator / denominator`, which is 0 for a numerator of 0, and otherwise infinite for a denominator of 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(numerator > 0, numerator / denominator, 0.0)


def _largest_strength(max_epsilon, attack, x):
    if max_epsilon is None:
        if attack.clip is None:
            raise ValueError(
                f"{NAME} expects `max_epsilon`, the largest strength that the attack tries, for data without a range. "
                "Received: max_epsilon=None and clip=None."
            )
        return extent(attack.clip, x, attack.norm)
    return validation.require_number(NAME, "max_epsilon", max_epsilon, above=0)


def _measure_batch(model, attack, most, examples):
    ascent = CompiledAscent(model, attack.norm, attack.clip, examples)
    # The sign flips the margin of `objectives`, which is that of the other classes over the label.
    margin_objective, loss_objective = Objective("margin", -1.0), Objective("cross_entropy", 1.0)
    seeds = seeds_from(attack.seed)

    def measure(x, y, *rest):
        x, y = ops.convert_to_tensor(x), ops.convert_to_tensor(y)
        ascent.carry(examples.carried(x, rest))
        margin, margin_slope, _ = ascent.slopes(margin_objective, x, y)
        loss, slope, direction = ascent.slopes(loss_objective, x, y)
        found = _distances(ascent, attack, x, y, most, seeds)
        largest_slope, curvature = slope, ops.zeros_like(slope)
        is_right = ops.convert_to_numpy(margin) > 0
        way = np.where(is_right, found, 0.0).clip(LEAST_WAY * most, most).astype("float32")
        for share in SAMPLED:
            h = ops.convert_to_tensor(share * way)
            moved = x + ops.cast(for_each(h, x) * direction, x.dtype)
            further, slope_there, _ = ascent.slopes(loss_objective, moved, y)
            largest_slope = ops.maximum(largest_slope, slope_there)
            curvature = ops.maximum(curvature, 2 * (further - loss - h * slope) / ops.square(h))
        measured = (margin, margin_slope, loss, slope, largest_slope, curvature)
        return [*map(ops.convert_to_numpy, measured), found]

    return measure


def _distances(ascent, attack, x, y, most, seeds):
    """The norm of the smallest perturbation found that makes the classifier err, or infinity if none was found."""
    safe, tried = np.zeros(len(x), "float32"), np.full(len(x), most, "float32")
    found = np.full(len(x), np.inf, "float32")
    with Progress(HALVINGS + 1, "attack", 0, "strength") as progress:
        for _ in range(HALVINGS + 1):
            epsilon = ops.cast(tried, x.dtype)
            perturbed, badness = attack.worst(ascent, x, y, epsilon, seeds)
            size = ops.convert_to_numpy(norm_balls.lengths(ops.cast(perturbed - x, "float32"), attack.norm))
            is_broken = ops.convert_to_numpy(badness) > 0
            found = np.where(is_broken, np.minimum(found, size), found)
            safe = np.where(is_broken, safe, np.maximum(safe, tried))
            tried = (safe + np.minimum(found, most)) / 2
            progress.update()
    return found
