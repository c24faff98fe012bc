"""Training by second-order methods in `fit`."""

import functools
import warnings

import keras
import numpy as np
from keras import ops

from keras_gradtools import backend, nesting, validation
from keras_gradtools.backend.state import state_variables, undone_by_errors
from keras_gradtools.curvature.batches import batch_size_of, refuse_non_finite
from keras_gradtools.curvature.newton_step import NewtonStepResult, StepReason, newton_step, require_enough_outputs
from keras_gradtools.curvature.normal_equations import NormalEquations
from keras_gradtools.models.wrapped_model import WrappedModel
from keras_gradtools.optimizers.second_order_optimizer import SecondOrderOptimizer

NAME = "SecondOrder"


@keras.saving.register_keras_serializable(package="keras_gradtools")
class SecondOrder(WrappedModel):
    r"""Trains a model by a second-order method, $\theta \leftarrow \theta - (B + \lambda I)^{-1} g$, in ordinary `fit`.

    It is compiled with one of `kg.optimizers`, fitted, evaluated, saved and exported as any other model; what is
    trained is the wrapped model itself, `trainer.model`. Every batch is one step: loss, gradient $g$, curvature $B$ and
    the loss after the step are all of this batch, in the same mode, with the same dropout. Batches should be large, or
    all of the data.

    A step is taken only if it lowers the loss of its batch. If it does not, the damping $\lambda$ is raised by 2, 4, 8,
    ..., and the equation solved anew, up to `max_attempts` of the optimizer; then the weights stay as they are. After a
    step, with $\rho$ the decrease of the loss over what the quadratic model predicted, $\lambda$ is multiplied by
    $\max(\frac13, 1 - (2 \rho - 1)^3)$. Where rounding hides the difference of two losses, it is taken from the
    gradients at both ends, so that training goes on to where the gradient itself is rounding. NaN or infinity in loss,
    gradient or curvature end the step with the weights as they were, and a warning.

    The logs have, besides loss and metrics before the step: `damping`, `step_length`, `ratio` ($\rho$, NaN without a
    step), `gradient_norm`, `cg_iterations`, `step_reason` (0 accepted, 1 rejected, 2 the gradient is zero to rounding,
    3 not finite), each of the last batch. `trainer.last_step` has them all, and in words.

    Args:
        model: a built `keras.Model`. It is shared, not copied.
        training: whether the model is called as in training: with dropout, of one mask for each step, and
            BatchNormalization by the batch, whose statistics each step updates once.
        **kwargs: the `name`, `trainable` and `dtype` of any `keras.Model`; `dtype` is the model's by default.

    Raises:
        ValueError: for a `model` that is not built or computes in float16; in `compile`, for an optimizer of first
            order; in `fit`, without labels, for data that are not finite, for a model that does not compute the same
            twice, and for batches too small for a method that forms a matrix.

    Cost:
        That of the optimizer. A step decides in Python, and what it computes is compiled on TensorFlow and JAX.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    >>> trainer = kg.models.SecondOrder(model)
    >>> trainer.compile(kg.optimizers.LevenbergMarquardt(damping=0.0), "mse")
    >>> x = np.linspace(0, 1, 10, dtype="float32")[:, None]
    >>> history = trainer.fit(x, 2 * x, epochs=2, verbose=0)
    >>> history.history["loss"][1] < 1e-10, sorted(history.history)[:3]
    (True, ['cg_iterations', 'damping', 'gradient_norm'])

    Source: Marquardt (1963); Martens, "Deep learning via Hessian-free optimization" (2010); Nocedal & Wright,
    "Numerical Optimization" (2006), chapters 4 and 7; Nielsen, "Damping parameter in Marquardt's method" (1999).
    """

    def __init__(self, model, training=True, **kwargs):
        if not isinstance(training, bool):
            raise ValueError(f"{NAME} expects True or False as `training`. Received: {validation.describe(training)}.")
        super().__init__(NAME, model, **kwargs)
        if self.compute_dtype == "float16":
            raise ValueError(
                f"{NAME} expects a model that computes in float32, float64 or bfloat16. Received: the model "
                f"{model.name!r} in float16, whose range second derivatives exceed."
            )
        self._training = training
        self._last = _LastStep()
        self._problem = None
        self._has_warned = False

    @property
    def last_step(self):
        """What the last step came to, a `kg.curvature.NewtonStepResult`; None before the first one."""
        return self._last.result

    @functools.wraps(keras.Model.compile)
    def compile(self, optimizer=None, *args, **kwargs):
        if not isinstance(optimizer, SecondOrderOptimizer):
            raise ValueError(
                f"{NAME} trains by a second-order optimizer, such as keras_gradtools.optimizers.LevenbergMarquardt(). "
                f"Received: optimizer={validation.describe(optimizer)}. Optimizers of first order train "
                "`trainer.model` itself."
            )
        optimizer.has_trainer = True
        super().compile(optimizer, *args, **kwargs)
        self._problem, self._has_warned = None, False

    def compile_from_config(self, config):
        """As Keras does it for a model whose `compile` is its own."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def make_train_function(self, force=False):
        if not self.optimizer.built:
            # On TensorFlow, Keras leaves it to the training step, which is another one here.
            self.optimizer.build(self.trainable_variables)
        if force or self.train_function is None:  # type: ignore[has-type]
            self.train_function = backend.train_function(self, self._step_on)
        return self.train_function

    def call(self, inputs, training=None):
        return self._forward(inputs, training)

    def _step_on(self, batch):
        """One step; returns the logs."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
        if y is None:
            raise ValueError(f"{NAME} trains on labels. Received: data without any.")
        batch = nesting.map_structure(_tensor, (x, y, sample_weight))
        if self._problem is None:
            self._problem = _Problem(self, batch, self._training)
        problem, optimizer = self._problem, self.optimizer
        operator = problem.operator.of_batch(batch)
        if optimizer.forms_matrix and not optimizer.allow_underdetermined:
            require_enough_outputs(type(optimizer).__name__, problem.operator, batch_size_of(batch))
        found = newton_step(
            operator,
            optimizer.solver(operator, problem.equations),
            optimizer.damping,
            scale=float(ops.convert_to_numpy(optimizer.learning_rate)),
            max_attempts=optimizer.max_attempts,
        )
        if found.reason == StepReason.NOT_FINITE:
            refuse_non_finite(NAME, [batch])
            self._warn(found.message)
        weights = operator.variables if found.step is not None else []
        measured = [*state_variables(self), *self.metrics_variables, *optimizer.variables]
        block = undone_by_errors([*weights, *measured])
        with block, block:
            logs = problem.measured(found.loss, batch)
            if found.step is not None:
                operator.move(found.step.astype(operator.dtype))
            optimizer.end_step(operator, found.damping)
            self._last.result = found
        return logs | {
            "damping": found.damping,
            "step_length": found.step_length,
            "ratio": found.ratio,
            "gradient_norm": found.gradient_norm,
            "cg_iterations": found.iterations,
            "step_reason": int(found.reason),
        }

    def _warn(self, message):
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{NAME} took no step, since {message}. The weights are as they were before it. Smaller weights, data "
                "in a smaller range or a `clip` in the loss may help.",
                stacklevel=3,
            )

    def get_config(self):
        return {**super().get_config(), "training": self._training}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        model = keras.saving.deserialize_keras_object(config["model"], custom_objects=custom_objects)
        return cls(**config | {"model": model})


