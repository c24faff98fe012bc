"""The distributions whose negative log-likelihood is a Keras loss."""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_gradtools import validation
from keras_gradtools.keras_state.example_losses import arguments_of

_CATEGORICAL = ("SparseCategoricalCrossentropy", "CategoricalCrossentropy")
_BERNOULLI = ("BinaryCrossentropy",)
_GAUSSIAN = ("MeanSquaredError",)
NAMES = (*_CATEGORICAL, *_BERNOULLI, *_GAUSSIAN)
# Keras raises smaller probabilities to this before it takes their logarithms.
_SMALLEST = 1e-7


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """A distribution of the labels, given the outputs of a model.

    Attributes:
        sampled: A function of the logits (of the outputs, if Gaussian) and a seed that draws labels.
        scores: A function of these labels and the logits that returns the gradient of each element's loss with respect
            to its logits.
        logits_of: A function from the model's outputs to logits. None if the loss takes the outputs as they are.
        loss_of_logits: The loss as a function of the logits.
        is_as_given: Whether `loss_of_logits` is the given loss itself.
    """

    sampled: Callable
    scores: Callable
    logits_of: Callable | None
    loss_of_logits: Any
    is_as_given: bool


def likelihood_of(loss):
    """The likelihood whose negative logarithm is `loss`, given as in `compile`. None if it is not known here."""
    loss = _as_loss(loss)
    name = type(loss).__name__
    if name not in NAMES or type(loss) is not getattr(keras.losses, name):
        return None
    if name in _GAUSSIAN:
        return Likelihood(_sample_gaussian, _gaussian_scores, None, loss, is_as_given=True)
    # `get_config` of some losses lacks the axis.
    options = arguments_of(loss)
    if options.get("axis", -1) != -1 or options.get("ignore_class") is not None:
        return None
    is_as_given = options["from_logits"] and not options.get("label_smoothing", 0)
    plain = {**options, "from_logits": True} | ({"label_smoothing": 0.0} if "label_smoothing" in options else {})
    of_logits = loss if is_as_given else type(loss)(**plain, reduction=loss.reduction, dtype=loss.dtype)
    is_bernoulli = name in _BERNOULLI
    logits_of = None if options["from_logits"] else _log_odds if is_bernoulli else _log_probabilities
    if is_bernoulli:
        return Likelihood(_sample_bernoulli, _bernoulli_scores, logits_of, of_logits, is_as_given)
    is_sparse = name == "SparseCategoricalCrossentropy"
    sampled = _sample_class if is_sparse else _sample_one_hot
    scores = _class_scores if is_sparse else _one_hot_scores
    return Likelihood(sampled, scores, logits_of, of_logits, is_as_given)


def _as_loss(loss):
    """The loss as a `keras.Loss` if it is a name, class or function that Keras has a loss for. Else unchanged."""
    if isinstance(loss, (list, tuple)) and len(loss) == 1:
        (loss,) = loss
    if isinstance(loss, str) and loss not in validation.LOSSES_BY_THE_LABELS:
        loss = keras.losses.get(loss)
    for name in NAMES:
        cls = getattr(keras.losses, name)
        if loss is cls:
            return cls()
        if not isinstance(loss, keras.Loss) and callable(loss) and getattr(cls(), "fn", None) is loss:
            return cls()
    return loss


def _log_probabilities(p):
    return ops.log(ops.clip(p, _SMALLEST, 1.0))


def _log_odds(p):
    p = ops.clip(p, _SMALLEST, 1.0 - _SMALLEST)
    return ops.log(p) - ops.log(1.0 - p)


def _sample_class(logits, seed):
    noise = keras.random.uniform(logits.shape, dtype=logits.dtype, seed=seed)
    # The Gumbel-max trick: the argmax of logits plus Gumbel noise has the distribution of their softmax.
    gumbel = -ops.log(-ops.log(ops.clip(noise, 1e-20, 1.0 - 1e-7)))
    return ops.argmax(logits + gumbel, axis=-1)


def _class_scores(labels, logits):
    return ops.softmax(logits) - ops.one_hot(labels, logits.shape[-1], dtype=logits.dtype)


def _sample_one_hot(logits, seed):
    return ops.one_hot(_sample_class(logits, seed), logits.shape[-1], dtype=logits.dtype)


def _one_hot_scores(labels, logits):
    return ops.softmax(logits) - labels


def _sample_bernoulli(logits, seed):
    noise = keras.random.uniform(logits.shape, dtype=logits.dtype, seed=seed)
    return ops.cast(noise < ops.sigmoid(logits), logits.dtype)


def _bernoulli_scores(labels, logits):
    return ops.sigmoid(logits) - labels


def _sample_gaussian(outputs, seed):
    # The square (y - f)^2 is the negative log-likelihood of a Gaussian with variance 1/2, up to a constant.
    return outputs + keras.random.normal(outputs.shape, stddev=0.5**0.5, dtype=outputs.dtype, seed=seed)


def _gaussian_scores(labels, outputs):
    return 2.0 * (outputs - labels)
