"""The loss of a batch as a function of some of a model's weights."""

import copy
import math
from typing import Any

import keras
from keras import ops

from keras_gradtools import nesting, validation
from keras_gradtools.keras_state import example_losses
from keras_gradtools.keras_state.layer_state import regularization_losses, with_keras_mask_of
from keras_gradtools.keras_state.scopes import StateScope
from keras_gradtools.transforms.closures import Identity


class BatchLoss:
    """A loss as `compile` takes it, together with the call of the model whose outputs it takes.

    Every call draws the same random numbers, from the `Draws` that were given to `drawing`, and leaves no statistics
    and no losses in the model. It holds the variables but not the model, so that programs that use it can be cached
    with the model.

    Attributes:
        loss: The loss that was given, or the compiled one.
        key: Equal for two instances if one program can compute both.
        training: Whether the model is called in training mode.
    """

    def __init__(self, owner, model, loss, variables, training):
        self._bind(owner, variables, training)
        self._outputs_of = _as_they_are
        self._loss_weights = None
        if loss is None:
            self._compile_loss = getattr(model, "_compile_loss", None)
            if self._compile_loss is None:
                raise ValueError(
                    f"{owner} expects a loss, or a compiled model. Received: loss=None and the model {model.name!r}, "
                    "which has none. Give it a `loss` as in `compile`."
                )
            validation.require_loss(owner, model.loss)
            self.loss = model.loss
            self._loss_weights = example_losses.loss_weights_of(self._compile_loss)
            what: Any = Identity(self._compile_loss)
        else:
            self._compile_loss = example_losses.compiled(loss)
            self.loss = loss
            what = loss if isinstance(loss, str) else Identity(loss)
        self.key: tuple = (what, self.training, tuple(map(Identity, variables)))

    def _bind(self, owner, variables, training):
        self._owner, self._variables = owner, variables
        self.training = validation.require_flag(owner, "training", training)
        self._draws: Any = None

    def functions(self):
        """The functions or objects that compute the loss, whose captured values decide what it is."""
        return nesting.flatten(self.loss)

    def captured_values(self):
        """What decides, besides `key`, which program computes the loss at this moment."""
        return None

    def require_dependent(self, model, x):
        """Raises `ValueError` if the loss cannot be trained, because it does not depend on the model's weights."""

    def of_logits(self, likelihood):
        """The equivalent loss of the logits, for a `likelihood` whose loss takes probabilities.

        Label smoothing is left out: the model's distribution has no smoothed labels, and they do not change the
        curvature.
        """
        if likelihood is None or likelihood.is_as_given:
            return self
        changed = copy.copy(self)
        changed._compile_loss = example_losses.compiled(likelihood.loss_of_logits, self._loss_weights)
        changed._outputs_of = likelihood.logits_of or _as_they_are
        changed.key = (*self.key, "logits")
        return changed

    def drawing(self, draws):
        """The same loss with random numbers from these `Draws`."""
        bound = copy.copy(self)
        bound._draws = draws
        return bound

    def outputs_and_assigned(self, model, weights, x):
        """The outputs, and the variables that the call assigns, which include the states of the seeds that it uses."""
        lent = self._lent(weights)
        with lent, lent:
            outputs = model(x, training=self.training)
        return self._outputs_of(outputs), lent.scope.variables_assigned

    def _lent(self, weights=None):
        return self._draws.lent([] if weights is None else list(zip(self._variables, weights, strict=True)))

    def outputs(self, model, weights, x):
        """The arguments of the loss: the outputs of the model with these weights, or their logits."""
        return self._called(model, weights, x)[0]

    def outputs_of_example(self, model, weights, x):
        """The number of outputs for one of the examples `x`."""
        outputs = self.outputs(model, weights, nesting.map_structure(lambda a: a[:1], x))
        return sum(math.prod(o.shape) for o in nesting.flatten(outputs))

    def _called(self, model, weights, x):
        lent = self._lent(weights)
        with lent, lent:
            outputs = model(x, training=self.training)
            return self._outputs_of(outputs), list(model.losses)

    def of_outputs(self, outputs, y, sample_weight):
        """The loss of a batch, as Keras reduces it. Raises `ValueError` if the result is not a scalar."""
        lent = self._lent()
        with lent, lent:
            loss = example_losses.total_loss(self._compile_loss, y, outputs, sample_weight)
        if len(loss.shape):
            raise ValueError(
                f"{self._owner} needs a loss that is one number for a batch. Received: "
                f"loss={validation.describe(self.loss)}, which returned the shape {tuple(loss.shape)}. Give it "
                "`reduction='sum_over_batch_size'`, as Keras' losses have by default."
            )
        return example_losses.off_replica(loss)

    def total(self, model, weights, x, y, sample_weight):
        """The loss of a batch, plus what the layers and regularizers of the model add to it."""
        outputs, added = self._called(model, weights, x)
        loss = self.of_outputs(outputs, y, sample_weight)
        return loss + sum(ops.cast(ops.sum(a), loss.dtype) for a in added) if added else loss

    def variables_read(self, model, weights, x, y, sample_weight):
        """The variables that the loss of a batch reads. None if it also draws from generators that are no variables."""
        lent = self._lent(weights)
        with lent, lent:
            outputs = self._outputs_of(model(x, training=self.training))
            example_losses.total_loss(self._compile_loss, y, outputs, sample_weight)
            _ = model.losses
            return None if self._draws.have_drawn(lent.scope) else lent.scope.variables_read

    def regularization(self, model, weights):
        """What the weight regularizers add to the loss. None if there are none."""
        scope = StateScope(list(zip(self._variables, weights, strict=True)))
        with scope, scope:
            losses = regularization_losses(model)
            return sum(ops.cast(a, losses[0].dtype) for a in losses) if losses else None

    def of_examples(self, model, weights, x, y):
        """The loss of each example without sample weights, of shape `(batch,)`, also for a loss that sums a batch."""
        return self.of_each_output(self.outputs(model, weights, x), y)

    def of_each_output(self, outputs, y):
        """The same as `of_examples`, from the outputs."""
        lent = self._lent()
        with lent, lent:
            losses = example_losses.example_losses(self._compile_loss, y, outputs, scales_sums=False)
        if losses is None:
            raise ValueError(
                f"{self._owner} needs a loss with one value for each example. Received: "
                f"loss={validation.describe(self.loss)}, which returned one number for the whole batch. Return one "
                "value for each example, of shape (batch,), and let Keras compute the mean."
            )
        return losses


def with_masks_of(outputs, originals):
    """Sets the Keras masks of `originals` on `outputs`, so that a loss knows what is padding. Returns `outputs`."""
    for output, original in zip(nesting.flatten(outputs), nesting.flatten(originals), strict=True):
        with_keras_mask_of(output, original)
    return outputs


def require_model(owner, model):
    """Returns `model`, or its wrapped model if it is a wrapper. Raises `ValueError` unless that is built."""
    while isinstance(getattr(model, "wrapped_model", None), keras.Model):
        model = model.wrapped_model
    if not isinstance(model, keras.Layer):
        raise ValueError(f"{owner} expects a keras.Model as `model`. Received: {validation.describe(model)}.")
    validation.require_built(owner, model)
    return model


def _as_they_are(outputs):
    return outputs
