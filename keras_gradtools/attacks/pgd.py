"""Projected gradient ascent."""

import keras
from keras import ops

from keras_gradtools import validation
from keras_gradtools.attacks import norm_balls
from keras_gradtools.attacks.batches import seeds_from
from keras_gradtools.attacks.gradient_attack import GradientAttack
from keras_gradtools.attacks.objectives import NAMED


@keras.saving.register_keras_serializable(package="keras_gradtools")
class PGD(GradientAttack):
    """The attack of `kg.attacks.pgd` as an object, for `kg.models.AdversarialTraining` and for many calls.

    In training it is one run from a random start on the first of the losses, whose end is trained on.

    Args:
        epsilon, norm, clip, loss, steps, restarts, step_size, random_start, targeted, seed: as in `kg.attacks.pgd`.

    Example:

    >>> import keras_gradtools as kg
    >>> kg.attacks.PGD(0.1, steps=7).steps
    7
    """

    def __init__(
        self,
        epsilon,
        norm="inf",
        clip=(0.0, 1.0),
        loss=None,
        steps=20,
        restarts=1,
        step_size=None,
        random_start=True,
        targeted=False,
        seed=None,
    ):
        super().__init__(epsilon, norm, clip, NAMED if loss is None else loss, targeted)
        self.steps = self._checked_count("steps", steps)
        self.restarts = self._checked_count("restarts", restarts)
        self.step_size = None if step_size is None else self._checked_number("step_size", step_size)
        if not isinstance(random_start, bool):
            raise self._refused("random_start", "True or False", random_start)
        self.random_start = random_start
        validation.require_seed(self.name, seed, may_be_none=True)
        self.seed = None if seed is None else int(seed)

    @property
    def rate(self):
        if self.step_size is None:
            return 2.5 / self.steps
        return self.step_size / self.epsilon if self.epsilon else 0.0

    def _attacker(self, ascent):
        seeds = seeds_from(self.seed)
        return lambda x, y, epsilon: self.worst(ascent, x, y, epsilon, seeds)[0]

    def worst(self, ascent, x, y, epsilon, seeds):
        """The worst examples, and how bad they are: above 0 where a classifier errs (or answers as it is meant to)."""
        runs = []
        for _ in range(self.restarts):
            for objective in self.objectives:
                start = ops.zeros_like(x)
                if self.random_start:
                    start = norm_balls.random_points(x, epsilon, self.norm, seeds.randrange(2**31))
                runs.append((objective, start))
        return ascent.worst(runs, x, y, epsilon, self.steps, self.rate)

    def get_config(self):
        return {
            **super().get_config(),
            "steps": self.steps,
            "restarts": self.restarts,
            "step_size": self.step_size,
            "random_start": self.random_start,
            "seed": self.seed,
        }


def pgd(
    model,
    x,
    y,
    epsilon,
    *,
    norm="inf",
    clip=(0.0, 1.0),
    loss=None,
    steps=20,
    restarts=1,
    step_size=None,
    random_start=True,
    targeted=False,
    seed=None,
    batch_size=128,
    verbose="auto",
    inputs=None,
):
    r"""Attacks a model by projected gradient ascent of its loss, and returns the worst that it meets.

    $$x_{t+1} = \text{clip}\bigl(x + \Pi_\epsilon(x_t + \alpha \, d_t - x)\bigr), \qquad
      d_t = \operatorname{sign}(g_t) \text{ for norm inf}, \quad g_t / \lVert g_t \rVert_2 \text{ for norm 2}$$

    where $g_t$ is the gradient of the loss at $x_t$, $\Pi_\epsilon$ the projection onto the ball of radius $\epsilon$,
    and $x_0$ a random point of it. With the default loss every restart is run on the cross-entropy and on the margin;
    of all points on the way, and `x` itself, the one that errs by the largest margin is returned: no example that the
    attack has broken is lost.

    Args:
        model: a classifier, or with a `loss` of your own any model or function, as in `kg.attacks.fgsm`.
        x: examples of shape `(batch, ...)`, floating-point numbers within `clip`; or a nesting of them, as the model
            takes it.
        y: classes of shape `(batch,)`, or one-hot rows; one class for all, if you like.
        epsilon: how far each example may be moved, in units of `x`.
        norm: `"inf"` (or `float("inf")`: the largest change of a pixel) or 2.
        clip: the range of the data, `(smallest, largest)`, numbers or arrays that broadcast to an example; None for no
            range.
        loss: what is made large: `"cross_entropy"`, `"margin"` (the best other logit minus that of the label, whose
            gradient does not vanish where the model is sure), by default both; a Keras loss, or a function
            `(y, y_pred)` that returns one number for each example.
        steps: how many steps of each run.
        restarts: how many runs on each loss.
        step_size: $\alpha$, in units of `x`; $2.5 \, \epsilon / \text{steps}$ by default.
        random_start: whether runs begin at a random point of the ball, not at `x`.
        seed: an integer that makes the random starts repeat. Without one they come from Python's generator, as
            elsewhere in Keras. Different backends draw different points.
        targeted: whether `y` is what the model shall answer; the loss is made small then.
        batch_size: how many examples go together; with random starts, they are others for another size.
        verbose: 1 or `"auto"` for a progress bar, 0 for none.
        inputs: the name (key, or position) of the input to perturb, where `x` has several; the only floating-point one
            by default. The others stay as they are.

    Returns:
        The perturbed examples, a NumPy array like `x`, or nested as `x` is.

    Raises:
        ValueError: for options, examples or labels that do not fit; each is named.

    Cost:
        `steps * restarts` gradients by the input for each example and loss, and one forward pass for each run, in
        programs that are compiled once for each model, loss, norm and shape of the batch (not for each epsilon).

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
