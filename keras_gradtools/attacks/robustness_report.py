"""How far each example is from an error: by its gradient, by the bounds of a paper, and as an attack finds it."""

import dataclasses
import math

import numpy as np
from keras import ops

from keras_gradtools import chosen_inputs, validation
from keras_gradtools.attacks import norm_balls
from keras_gradtools.attacks.ascent import CompiledAscent
from keras_gradtools.attacks.batches import check_batching, check_labels, checked_examples, map_batches, seeds_from
from keras_gradtools.attacks.data_range import extent
from keras_gradtools.attacks.objectives import Objective
from keras_gradtools.attacks.pgd import PGD

NAME = "robustness_report"
# A classifier that errs gives the label a probability of 1/2 or less.
LEAST_LOSS_OF_AN_ERROR = math.log(2)
HALVINGS = 12
# Where on the way to the attacked example the loss and its slope are sampled.
SAMPLED = (0.25, 0.5, 1.0)
# The shortest of these ways, as a share of the largest strength: on a shorter one, a second difference is rounding.
LEAST_WAY = 1 / 128
LINES = {
    "first_order": "first order, margin / ||g||",
    "lipschitz_bound": "bound by the slope L",
    "curvature_bound": "bound by the curvature C",
    "attack": "found by the attack",
}


@dataclasses.dataclass(frozen=True, eq=False)
class RobustnessReport:
    """What `kg.attacks.robustness_report` returns: arrays of shape `(batch,)`, distances in units of the examples.

    `print` shows it as a table, `kg.plots.plot_robustness` as a figure.

    Args:
        correct: whether the classifier is right on each example; all distances are 0 where it is not.
        margin: by how much the score of the label exceeds the best other, in logits.
        loss: the cross-entropy of each example.
        first_order: margin over the dual norm of its gradient.
        lipschitz_bound: by the loss and the largest slope `lipschitz`.
        curvature_bound: by the loss, its slope at the example and the largest curvature `curvature`.
        attack: the size of the smallest perturbation that an attack found; infinite where it found none.
        lipschitz: the largest slope of the loss that was met, L.
        curvature: the largest curvature of the loss that was met, C; 0 or more.
        norm: the norm of the perturbations, `"inf"` or 2.
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

    def __str__(self):
        count, right = len(self.correct), self.correct
        norm = "l-infinity" if self.norm == "inf" else "l2"
        lines = [
            f"{count} examples, {right.mean():.1%} of them classified correctly; their {norm} distances to an error:",
            f"{'':28}{'10%':>9}{'median':>9}{'90%':>9}   at most the attack's",
        ]
        for name, title in LINES.items():
            distances = getattr(self, name)[right]
            shown = "".join(f"{q:9.4g}" for q in _quantiles(distances))
            share = (
                "" if name == "attack" else f"{np.mean(distances <= self.attack[right]):17.1%}" if right.any() else ""
            )
            lines.append(f"{title:28}{shown}{share}")
        lines.append(
            f"L = {self.lipschitz:.4g} and C = {self.curvature:.4g} are the largest that were sampled: "
            "estimates, as all above."
        )
        return "\n".join(lines)


def _quantiles(distances):
    if not len(distances):
        return [math.nan] * 3
    return np.quantile(distances, [0.1, 0.5, 0.9], method="lower")


def robustness_report(
    model,
    x,
    y,
    *,
    norm="inf",
    clip=(0.0, 1.0),
    max_epsilon=None,
    steps=20,
    restarts=1,
    seed=0,
    batch_size=128,
    verbose="auto",
    inputs=None,
):
    r"""Estimates in four ways how far each example can be moved before a classifier errs.

    With the margin $m$ (the logit of the label minus the best other), the cross-entropy $\ell$, its smallest value of
    an error $\ell_0 = \log 2$, and $\lVert \cdot \rVert_*$ the norm dual to that of the perturbation (1 for inf, 2 for
    2):

    - to first order, $m / \lVert \nabla m \rVert_*$;
    - by the slope, $(\ell_0 - \ell) / L$, $\; L = \max \lVert \nabla \ell \rVert_*$;
    - by the curvature,
      $\bigl(-\lVert \nabla \ell \rVert_* + \sqrt{\lVert \nabla \ell \rVert_*^2 + 2 C (\ell_0 - \ell)}\bigr) / C$,
      $\; C = \max \, 2 \, (\ell(x + h d) - \ell(x) - h \lVert \nabla \ell \rVert_*) / h^2$, along the steepest
      direction $d$;
    - as the size of the smallest perturbation that PGD finds, by halving the interval in which its strength must lie.

    The second and the third would be lower bounds if L and C held everywhere. They are the largest that were met, over
    all examples, in the steepest direction up to the distance of the attack: estimates, which promise nothing. The
    attack's distance is an upper bound of the true one.

    Args:
        model: a classifier that returns logits or probabilities, as in `kg.attacks.fgsm`. It is called in inference
            mode, and nothing of it changes.
        x: examples of shape `(batch, ...)`, floating-point numbers within `clip`.
        y: classes of shape `(batch,)`, or one-hot rows.
        norm: `"inf"` or 2, the norm of the perturbations.
        clip: the range of the data, `(smallest, largest)`, or None for none.
        max_epsilon: the strength up to which the attack looks, in units of `x`; the extent of the range by default.
        steps: those of PGD, which runs on the cross-entropy and on the margin.
        restarts: the runs of PGD on each.
        seed: an integer, for the random starts: two calls draw the same. None draws anew.
        batch_size: how many examples go together.
        verbose: 1 or `"auto"` for a progress bar, 0 for none.
        inputs: the name (key, or position) of the input to perturb, where `x` has several; the only floating-point one
            by default. The others stay as they are.

    Returns:
        A `kg.attacks.RobustnessReport`: four arrays of distances of shape `(batch,)`, and what they are made of.

    Raises:
        ValueError: for options, examples or labels that do not fit; each is named.

    Cost:
        For each example `26 * steps * restarts` gradients of the attack, and 5 more.

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
    check_batching(NAME, batch_size, verbose)
    examples = checked_examples(NAME, model, x, y, attack.clip, chosen_inputs.checked_choice(NAME, inputs))
    check_labels(NAME, model, examples)
    measure = _measure_batch(model, attack, _checked_most(max_epsilon, attack, examples.x), examples)
    rows = map_batches(measure, examples.arrays, batch_size, verbose, "batch")
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
        # The formula above, in the form that is good for C = 0, too.
        curvature_bound=_ratio(2 * left, loss_slope + np.sqrt(loss_slope**2 + 2 * curvature * left)),
        attack=np.where(correct, found, 0.0),
        lipschitz=lipschitz,
        curvature=curvature,
        norm=attack.norm,
    )


