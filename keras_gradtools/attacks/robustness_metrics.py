"""Accuracy under attack and gradient norms of a classifier, as numbers to log."""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from keras import ops

from keras_gradtools import chosen_inputs, validation
from keras_gradtools.annotations import Function, InputNames, Nested, Verbose
from keras_gradtools.attacks import norm_balls
from keras_gradtools.attacks.ascent import CompiledAscent
from keras_gradtools.attacks.batches import first_outputs, map_batches, require_examples, require_labels, seeds_from
from keras_gradtools.attacks.data_range import bounds, extent
from keras_gradtools.attacks.masked_gradients import signs_of_masking
from keras_gradtools.attacks.objectives import Objective
from keras_gradtools.attacks.pgd import PGD
from keras_gradtools.display.progress import Progress
from keras_gradtools.example_norms import for_each
from keras_gradtools.transforms import batch_jacobian

DRAWS_OF_NOISE = 10
# Without `clip`, the attack that may replace the whole example has this multiple of the largest strength.
HUGE = 10.0


class RobustnessMetrics:
    """The measurement of `kg.attacks.robustness_metrics` with fixed options, for many models or epochs.

    That function documents the options.
    """

    def __init__(
        self,
        epsilons,
        norm="inf",
        clip=(0.0, 1.0),
        steps=20,
        restarts=1,
        jacobian=True,
        seed=0,
        batch_size=128,
        owner="robustness_metrics",
        inputs=None,
    ):
        self._owner, self._inputs = owner, chosen_inputs.require_names(owner, inputs)
        self._epsilons = _require_epsilons(owner, epsilons)
        self._batch_size = validation.require_count(owner, "batch_size", batch_size)
        self._has_jacobian = validation.require_flag(owner, "jacobian", jacobian)
        self._pgd = PGD(0.0, norm, clip, None, steps, restarts, seed=seed)

    def require_examples(self, model, x, y):
        """Returns the `Examples`, and raises `ValueError` if they or the model do not fit."""
        examples = require_examples(self._owner, model, x, y, self._pgd.clip, self._inputs)
        require_labels(self._owner, model, examples)
        return examples

    def measure(self, model, x, y, verbose=0):
        """A dict of the metrics, and a list of sentences, one for each sign of gradient masking."""
        validation.require_verbose(self._owner, verbose)
        examples = self.require_examples(model, x, y)
        measure_batch = self._measure_batch(model, [*self._epsilons, self._huge(examples.x)], examples)
        rows = map_batches(measure_batch, examples.arrays, self._batch_size, verbose, self._owner)
        clean, lengths, squares, *by_strength = rows
        *attacked, _, huge, _ = [float((badness < 0).mean()) for badness in by_strength]
        fgsm, pgd, noise = (dict(zip(self._epsilons, attacked[i::3], strict=True)) for i in range(3))
        metrics = {"clean_accuracy": float((clean < 0).mean())}
        for kind, accuracies in (("fgsm", fgsm), ("pgd", pgd), ("noise", noise)):
            metrics |= {f"{kind}_{e:g}_accuracy": accuracies[e] for e in self._epsilons}
        metrics |= {
            "gradient_norm_mean": float(lengths.mean()),
            "gradient_norm_median": float(np.median(lengths)),
            "gradient_norm_max": float(lengths.max()),
            "gradient_zero_share": float((lengths == 0).mean()),
        }
        if self._has_jacobian:
            metrics["jacobian_norm"] = math.sqrt(squares.mean())
        signs = signs_of_masking(pgd, fgsm, noise, huge, self._chance(model, examples))
        return metrics | {"masked_gradients": float(len(signs))}, signs

    def _measure_batch(self, model, strengths, examples):
        ascent = CompiledAscent(model, self._pgd.norm, self._pgd.clip, examples)
        objective = Objective("cross_entropy", 1.0)
        seeds = seeds_from(self._pgd.seed)
        names = None if examples.chosen is None else examples.chosen.positions
        jacobian = batch_jacobian(model, inputs=names) if self._has_jacobian else None

        def measure(x, y, *rest):
            x, y = ops.convert_to_tensor(x), ops.convert_to_tensor(y)
            inputs = examples.carried(x, rest)
            ascent.carry(inputs)
            lengths, clean = ascent.gradient_lengths(objective, x, y)
            squares = ops.zeros_like(lengths)
            if jacobian is not None:
                block = jacobian(x if inputs is None else inputs)
                if inputs is not None:
                    (block,) = examples.chosen.parts(block)
                squares = ops.sum(ops.square(ops.cast(block, lengths.dtype)), axis=tuple(range(1, len(x.shape) + 1)))
            results = [clean, lengths, squares]
            with Progress(len(strengths), "attacks", 0, "strength") as progress:
                for strength in strengths:
                    epsilon = ops.full((len(x),), strength, dtype=x.dtype)
                    one_step = ascent.badness(objective, ascent.step(objective, x, y, epsilon), y)
                    results += [one_step, self._pgd.worst(ascent, x, y, epsilon, seeds)[1]]
                    results += [self._noisy(ascent, objective, x, y, epsilon, seeds)]
                    progress.update()
            return [ops.convert_to_numpy(result) for result in results]

        return measure

    def _noisy(self, ascent, objective, x, y, epsilon, seeds):
        """The largest badness over several random perturbations of norm `epsilon`."""
        norm = self._pgd.norm
        low, high = bounds(self._pgd.clip, x.dtype)
        worst = None
        for _ in range(DRAWS_OF_NOISE):
            drawn = norm_balls.random_points(x, epsilon, norm, seeds.randrange(2**31))
            noise = for_each(epsilon, x) * norm_balls.steepest(drawn, norm)
            badness = ascent.badness(objective, ops.clip(x + noise, low, high), y)
            worst = badness if worst is None else ops.maximum(worst, badness)
        return worst

    def _huge(self, x):
        clip = self._pgd.clip
        return HUGE * max(self._epsilons) if clip is None else extent(clip, x, self._pgd.norm)

    def _chance(self, model, examples):
        return 1.0 / max(first_outputs(model, examples).shape[-1], 2)


