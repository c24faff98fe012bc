"""Training on the loss plus a penalty on its gradient with respect to the inputs."""

import contextlib
import inspect
import warnings
from typing import Any, Literal, Self

import keras
from keras import ops

from keras_gradtools import validation
from keras_gradtools.annotations import Function, InputNames, Nested, Schedule
from keras_gradtools.chosen_inputs import as_tensors, model_inputs, require_names
from keras_gradtools.input_gradients.penalty import Penalty, chosen_positions, restored
from keras_gradtools.input_gradients.recorded_call import RecordedCall, Snapshot
from keras_gradtools.input_gradients.sample_weights import example_weights
from keras_gradtools.input_gradients.strength import Strength
from keras_gradtools.input_gradients.targets import FunctionTarget, LossTarget, OutputsTarget
from keras_gradtools.keras_state import example_losses
from keras_gradtools.training.wrapped_model import StateOfStep, WrappedModel, documented_as

NAME = "InputGradientRegularized"


@keras.saving.register_keras_serializable(package="keras_gradtools")
class InputGradientRegularized(WrappedModel):
    r"""Trains a model on its loss plus a penalty on the norm of the gradient with respect to its inputs.

    $$\text{loss} + \text{weight} \cdot \frac1N \sum_i w_i \, \text{pen}(g_i),
      \qquad g_i = \frac{\partial \ell_i}{\partial x_i}, \qquad
      \text{pen}(g) = (\lVert g \rVert - \text{center})^2 \text{ or } \bigl| \lVert g \rVert - \text{center} \bigr|$$

    where $x_i$ is one example and $w_i$ its sample weight (1 if there are none). $\ell_i$ is its contribution to the
    compiled loss without sample weights: that loss is $\frac1N \sum_i \ell_i$, whatever its reduction, loss weights
    and masks. There is no other factor: no 1/2, and no division by the size of the input. The penalty makes the
    outputs less sensitive to small changes of the input.

    Compile, fit, evaluate, call, save and export it like any other model. It trains the wrapped model itself,
    `regularized.model`. The progress bar, the `History` and the result of `evaluate` contain `input_gradient_penalty`,
    the mean above without `weight`, and `input_gradient_norm`, the mean of $\lVert g_i \rVert$. `loss` and `val_loss`
    include the weighted penalty.

    Save it to a `.keras` file. `keras.models.load_model` finds the class in every process that has imported
    `keras_gradtools`. Without the import, Keras raises "Could not locate class".

    The methods:

    - `"exact"`: a second backward pass. It needs activations with a useful second derivative (softplus, gelu, silu,
      tanh). With ReLU, the value of the penalty is correct, but its gradient does not contain the effect of moving
      kinks, and training gains much less robustness.
    - `"finite_difference"`: a second forward pass at $x + h d$. The direction $d$, held constant, is the one in which
      $\ell_i$ grows most: the normalized gradient for norm 2, its sign for norm 1, and for "inf" its sign at the
      element of largest magnitude. `squared` and `center` apply to $(\ell_i(x + h d) - \ell_i(x)) / h$. Both terms are
      differentiated, and nothing is differentiated twice. So it works with kinks, with layers that have no second
      derivative, and with every compiler. `step_size` affects robustness, not only precision: a larger step also
      penalizes growth of the loss farther from the example. Both passes use the same dropout mask. In half precision,
      differences over steps below 0.01 are mostly rounding noise.
    - `"random_projection"`, for `target="outputs"`: an unbiased estimate of the squared norm of the Jacobian, from the
      gradients of `projections` random mixtures of the outputs. It is differentiated like `"exact"`.
    - `"auto"`: finite differences if an activation has kinks (found by evaluating it), or if a layer has no second
      derivative. Otherwise `"exact"`. `summary()` reports the choice and the reason.

    Details:

    - Several inputs are penalized together, as one vector. Integer inputs are left out. `inputs` selects the inputs.
    - BatchNormalization in training mode mixes the examples of a batch, so $g_i$ is then the gradient of the summed
      loss with respect to $x_i$. With `frozen_statistics=True`, the gradient is taken with the moving statistics
      instead, at the cost of one more forward pass. Each example is then independent of the others, as in inference.
      The statistics are updated once in both cases.
    - Losses from `add_loss` are trained, but are not part of $\ell_i$.
    - If an example has several sample weights (for time steps or outputs), $w_i$ is their mean, without padding.
    - Custom training loops that do not call `train_step` or `test_step` train on the plain loss. Use
      `kg.regularization.input_gradient_penalty` there.

    Args:
        model: A built `keras.Model` with floating-point inputs of shape `(batch, ...)`. It is shared, not copied.
        weight: Factor of the penalty: a number of 0 or more, or a
            `keras.optimizers.schedules.LearningRateSchedule` of the training step. With 0, the penalty is only
            measured. Compile again after you change the attribute `weight`.
        target: What is differentiated. `"loss"`: the compiled loss. `"outputs"`: all outputs, so that $g_i$ is their
            Jacobian, flattened to a vector for the norm. A function `(y, y_pred)`: one number for each example, of
            shape `(batch,)`, for instance a logit, a margin or the score of a critic.
        norm: 1, 2 or `"inf"` (or `float("inf")`), the norm of the gradient. It is dual to the norm of the attacks that
            it defends against: 1 is for l-infinity attacks, 2 for l2 attacks.
        squared: Whether the distance from `center` is squared.
        center: The gradient norm at which the penalty is zero: 1 for WGAN-GP, 0 for R1.
        method: `"auto"`, `"exact"`, `"finite_difference"` or `"random_projection"`, as described above.
        step_size: $h$, how far finite differences move an example, in units of the input.
        projections: For `target="outputs"`, the number of random mixtures of the outputs. -1 takes every output
            instead. `"exact"` always takes every output.
        inputs: Names, keys or positions of the inputs to differentiate with respect to. Default: all floating-point
            inputs.
        frozen_statistics: Whether the gradient is taken with the moving statistics of BatchNormalization, as described
            above.
        every: Number of steps between penalties. The penalty is applied at every `every`-th step, with `every` times
            the weight (lazy regularization), and not computed at the other steps. The logs are means over
            the steps with a penalty, 0 in an epoch without one. `evaluate` always measures the penalty.
        seed: An integer that seeds the projections. Keras does not save the states of seeds, so a loaded model starts
            again from this seed.
        **kwargs: `name`, `trainable` and `dtype`, as for any `keras.Model`. `dtype` defaults to that of `model`.

    Raises:
        ValueError: If `model` is not built, if an option is invalid, or if no input is floating-point. In `compile`, if
            a loss is needed and missing. In a step, if the target or the loss does not return one number for each
            example, or if there are no labels. The weights do not change. In `save`, for an HDF5 file.

    Cost:
        Relative to a plain training step, if computation dominates: 2 for `"exact"` in theory (one more forward pass
        and two more backward passes), 7/3 for `"finite_difference"`. docs/benchmarks.md has measurements by backend
        and model.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False)])
    >>> model.set_weights([np.array([[3.0], [4.0]], "float32")])
    >>> regularized = kg.models.InputGradientRegularized(model, weight=0.1)
    >>> regularized.compile(loss=lambda y, y_pred: y_pred[:, 0])  # whose gradient is (3, 4) everywhere
    >>> x, y = np.zeros((8, 2), "float32"), np.zeros((8, 1), "float32")
    >>> logs = regularized.evaluate(x, y, verbose=0, return_dict=True)
    >>> [round(logs[name], 4) for name in ("input_gradient_norm", "input_gradient_penalty", "loss")]
    [5.0, 25.0, 2.5]

    Source: Drucker & LeCun, "Improving generalization performance using double backpropagation" (IEEE Transactions on
    Neural Networks 3(6), 1992); Finlay & Oberman, "Scaleable input gradient regularization for adversarial robustness"
    (arXiv:1905.11468, 2019); Hoffman, Roberts & Yaida, "Robust learning with Jacobian regularization"
    (arXiv:1908.02729, 2019); Gulrajani et al., "Improved training of Wasserstein GANs" (arXiv:1704.00028, 2017);
    Mescheder, Geiger & Nowozin, "Which training methods for GANs do actually converge?" (arXiv:1801.04406, 2018) for
    R1; Karras et al., "Analyzing and improving the image quality of StyleGAN" (arXiv:1912.04958, 2020) for lazy
    regularization. docs/penalties.md converts the weights of these papers to `weight`.
    """

    def __init__(
        self,
        model: keras.Model,
        weight: Schedule,
        target: str | Function = "loss",
        norm: Literal["inf", 1, 2] = 2,
        squared: bool = True,
        center: float = 0.0,
        method: str = "auto",
        step_size: float = 0.1,
        projections: int = 1,
        inputs: InputNames = None,
        frozen_statistics: bool = False,
        every: int = 1,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        penalty = Penalty(NAME, target, norm, squared, center, method, step_size, projections, frozen_statistics)
        strength = Strength(NAME, weight, every)
        inputs = require_names(NAME, inputs)
        seed = validation.require_seed(NAME, seed, may_be_none=True)
        super().__init__(NAME, model, **kwargs)
        known = model_inputs(model)
        if known is not None:
            chosen_positions(NAME, model, known, inputs)
        self.penalty_tracker = keras.metrics.Mean(name="input_gradient_penalty")
        self.norm_tracker = keras.metrics.Mean(name="input_gradient_norm")
        self._penalty, self._strength = penalty, strength
        # Created only if needed, so that otherwise the wrapper has exactly the variables of its model.
        self._steps: Any = None
        if strength.depends_on_step:
            self._steps = self.add_weight(name="steps", shape=(), dtype="int32", initializer="zeros", trainable=False)
        self._seeds = keras.random.SeedGenerator(seed) if target == "outputs" and penalty.may_draw else None
        self._inputs, self._seed = inputs, seed
        self._choice = None
        self._step: Any = StateOfStep(recording=False, call=None)
        penalty.warn_of_rounding(self.compute_dtype)

    @property
    def weight(self) -> Schedule:
        """The factor of the penalty: a number or a schedule."""
        return self._strength.weight

    @weight.setter
    def weight(self, weight: Schedule) -> None:
        strength = Strength(NAME, weight, self._strength.every)
        if strength.depends_on_step and self._steps is None:
            raise ValueError(
                f"{NAME} counts training steps only if it was created with a schedule or with `every` above 1. "
                f"Received: weight={validation.describe(weight)}. Wrap the model again: "
                f"`{NAME}(regularized.model, weight)`."
            )
        self._strength = strength

    @property
    def method(self) -> str:
        """The method in use, with `"auto"` resolved."""
        return self._current_choice().method

    @documented_as(keras.Model.compile)
    def compile(self, optimizer: Any = "rmsprop", loss: Any = None, *args: Any, **kwargs: Any) -> None:
        if loss is None and self._penalty.target == "loss":
            raise ValueError(
                f"{NAME} penalizes the gradient of the compiled loss and expects a `loss`. Received: loss=None. Pass "
                "a loss to `compile`, or create it with another `target`."
            )
        self._choice = self._penalty.choose(self.model)
        super().compile(optimizer, loss, *args, **kwargs)

    def _current_choice(self):
        if self._choice is None:
            self._choice = self._penalty.choose(self.model)
        return self._choice

    def summary(self, *args: Any, **kwargs: Any) -> None:
        """Prints the summary of `keras.Model.summary`, and which penalty method is used and why."""
        super().summary(*args, **kwargs)
        bound = inspect.signature(keras.Model.summary).bind(self, *args, **kwargs)
        (bound.arguments.get("print_fn") or print)(
            f" Input-gradient penalty: {self._penalty.describe(self._current_choice())}"
        )

    @documented_as(keras.Model.fit)
    def fit(self, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(keras.Model.fit).bind(self, *args, **kwargs)
        given = bound.arguments.get("callbacks")
        if not isinstance(given, keras.callbacks.CallbackList):
            given = given if isinstance(given, (list, tuple)) else [given] if given else []
            bound.arguments["callbacks"] = [*given, _DominantPenalty()]
        return super().fit(*bound.args[1:], **bound.kwargs)

    def train_step(self, *args: Any) -> Any:
        with self._recording():
            return super().train_step(*args)

    def test_step(self, *args: Any) -> Any:
        with self._recording():
            return super().test_step(*args)

    @contextlib.contextmanager
    def _recording(self):
        """A context for one training or test step, which records calls. `predict` and plain calls record nothing."""
        self._step.recording = True
        try:
            yield
        finally:
            self._step.recording, self._step.call = False, None

    def call(self, inputs: Nested, training: bool | None = None) -> Nested:
        if not self._step.recording:
            return self._forward(inputs, training)
        inputs = as_tensors(inputs)
        chosen = chosen_positions(NAME, self.model, inputs, self._inputs)
        snapshot = Snapshot(self.model) if self._penalty.calls_again(self._current_choice()) else None
        call = RecordedCall(lambda x: self._forward(x, training), inputs, chosen, snapshot)
        self._step.call = call
        return call.outputs

    def compute_loss(
        self,
        x: Nested = None,
        y: Nested = None,
        y_pred: Nested = None,
        sample_weight: Nested = None,
        training: bool = True,
    ) -> Any:
        if not self._step.recording:
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        self._require_labels(y)
        is_of_loss = self._penalty.target == "loss"
        call = self._take_call(y_pred)
        target = self._target(y, y_pred)
        if not is_of_loss or sample_weight is not None or self.losses:
            loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        elif self._current_choice().method == "finite_difference" and not self._compile_loss.metrics:
            # The trained loss is the one to differentiate, and Keras tracks no separate loss for each output.
            target.losses = target.recorded(call)
            loss = example_losses.on_replica(ops.mean(target.losses))
        else:
            plain = super().compute_loss
            loss = target.total = call.recorded(lambda: plain(x, y, y_pred, None, training))
        weighted = self._measure(call, target, sample_weight, loss.dtype, training)
        return loss if weighted is None else loss + ops.cast(example_losses.on_replica(weighted), loss.dtype)

    def _target(self, y, y_pred):
        if self._penalty.target == "loss":
            return LossTarget(NAME, self._compile_loss, y)
        if self._penalty.target == "outputs":
            return OutputsTarget(y_pred, self._current_choice().projections, self._seeds)
        return FunctionTarget(NAME, self._penalty.target, as_tensors(y))

    def _measure(self, call, target, sample_weight, dtype, training):
        """Returns the weighted penalty, a mean over the examples, or None if the weight is 0. Updates the trackers."""
        dtype = keras.backend.result_type(dtype, "float32")

        def measured():
            found = self._penalty.measure(self._current_choice(), call, target, self.model, training)
            values = found.values
            if sample_weight is not None:
                weights = example_weights(sample_weight, call.outputs, call.batch_size)
                values = values * ops.cast(weights, values.dtype)
            return ops.cast(ops.mean(values), dtype), ops.cast(ops.mean(found.norms), dtype)

        applied = self._strength.apply(measured, self._steps, training, dtype)
        count = ops.cast(call.batch_size, dtype) * applied.is_due
        self.penalty_tracker.update_state(ops.stop_gradient(applied.penalty), sample_weight=count)
        self.norm_tracker.update_state(applied.norm, sample_weight=count)
        if training and self._steps is not None:
            self._steps.assign_add(1)
        return applied.weighted

    def _take_call(self, y_pred):
        call, self._step.call = self._step.call, None
        given = keras.tree.flatten(y_pred)
        if call is None or [id(t) for t in given] != [id(t) for t in keras.tree.flatten(call.outputs)]:
            raise ValueError(
                f"{NAME}.compute_loss expects exactly the `y_pred` that the last call of the model in this step "
                f"returned, and only one call of compute_loss for it. Received: "
                f"{', '.join(validation.describe(t) for t in given)}, computed in another way. Apply what follows the "
                "model's output inside the wrapped model, or in the loss."
            )
        return call

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            **self._strength.get_config(),
            **self._penalty.get_config(),
            "inputs": self._inputs,
            "seed": self._seed,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Self:
        return cls(**restored(config, ("model", "weight", "target"), custom_objects))


class _DominantPenalty(keras.callbacks.Callback):
    """Warns after the first epoch of `fit` if the weighted penalty is more than `MOST` times the rest of the loss."""

    MOST = 10

    def on_train_begin(self, logs=None):
        self._is_first = True

    def on_epoch_end(self, epoch, logs=None):
        if not self._is_first or "loss" not in (logs or {}):
            return
        self._is_first = False
        model = self.model
        penalty = logs["input_gradient_penalty"] * float(ops.convert_to_numpy(model._strength.at(model._steps)))
        rest = abs(logs["loss"] - penalty)
        if penalty > self.MOST * rest:
            warnings.warn(
                f"The input-gradient penalty dominates the loss: in this epoch, weight * penalty was {penalty:.3g}, "
                f"and the rest of the loss {rest:.3g}. Received: weight={model.weight!r}. Use a smaller weight, so "
                "that the loss itself is trained, too.",
                stacklevel=2,
            )