def _ratio(numerator, denominator):
    """0 over anything is 0; what nothing changes is infinitely far."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(numerator > 0, numerator / denominator, 0.0)


def _checked_most(max_epsilon, attack, x):
    if max_epsilon is None:
        if attack.clip is None:
            raise ValueError(
                f"{NAME} expects `max_epsilon`, the strength up to which the attack looks, for data without a range. "
                "Received: max_epsilon=None and clip=None."
            )
        return extent(attack.clip, x, attack.norm)
    if not validation.is_number(max_epsilon) or not 0 < max_epsilon < math.inf:
        raise ValueError(
            f"{NAME} expects a positive number as `max_epsilon`. Received: "
            f"max_epsilon={validation.describe(max_epsilon)}."
        )
    return float(max_epsilon)


def _measure_batch(model, attack, most, examples):
    ascent = CompiledAscent(model, attack.norm, attack.clip, examples)
    # A margin is that of another class over the label; what is reported is the other way round.
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
            moved = x + ops.cast(norm_balls.for_each(h, x) * direction, x.dtype)
            further, slope_there, _ = ascent.slopes(loss_objective, moved, y)
            largest_slope = ops.maximum(largest_slope, slope_there)
            curvature = ops.maximum(curvature, 2 * (further - loss - h * slope) / ops.square(h))
        measured = (margin, margin_slope, loss, slope, largest_slope, curvature)
        return [*map(ops.convert_to_numpy, measured), found]

    return measure


def _distances(ascent, attack, x, y, most, seeds):
    """The size of the smallest perturbation that makes the classifier err; infinite where none was found."""
    safe, tried = np.zeros(len(x), "float32"), np.full(len(x), most, "float32")
    found = np.full(len(x), np.inf, "float32")
    for _ in range(HALVINGS + 1):
        epsilon = ops.cast(tried, x.dtype)
        perturbed, badness = attack.worst(ascent, x, y, epsilon, seeds)
        size = ops.convert_to_numpy(norm_balls.lengths(ops.cast(perturbed - x, "float32"), attack.norm))
        is_broken = ops.convert_to_numpy(badness) > 0
        found = np.where(is_broken, np.minimum(found, size), found)
        safe = np.where(is_broken, safe, np.maximum(safe, tried))
        tried = (safe + np.minimum(found, most)) / 2
    return found
