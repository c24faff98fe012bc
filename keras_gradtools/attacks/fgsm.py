"""The fast gradient sign method."""

import functools
from typing import Literal

import keras

from keras_gradtools import validation
from keras_gradtools.annotations import Function, InputNames, Nested, Tensor, Verbose
from keras_gradtools.attacks.gradient_attack import GradientAttack


@keras.saving.register_keras_serializable(package="keras_gradtools")
class FGSM(GradientAttack):
    """The attack of `kg.attacks.fgsm` as an object, for `kg.models.AdversarialTraining` or repeated use.

    Args:
        epsilon, norm, clip, loss, targeted: As in `kg.attacks.fgsm`. A `loss` of None means `"cross_entropy"`.

    Raises:
        ValueError: If an option is not valid, or if there is more than one loss.

    Cost:
        One input gradient for each example.

    Example:

    >>> import keras_gradtools as kg
    >>> kg.attacks.FGSM(0.1).epsilon
    0.1

    Source: As for `kg.attacks.fgsm`.
    """

    def __init__(
        self,
        epsilon: float,
        norm: Literal["inf", 2] = "inf",
        clip: tuple[float, float] | None = (0.0, 1.0),
        loss: str | None = None,
        targeted: bool = False,
    ) -> None:
        super().__init__(epsilon, norm, clip, "cross_entropy" if loss is None else loss, targeted)
        if len(self.objectives) > 1:
            raise validation.refused(self.name, "one loss, as there is one step,", "loss", loss)

    def _attacker(self, ascent):
        return functools.partial(ascent.step, self.objectives[0])


def fgsm(
    model: Function,
    x: Nested,
    y: Nested,
    epsilon: float,
    *,
    norm: Literal["inf", 2] = "inf",
    clip: tuple[float, float] | None = (0.0, 1.0),
    loss: str | None = None,
    targeted: bool = False,
    batch_size: int = 128,
    verbose: Verbose = "auto",
    inputs: InputNames = None,
) -> Tensor:
    r"""Attacks a model with one gradient ascent step on its loss: the fast gradient sign method.

    $$x' = \text{clip}\bigl(x + \epsilon \, d\bigr), \qquad
      d = \operatorname{sign}(g) \text{ for norm inf}, \quad g / \lVert g \rVert_2 \text{ for norm 2},
      \qquad g = \frac{\partial \ell(x)}{\partial x}$$

    Args:
        model: A classifier that returns logits or probabilities of shape `(batch, classes)`. A single output is the
            logit of class 1, or its probability after a sigmoid. With your own `loss`, any model or function works.
            The model is called in inference mode and is not changed.
        x: Examples of shape `(batch, ...)`, an array or tensor of floating-point numbers within `clip`, or a nested
            structure of inputs as the model takes it.
        y: Classes of shape `(batch,)`, one-hot rows, or one class for all examples.
        epsilon: The largest perturbation of each example, measured by `norm`, in units of `x`.
        norm: The norm of the perturbation: `"inf"` (or `float("inf")`), its largest absolute element, or 2.
        clip: The range of the data as `(smallest, largest)`, numbers or arrays that broadcast to an example. None for
            no range.
        loss: The objective to increase: `"cross_entropy"` (the default), `"margin"` (the largest other logit minus that
            of the label), a Keras loss, or a function `(y, y_pred)` that returns one number for each example.
        targeted: Whether `y` holds the answers that the attack tries to produce. The loss is then decreased.
        batch_size: Number of examples per batch. It does not change the result.
        verbose: 1 for a progress bar, 0 for none, `"auto"` for one if it takes long.
        inputs: The name, key or position of the input to perturb if `x` has several. By default, the only
            floating-point input. The other inputs are not changed.

    Returns:
        The perturbed examples as a NumPy array of the shape of `x`, or in the nested structure of `x`.

    Raises:
        ValueError: If an option, the examples or the labels are not valid. The message names the argument.

    Cost:
        One input gradient for each example. It is compiled once for each model, loss, norm and batch shape, not for
        each `epsilon`.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, use_bias=False)])
    >>> model.set_weights([np.array([[1.0, 0.0], [0.0, 1.0]], "float32")])  # class 0 where x[0] > x[1]
    >>> x = kg.attacks.fgsm(model, np.array([[0.75, 0.5]], "float32"), [0], 0.25, verbose=0)
    >>> x.tolist()
    [[0.5, 0.75]]

    Source: Goodfellow, Shlens & Szegedy, "Explaining and harnessing adversarial examples" (arXiv:1412.6572, 2014).
    """
    return FGSM(epsilon, norm, clip, loss, targeted).generate(model, x, y, batch_size, verbose, inputs)
