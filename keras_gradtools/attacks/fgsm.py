"""The fast gradient sign method."""

import functools

import keras

from keras_gradtools.attacks.gradient_attack import GradientAttack


@keras.saving.register_keras_serializable(package="keras_gradtools")
class FGSM(GradientAttack):
    """The attack of `kg.attacks.fgsm` as an object, for `kg.models.AdversarialTraining` and for many calls.

    Args:
        epsilon, norm, clip, loss, targeted: as in `kg.attacks.fgsm`; a loss of None is `"cross_entropy"`.

    Example:

    >>> import keras_gradtools as kg
    >>> kg.attacks.FGSM(0.1).epsilon
    0.1
    """

    def __init__(self, epsilon, norm="inf", clip=(0.0, 1.0), loss=None, targeted=False):
        super().__init__(epsilon, norm, clip, "cross_entropy" if loss is None else loss, targeted)
        if len(self.objectives) > 1:
            raise self._refused("loss", "one loss, as there is one step,", loss)

    def _attacker(self, ascent):
        return functools.partial(ascent.step, self.objectives[0])


def fgsm(
    model,
    x,
    y,
    epsilon,
    *,
    norm="inf",
    clip=(0.0, 1.0),
    loss=None,
    targeted=False,
    batch_size=128,
    verbose="auto",
    inputs=None,
):
    r"""Attacks a model with one step up the gradient of its loss, the fast gradient sign method.

    $$x' = \text{clip}\bigl(x + \epsilon \, d\bigr), \qquad
      d = \operatorname{sign}(g) \text{ for norm inf}, \quad g / \lVert g \rVert_2 \text{ for norm 2},
      \qquad g = \frac{\partial \ell(x)}{\partial x}$$

    Args:
        model: a classifier, which returns logits or probabilities of shape `(batch, classes)` (or one logit, of class
            1; after a sigmoid, its probability); with a `loss` of your own, any model or function. It is
            called in inference mode, and nothing of it changes.
        x: examples of shape `(batch, ...)`, an array or a tensor of floating-point numbers within `clip`; or a nesting
            of them, as the model takes it.
        y: classes of shape `(batch,)`, or one-hot rows; one class for all, if you like.
        epsilon: how far each example may be moved, in units of `x`.
        norm: `"inf"` (or `float("inf")`: the largest change of a pixel) or 2.
        clip: the range of the data, `(smallest, largest)`, numbers or arrays that broadcast to an example; None for no
            range.
        loss: what is made large: `"cross_entropy"` (the default), `"margin"` (the best other logit minus that of the
            label), a Keras loss, or a function `(y, y_pred)` that returns one number for each example.
        targeted: whether `y` is what the model shall answer; the loss is made small then.
        batch_size: how many examples go together. It does not change the result.
        verbose: 1 or `"auto"` for a progress bar, 0 for none.
        inputs: the name (key, or position) of the input to perturb, where `x` has several; the only floating-point one
            by default. The others stay as they are.

    Returns:
        The perturbed examples, a NumPy array like `x`, or nested as `x` is.

    Raises:
        ValueError: for options, examples or labels that do not fit; each is named.

    Cost:
        One gradient by the input for each example, in a program that is compiled once for each model, loss, norm and
        shape of the batch (not for each epsilon).

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
