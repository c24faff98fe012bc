"""The objectives that attacks increase: functions of labels and model outputs, of shape `(batch,)`."""

import dataclasses
import functools
from typing import Any

import keras
from keras import ops

from keras_gradtools import validation
from keras_gradtools.example_norms import at_least_single
from keras_gradtools.keras_state import example_losses

NAMED = ("cross_entropy", "margin")
# Tolerance on the sum of probabilities, large enough for half precision.
_ROUNDING = 1e-2


def classifier_scores(outputs, activation=None):
    """The outputs of a classifier as logits, one for each class, in float32 or better.

    `activation` is the activation of the output layer, if known. After a linear one, the outputs are the logits. After
    any other, outputs that are probabilities (nonnegative with sum 1, as after a softmax) are replaced by their
    logarithms. Their gradient is that of the logits even if the largest probability is rounded to 1, as long as the
    others are not rounded to 0. A single output is the logit of class 1, or its probability after a sigmoid.
    """
    scores = at_least_single(outputs)
    if scores.shape[-1] == 1:
        if activation is keras.activations.sigmoid:
            return _logarithms(ops.concatenate([1.0 - scores, scores], axis=-1))
        return ops.concatenate([ops.zeros_like(scores), scores], axis=-1)
    if activation is keras.activations.linear:
        return scores
    total = ops.sum(scores, axis=-1, keepdims=True)
    is_simplex = (ops.min(scores, axis=-1, keepdims=True) >= 0) & (ops.abs(total - 1.0) < _ROUNDING)
    return ops.where(is_simplex, _logarithms(scores), scores)


def _logarithms(probabilities):
    # Just above the smallest normal float32 number: some backends flush smaller ones to zero.
    return ops.log(ops.maximum(probabilities, 1e-37))


def margin(labels, scores):
    """The largest score of another class minus that of the label: positive where the model errs."""
    is_label = ops.one_hot(labels, scores.shape[-1], dtype="bool")
    others = ops.max(ops.where(is_label, float("-inf"), scores), axis=-1)
    return others - ops.sum(ops.where(is_label, scores, 0.0), axis=-1)


def cross_entropy(labels, scores):
    """Minus the logarithm of the probability of the label."""
    is_label = ops.one_hot(labels, scores.shape[-1], dtype="bool")
    own = ops.sum(ops.where(is_label, scores, 0.0), axis=-1, keepdims=True)
    # `logsumexp(scores) - own` would lose the gradient with respect to the label's score where the model is confident.
    return ops.softplus(ops.logsumexp(ops.where(is_label, float("-inf"), scores - own), axis=-1))


def class_labels(y, classes):
    """Labels as integers of shape `(batch,)`, from integers or one-hot rows."""
    y = ops.convert_to_tensor(y)
    if len(y.shape) == 2 and y.shape[1] == classes and classes > 1:
        return ops.argmax(y, axis=1)
    return ops.cast(ops.reshape(y, (-1,)), "int32")


@dataclasses.dataclass(frozen=True)
class Objective:
    """The objective to increase: one of `NAMED`, a Keras loss, or a function `(y, y_pred)` of shape `(batch,)`.

    `sign` is -1 for a targeted attack, which decreases the loss of its target.
    """

    loss: Any
    sign: float

    @property
    def is_named(self):
        return isinstance(self.loss, str) and self.loss in NAMED

    @functools.cached_property
    def _compiled(self):
        return example_losses.compiled(self.loss)

    def __call__(self, y, outputs, activation=None):
        """The objective and the badness of each example.

        Larger badness is worse. For the named objectives, it is positive where the attack has succeeded.
        """
        if self.is_named:
            scores = classifier_scores(outputs, activation)
            labels = class_labels(y, outputs.shape[-1])
            margins = self.sign * margin(labels, scores)
            return (margins if self.loss == "margin" else self.sign * cross_entropy(labels, scores)), margins
        losses = example_losses.example_losses(self._compiled, y, outputs)
        if losses is None:
            raise ValueError(
                f"An attack needs a loss of each example. Received: loss={validation.describe(self.loss)}, which "
                "returned one number for the whole batch. Let it return one value for each example."
            )
        return self.sign * losses, self.sign * losses