class _LastStep:
    """Out of the way of Keras, which tracks what is in a tuple."""

    result: NewtonStepResult | None = None


class _Problem:
    """The function that a compiled `SecondOrder` minimizes, and how its metrics are measured."""

    def __init__(self, trainer, batch, training):
        self._trainer, self._training = trainer, training
        cls = trainer.optimizer.operator_class()
        self.operator = cls(trainer, None, [batch], training=training, verbose=0)
        self.equations = NormalEquations(self.operator)
        # Otherwise, the loss is all that there is to tell.
        self._needs_outputs = len(trainer.metrics) > 1 or (training and bool(state_variables(trainer.model)))
        self._measure = backend.jit(self._update)

    def measured(self, loss, batch):
        """The logs of a batch; metrics, the statistics of normalization and seeds are updated."""
        trainer = self._trainer
        # A number of the dtype that it is tracked in, for one program whatever it is.
        loss = np.asarray(loss, "float32")
        backend.replica_results(
            lambda part: self._measure(ops.convert_to_tensor(loss), *part), batch, trainer.trainable_variables[0]
        )
        return dict(trainer.get_metrics_result())

    def _update(self, loss, x, y, sample_weight):
        trainer = self._trainer
        if self._needs_outputs:
            y_pred = trainer.model(x, training=self._training)
            if len(trainer.metrics) > 1:
                trainer.compute_loss(x, y, y_pred, sample_weight, training=self._training)
                trainer.compute_metrics(x, y, y_pred, sample_weight)
        trainer._loss_tracker.update_state(loss, sample_weight=nesting.flatten(x)[0].shape[0])
        return ops.zeros(())


def _tensor(x):
    return x if x is None or ops.is_tensor(x) else ops.convert_to_tensor(x)