def robustness_metrics(
    model: Function,
    x: Nested,
    y: Nested,
    epsilons: Sequence[float] = (0.1,),
    *,
    norm: Literal["inf", 2] = "inf",
    clip: tuple[float, float] | None = (0.0, 1.0),
    steps: int = 20,
    restarts: int = 1,
    jacobian: bool = True,
    seed: int = 0,
    batch_size: int = 128,
    verbose: Verbose = "auto",
    inputs: InputNames = None,
) -> dict[str, float]:
    r"""Measures the accuracy of a classifier under attack and its gradient norms, and looks for gradient masking.

    With $\ell_i$ the cross-entropy of example $i$ and $z_i$ the outputs of the model, the gradient norms are
    $\lVert \partial \ell_i / \partial x_i \rVert_2$, and the norm of the Jacobian over all examples is

    $$\sqrt{\tfrac1N \textstyle\sum_i \lVert \partial z_i / \partial x_i \rVert_F^2}.$$

    A model masks its gradients if they do not lead to its errors. Gradient attacks then fail, although the model is not
    robust. There are three signs. In each, the accuracy under PGD is too high by more than one percentage point:

    - It exceeds the accuracy under FGSM of the same strength.
    - It exceeds the accuracy under random noise of the same strength.
    - It exceeds the accuracy of guessing, although PGD has a strength that may replace the example by any other.

    Args:
        model: A classifier that returns logits or probabilities, as in `kg.attacks.fgsm`. It is called in inference
            mode and is not changed.
        x: Examples of shape `(batch, ...)`, floating-point numbers within `clip`. Use examples that the model was not
            trained on.
        y: Classes of shape `(batch,)`, or one-hot rows.
        epsilons: The strengths of the attacks, in units of `x`.
        norm: The norm that measures the strength: `"inf"` or 2.
        clip: The range of the data, `(smallest, largest)`, or None for no range.
        steps: Number of steps of each PGD run. PGD runs on the cross-entropy and on the margin.
        restarts: Number of PGD runs on each of the two.
        jacobian: Whether to measure the Jacobian of the outputs, which costs one gradient for each class and example.
        seed: An integer that makes the random starts and the noise reproducible, or None.
        batch_size: Number of examples per batch.
        verbose: 1 for a progress bar, 0 for none, `"auto"` for one if it takes long.
        inputs: The name, key or position of the input to perturb if `x` has several. By default, the only
            floating-point input. The other inputs are not changed.

    Returns:
        A dict of numbers: `clean_accuracy`; the accuracies under `fgsm`, `pgd` and `noise` for each strength, named as
        in `pgd_0.1_accuracy`, where `noise` is the worst of ten random perturbations of norm `epsilon`;
        `gradient_norm_mean`, `gradient_norm_median`, `gradient_norm_max`, and `gradient_zero_share`, the fraction of
        gradients that are exactly zero; `jacobian_norm`, if `jacobian`; and `masked_gradients`, the number of signs
        found.

    Raises:
        ValueError: If an option, the examples or the labels are not valid. The message names the argument.

    Cost:
        For each example and strength, `2 * steps * restarts + 1` gradients and `2 * restarts + 12` forward passes. The
        comparison with guessing counts as one more strength. In addition, one gradient for each example, and with
        `jacobian` one more for each output.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, use_bias=False)])
    >>> model.set_weights([np.array([[1.0, 0.0], [0.0, 1.0]], "float32")])  # class 0 where x[0] > x[1]
    >>> x = np.array([[0.75, 0.5], [1.0, 0.0]], "float32")
    >>> metrics = kg.attacks.robustness_metrics(model, x, [0, 0], epsilons=(0.25,), verbose=0)
    >>> metrics["clean_accuracy"], metrics["pgd_0.25_accuracy"], metrics["masked_gradients"]
    (1.0, 0.5, 0.0)

    Source: for the signs, Athalye, Carlini & Wagner, "Obfuscated gradients give a false sense of security"
    (arXiv:1802.00420, 2018), section 3.1, and Carlini et al., "On evaluating adversarial robustness"
    (arXiv:1902.06705, 2019).
    """
    metrics = RobustnessMetrics(epsilons, norm, clip, steps, restarts, jacobian, seed, batch_size, inputs=inputs)
    return metrics.measure(model, x, y, verbose)[0]


def _require_epsilons(owner, epsilons):
    numbers_given = list(epsilons) if isinstance(epsilons, (list, tuple, np.ndarray)) else [epsilons]
    is_right = numbers_given and all(validation.is_number(e) and 0 < e < math.inf for e in numbers_given)
    if not is_right or len({f"{e:g}" for e in numbers_given}) < len(numbers_given):
        raise validation.refused(
            owner, "a list of different positive numbers", "epsilons", epsilons, "These are strengths of the attacks."
        )
    return [float(e) for e in numbers_given]
