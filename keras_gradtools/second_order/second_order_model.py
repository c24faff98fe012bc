"""Second-order training with `fit`."""

import warnings
from typing import Any, Literal

import keras
import numpy as np
from keras import ops

from keras_gradtools import backend, nesting, validation
from keras_gradtools.annotations import Function, Loss, Nested
from keras_gradtools.curvature.data.batches import batch_size_of, refuse_non_finite
from keras_gradtools.curvature.data.residual_loss import require_points
from keras_gradtools.keras_state.layer_state import state_variables
from keras_gradtools.second_order.newton_step import NewtonStepResult, StepReason
from keras_gradtools.second_order.problem import Problem
from keras_gradtools.second_order.second_order_optimizer import SecondOrderOptimizer, identities
from keras_gradtools.training.residual_training import ResidualTraining
from keras_gradtools.training.squared_residuals import points_of
from keras_gradtools.training.undone_by_errors import undone_by_errors
from keras_gradtools.training.wrapped_model import documented_as, no_labels

NAME = "SecondOrder"


@keras.saving.register_keras_serializable(package="keras_gradtools")
class SecondOrder(ResidualTraining):
    r"""Trains a model with a second-order method, $\theta \leftarrow \theta - (B + \lambda I)^{-1} g$, in plain `fit`.

    Compile it with one of `kg.optimizers`. Fit, evaluate, save and export it like any other model. It trains the
    wrapped model itself, `trainer.model`. Every batch is one step: the loss, the gradient $g$, the curvature $B$ and
    the loss after the step are all computed on this batch, in the same mode and with the same dropout masks. Batches
    should be large, or contain all of the data.

    A step is taken only if it lowers the loss of its batch. If it does not, the damping $\lambda$ is multiplied by 2,
    4, 8, ... and the equation is solved again, up to the `max_attempts` of the optimizer. If no attempt lowers the
    loss, the weights do not change. After a step, $\lambda$ is multiplied by $\max(\frac13, 1 - (2 \rho - 1)^3)$, where
    $\rho$ is the decrease of the loss over the decrease that the quadratic model predicted. If rounding hides the
    difference of the two losses, the decrease is computed from the gradients before and after the step, so that
    training can continue until the gradient itself is rounding noise. If the loss, the gradient or the curvature has
    NaN or infinity, the step ends with a warning and the weights do not change.

    The logs contain the loss and the metrics before the step. They also contain, for the last batch: `damping` (of the
    next step), `step_length`, `ratio` ($\rho$, NaN if no step was taken), `gradient_norm`, `cg_iterations` and
    `step_reason` (0 accepted, 1 rejected, 2 the gradient is zero up to rounding, 3 not finite). `trainer.last_step` has
    all of these, and a message.

    With a `kg.losses.SquaredResiduals` as the loss, `fit` takes the points of a differential equation, or other data
    from which a function computes residuals, and the function chooses the mode in which it calls the model.

    Save it to a `.keras` file. `keras.models.load_model` finds the class in every process that has imported
    `keras_gradtools`. Without the import, Keras raises "Could not locate class".

    Args:
        model: A built `keras.Model`. It is shared, not copied.
        training: Whether the model is called in training mode: dropout is on, with one mask for each step, and
            BatchNormalization uses the statistics of the batch and updates its moving statistics once for each step.
        **kwargs: `name`, `trainable` and `dtype`, as for any `keras.Model`. `dtype` defaults to that of `model`.

    Raises:
        ValueError: If `model` is not built or computes in float16. In `compile`, for a first-order optimizer. In `fit`,
            if there are no labels, if the data have NaN or infinity, if the model returns different values for the same
            input, or if a batch is too small for a method that forms a matrix. In `save`, for an HDF5
            file.

    Cost:
        For each batch, one step of the optimizer, see its cost. If there are metrics, or layers with state, one more
        call of the model. A step is controlled from Python. Its computations are compiled. On TensorFlow and JAX,
        the conjugate gradient iterations of small models are one program.

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

    Source: Marquardt, "An algorithm for least-squares estimation of nonlinear parameters" (1963); Martens, "Deep
    learning via Hessian-free optimization" (2010); Nocedal & Wright, "Numerical Optimization" (2006), chapters 4 and 7;
    Nielsen, "Damping parameter in Marquardt's method" (1999).
    """

    def __init__(self, model: keras.Model, training: bool = True, **kwargs: Any) -> None:
        training = validation.require_flag(NAME, "training", training)
        super().__init__(NAME, model, **kwargs)
        if self.compute_dtype == "float16":
            raise ValueError(
                f"{NAME} expects a model that computes in float32, float64 or bfloat16. Received: the model "
                f"{model.name!r} in float16, whose range second derivatives exceed."
            )
        self._training = training
        self._last = _LastStep()
        self._problem: Any = None
        self._has_warned = False

    @property
    def last_step(self) -> NewtonStepResult | None:
        """The result of the last step, a `kg.optimizers.NewtonStepResult`. None before the first step."""
        return self._last.result

    def compile(
        self,
        optimizer: SecondOrderOptimizer | None = None,
        loss: Loss = None,
        loss_weights: Nested = None,
        metrics: Nested = None,
        weighted_metrics: Nested = None,
        run_eagerly: bool = False,
        steps_per_execution: int = 1,
        jit_compile: bool | Literal["auto"] = "auto",
        auto_scale_loss: bool = True,
    ) -> None:
        """Sets the optimizer, the loss and the metrics.

        Args:
            optimizer: One of `kg.optimizers`. It is required.
            loss: A loss as `keras.Model.compile` takes it, or a `kg.losses.SquaredResiduals`, whose function computes
                residuals from the model and the data.
            loss_weights: As for `keras.Model.compile`. Not with residuals, which have weights of their own.
            metrics: As for `keras.Model.compile`. They are of the model before the step. Not with residuals.
            weighted_metrics: As `metrics`, with sample weights.
            run_eagerly: Applies to `evaluate`, `predict` and the metrics of `fit`. A step itself is controlled from
                Python.
            steps_per_execution: Number of batches between two calls of the callbacks. Each batch is one step.
            jit_compile: Applies to `evaluate` and `predict`.
            auto_scale_loss: Has no effect, because the model may not compute in float16.

        Raises:
            ValueError: If `optimizer` is not one of `kg.optimizers`, or if there are metrics or `loss_weights` with
                residuals.
        """
        if not isinstance(optimizer, SecondOrderOptimizer):
            raise ValueError(
                f"{NAME} expects a second-order optimizer, such as keras_gradtools.optimizers.LevenbergMarquardt(). "
                f"Received: optimizer={validation.describe(optimizer)}. To use a first-order optimizer, train "
                "`trainer.model` itself."
            )
        optimizer.has_trainer = True
        super().compile(
            optimizer, loss, loss_weights, metrics, weighted_metrics, run_eagerly, steps_per_execution, jit_compile,
            auto_scale_loss,
        )  # fmt: skip
        self._problem, self._has_warned = None, False

    def make_train_function(self, force: bool = False) -> Function:
        if not self.optimizer.built:
            # On TensorFlow, Keras builds the optimizer in its own training step, which is replaced here.
            self.optimizer.build(self.trainable_variables)
        if force or self.train_function is None:  # type: ignore[has-type]
            self.train_function = backend.train_function(self, self._step_on)
        return self.train_function

    @documented_as(keras.Model.train_on_batch)
    def train_on_batch(
        self, x: Any, y: Any = None, sample_weight: Any = None, class_weight: Any = None, return_dict: bool = False
    ) -> Any:
        # What Keras does around a step, in particular on JAX, takes longer than a step of a small model. After a first
        # step, everything is built.
        if self._problem is None or class_weight is not None or not backend.can_step_directly(self):
            return super().train_on_batch(x, y, sample_weight, class_weight, return_dict)
        resets = len(self.metrics) == 1
        if not resets:
            self.reset_metrics()
        logs = self._step_on((x, y, sample_weight), resets)
        logs = {key: _number(x) for key, x in sorted(logs.items())}
        return logs if return_dict else self._flatten_metrics_in_order(logs)

    def _step_on(self, batch, resets=False):
        """Takes one step and returns the logs. With `resets`, the metrics start from zero after the step is found."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
        if self._residuals is not None:
            batch = require_points(NAME, points_of(NAME, x, y, sample_weight)), None, None
        elif y is None:
            raise no_labels(NAME)
        else:
            batch = nesting.map_structure(_tensor, (x, y, sample_weight))
        if self._problem is None or self._problem.weights != identities(self.trainable_variables):
            self._problem = Problem(self, batch, self._training)
        problem, optimizer = self._problem, self.optimizer
        operator = problem.operator.of_batch(batch)
        optimizer.require_enough_outputs(problem.operator, batch_size_of(batch))
        found = optimizer.take_step(operator, problem.equations)
        if found.reason == StepReason.NOT_FINITE:
            refuse_non_finite(NAME, [batch])
            self._warn(found.message)
        weights = operator.variables if found.step is not None else []
        measured = [*state_variables(self), *self.metrics_variables, *optimizer.variables_to_restore()]
        block = undone_by_errors([*weights, *measured])
        with block, block:
            logs = problem.end(found, operator, batch, resets)
            optimizer.end_step(operator, found.damping)
            self._last.result = found
        return logs | found.logs() | {"gradient_norm": found.gradient_norm}

    def _warn(self, message):
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{NAME} took no step, since {message}. The weights did not change. Smaller weights, data in a smaller "
                "range or a `clip` in the loss may help.",
                stacklevel=3,
            )

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "training": self._training}


class _LastStep:
    """Hides the result from Keras, which would track a tuple that is an attribute of a model."""

    result: NewtonStepResult | None = None


def _tensor(x):
    return x if x is None or ops.is_tensor(x) else ops.convert_to_tensor(x)


def _number(x):
    """A number of Python, or an array for a metric of several numbers."""
    array = ops.convert_to_numpy(x) if ops.is_tensor(x) else np.asarray(x)
    return float(array) if array.ndim == 0 else array
