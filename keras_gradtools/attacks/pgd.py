"""Projected gradient ascent on the loss, known as the PGD attack."""

from collections.abc import Sequence
from typing import Any, Literal

import keras
from keras import ops

from keras_gradtools import validation
from keras_gradtools.annotations import Function, InputNames, Nested, Tensor, Verbose
from keras_gradtools.attacks import norm_balls
from keras_gradtools.attacks.batches import seeds_from
from keras_gradtools.attacks.gradient_attack import GradientAttack
from keras_gradtools.attacks.objectives import NAMED


@keras.saving.register_keras_serializable(package="keras_gradtools")
class PGD(GradientAttack):
    """The attack of `kg.attacks.pgd` as an object, for `kg.models.AdversarialTraining` or repeated use.

    In training, it makes one run on the first of the losses, from a random start if `random_start`, and trains on the
    end points of that run.

    Args:
        epsilon, norm, clip, loss, steps, restarts, step_size, random_start, targeted, seed: As in `kg.attacks.pgd`.

    Raises:
        ValueError: If an option is not valid.

    Cost:
        In training, `steps` input gradients for each example. Otherwise as for `kg.attacks.pgd`.

    Example:

    >>> import keras_gradtools as kg
    >>> kg.attacks.PGD(0.1, steps=7).steps
    7

    Source: As for `kg.attacks.pgd`.
    """

    def __init__(
        self,
        epsilon: float,
        norm: Literal["inf", 2] = "inf",
        clip: tuple[float, float] | None = (0.0, 1.0),
        loss: str | Sequence[str] | None = None,
        steps: int = 20,
        restarts: int = 1,
        step_size: float | None = None,
        random_start: bool = True,
        targeted: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(epsilon, norm, clip, NAMED if loss is None else loss, targeted)
        self.steps = validation.require_count(self.name, "steps", steps)
        self.restarts = validation.require_count(self.name, "restarts", restarts)
        self.step_size = validation.require_number(self.name, "step_size", step_size, least=0, may_be_none=True)
        self.random_start = validation.require_flag(self.name, "random_start", random_start)
        self.seed = validation.require_seed(self.name, seed, may_be_none=True)

    @property
    def rate(self) -> float:
        if self.step_size is None:
            return 2.5 / self.steps
        return self.step_size / self.epsilon if self.epsilon else 0.0

    def _attacker(self, ascent):
        seeds = seeds_from(self.seed)
        return lambda x, y, epsilon: self.worst(ascent, x, y, epsilon, seeds)[0]

    def worst(self, ascent: Any, x: Any, y: Any, epsilon: Any, seeds: Any) -> Any:
        """The worst examples found and their badness, which is positive where an attack on a classifier succeeded."""
        runs = []
        for _ in range(self.restarts):
            for objective in self.objectives:
                start = ops.zeros_like(x)
                if self.random_start:
                    start = norm_balls.random_points(x, epsilon, self.norm, seeds.randrange(2**31))
                runs.append((objective, start))
        return ascent.worst(runs, x, y, epsilon, self.steps, self.rate)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "steps": self.steps,
            "restarts": self.restarts,
            "step_size": self.step_size,
            "random_start": self.random_start,
            "seed": self.seed,
        }


def pgd(
    model: Function,
    x: Nested,
    y: Nested,
    epsilon: float,
    *,
    norm: Literal["inf", 2] = "inf",
    clip: tuple[float, float] | None = (0.0, 1.0),
    loss: str | Sequence[str] | None = None,
    steps: int = 20,
    restarts: int = 1,
    step_size: float | None = None,
    random_start: bool = True,
    targeted: bool = False,
    seed: int | None = None,
    batch_size: int = 128,
    verbose: Verbose = "auto",
    inputs: InputNames = None,
) -> Tensor:
    r"""Attacks a model by projected gradient ascent on its loss, and returns the worst examples that it finds.

    $$x_{t+1} = \text{clip}\bigl(x + \Pi_\epsilon(x_t + \alpha \, d_t - x)\bigr), \qquad
      d_t = \operatorname{sign}(g_t) \text{ for norm inf}, \quad g_t / \lVert g_t \rVert_2 \text{ for norm 2}$$

    where $g_t$ is the gradient of the loss at $x_t$, $\Pi_\epsilon$ the projection onto the ball of radius $\epsilon$,
    and $x_0$ a random point of the ball around $x$. With the default loss, every restart runs once on the cross-entropy
    and once on the margin. Of all points visited, `x` included, the one that errs by the largest margin is returned, so
    that no successful perturbation is lost.

    Args:
        model: A classifier as in `kg.attacks.fgsm`. With your own `loss`, any model or function works.
        x: Examples of shape `(batch, ...)`, floating-point numbers within `clip`, or a nested structure of inputs as
            the model takes it.
        y: Classes of shape `(batch,)`, one-hot rows, or one class for all examples.
        epsilon: The largest perturbation of each example, measured by `norm`, in units of `x`.
        norm: The norm of the perturbation: `"inf"` (or `float("inf")`), its largest absolute element, or 2.
        clip: The range of the data as `(smallest, largest)`, numbers or arrays that broadcast to an example. None for
            no range.
        loss: The objective to increase: `"cross_entropy"`, `"margin"` (the largest other logit minus that of the label,
            whose gradient does not vanish for confident models), a Keras loss, or a function `(y, y_pred)` that returns
            one number for each example. By default, `"cross_entropy"` and `"margin"`.
        steps: Number of steps of each run.
        restarts: Number of runs on each loss.
        step_size: $\alpha$, in units of `x`. The default is $2.5 \, \epsilon / \text{steps}$.
        random_start: Whether runs begin at a random point of the ball instead of at `x`.
        seed: An integer that makes the random starts reproducible. Without one, they are seeded from Python's global
            generator, as elsewhere in Keras. Different backends draw different points.
        targeted: Whether `y` holds the answers that the attack tries to produce. The loss is then decreased.
        batch_size: Number of examples per batch. With random starts, the result depends on it.
        verbose: 1 for a progress bar, 0 for none, `"auto"` for one if it takes long.
        inputs: The name, key or position of the input to perturb if `x` has several. By default, the only
            floating-point input. The other inputs are not changed.

    Returns:
        The perturbed examples as a NumPy array of the shape of `x`, or in the nested structure of `x`.

    Raises:
        ValueError: If an option, the examples or the labels are not valid. The message names the argument.

    Cost:
        For each example and loss, `steps * restarts` input gradients and `restarts` forward passes, and one more
        forward pass for each example. The steps are compiled once for each model, loss, norm and batch shape, not for
        each `epsilon`.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, use_bias=False)])
    >>> model.set_weights([np.array([[1.0, 0.0], [0.0, 1.0]], "float32")])  # class 0 where x[0] > x[1]
    >>> x = kg.attacks.pgd(model, np.array([[0.75, 0.5]], "float32"), [0], 0.25, verbose=0)
    >>> x.tolist()
    [[0.5, 0.75]]

    Source: Madry et al., "Towards deep learning models resistant to adversarial attacks" (arXiv:1706.06083, 2017),
    equation 2.2; the margin: Carlini & Wagner, "Towards evaluating the robustness of neural networks"
    (arXiv:1608.04644, 2016).
    """
    attack = PGD(epsilon, norm, clip, loss, steps, restarts, step_size, random_start, targeted, seed)
    return attack.generate(model, x, y, batch_size, verbose, inputs)
