"""Training on the loss and on the size of its gradient by the inputs."""

import contextlib
import math
import numbers
import threading
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_gradtools import backend, validation
from keras_gradtools.tape import GradientTape


@keras.saving.register_keras_serializable(package="keras_gradtools")
class InputGradientRegularized(keras.Model):
    r"""Trains a model on its loss plus the squared norm of the loss gradient by the inputs.

    $$\text{loss} + \text{weight} \cdot \frac1N \sum_i w_i \, \lVert g_i \rVert_2^2,
      \qquad g_i = \frac{\partial \ell_i}{\partial x_i}$$

    where $x_i$ is one example, $\ell_i$ its contribution to the compiled loss without sample weights, such
    that this loss is $\frac1N \sum_i \ell_i$ (whatever its reduction is), and $w_i$ its sample weight, 1 if
    there is none. There is no other factor: no 1/2, no division by the size of the input. A model trained so
    changes its mind less under small changes of its input.

    It is compiled, fitted, evaluated, called and saved as any other model. `input_gradient_penalty` in the
    progress bar, in the `History` and in the result of `evaluate` is the mean above, without `weight`; `loss`
    and `val_loss` include it. What is trained is the wrapped model itself, `regularized.model`.

    The penalty is differentiated exactly, by a second backward pass. It needs activations that have a second
    derivative (softplus, gelu, silu, tanh): with ReLU its value is right, but its own gradient misses how the
    kinks move, and trains much less robustness.

    - Several inputs are penalized together, their squared norms added; integer ones among them are left
      out.
    - BatchNormalization in training mode mixes the examples of a batch: $g_i$ then is the gradient of the
      summed loss by $x_i$. Losses of `add_loss` are trained, but are no part of $\ell_i$.
    - With several sample weights for one example (time steps, outputs), $w_i$ is their mean.
    - Loops of your own that do not go through `train_step` or `test_step` train the plain loss.

    Args:
        model: a built `keras.Model` with floating-point inputs of shape `(batch, ...)`. It is shared, not
            copied.
        weight: how much the penalty counts, a number of 0 or more. With 0 it is measured, not trained. After
            a change of the attribute `weight`, compile again.
        **kwargs: the `name`, `trainable` and `dtype` of any `keras.Model`; `dtype` is the model's by default.

    Raises:
        ValueError: if `model` is not a built model, `weight` is not a finite number of 0 or more, no input is
            floating-point, or no loss was compiled; at `compile(jit_compile=True)` where the compiler of the
            backend cannot differentiate twice (torch).

    Cost:
        One forward pass for each step, as without the penalty, and two backward passes more: 1.5 to 3.1
        times the time of a plain step, by backend, model and batch size (docs/benchmarks.md).

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
    >>> round(logs["input_gradient_penalty"], 4), round(logs["loss"], 4)
    (25.0, 2.5)

    Source: Drucker & LeCun, "Improving generalization performance using double backpropagation" (IEEE
    Transactions on Neural Networks 3(6), 1992); Finlay & Oberman, "Scaleable input gradient regularization
    for adversarial robustness" (arXiv:1905.11468, 2019).
    """

    def __init__(self, model, weight, **kwargs):
        _check_model(model)
        kwargs.setdefault("dtype", model.dtype_policy)
        # Without autocasting the gradient is by the inputs as they come, not by a copy in half precision.
        super().__init__(autocast=False, **kwargs)
        self.model = model
        self.weight = _checked_weight(weight)
        self.penalty_tracker = keras.metrics.Mean(name="input_gradient_penalty")
        self._step = _Step()
        self.built = True

    @property
    def output_names(self):
        # What losses and metrics that are given by name go by.
        return self.model.output_names

    @keras.Model.jit_compile.setter
    def jit_compile(self, value):
        if value and not backend.COMPILES_SECOND_ORDER:
            raise ValueError(
                "InputGradientRegularized differentiates twice, which the compiler of this backend cannot do. "
                f"Received: jit_compile={value!r}. Compile the model with jit_compile=False."
            )
        keras.Model.jit_compile.fset(self, value)

    def train_step(self, *args):
        with self._recording():
            return super().train_step(*args)

    def test_step(self, *args):
        with self._recording():
            return super().test_step(*args)

    @contextlib.contextmanager
    def _recording(self):
        """The time of one step, in which calls are recorded: `predict` and plain calls keep nothing."""
        self._step.recording = True
        try:
            yield
        finally:
            self._step.recording, self._step.record = False, None

    def call(self, inputs, training=None):
        if not self._step.recording:
            return self.model(inputs, training=training)
        # On JAX, Keras calls this without having converted NumPy arrays.
        inputs = keras.tree.map_structure(_as_tensor, inputs)
        watched = _differentiable(inputs)
        tape = GradientTape(watch_accessed_variables=False)
        with tape:
            tape.watch(watched)
            y_pred = self.model(inputs, training=training)
        self._step.record = _Record(tape, watched, y_pred)
        return y_pred

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        if not self._step.recording:
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        if self._compile_loss is None:
            raise ValueError(
                "InputGradientRegularized penalizes the gradient of the compiled loss, and none was compiled. "
                "Received: loss=None. Pass a loss to `compile`."
            )
        tape, inputs = self._take_record(y_pred)
        if sample_weight is None and not self.losses:
            with tape:
                loss = penalized = super().compute_loss(x, y, y_pred, None, training)
        else:
            loss = super().compute_loss(x, y, y_pred, sample_weight, training)
            # The loss without sample weights and added losses, evaluated beside the one that is trained. Keras'
            # trackers of the losses of several outputs must not count it: the scope drops what it assigns.
            state = [(v, v.value) for v in (*self.variables, *self.metrics_variables)]
            with tape, keras.StatelessScope(state_mapping=state):
                penalized = self._compile_loss(y, y_pred)
        penalty = self._penalty(tape, inputs, penalized, sample_weight)
        return loss + ops.cast(self.weight * penalty, loss.dtype)

    def _penalty(self, tape, inputs, loss, sample_weight):
        batch_size = ops.shape(inputs[0])[0]
        # The factor goes in before the pullback: in half precision, the gradients of a mean may underflow.
        gradients = tape.gradient(loss, inputs, output_gradients=ops.cast(batch_size, loss.dtype))
        gradients = [g for g in gradients if g is not None]
        if not gradients:
            raise _no_gradient("inputs that the loss does not depend on differentiably", inputs)
        squared_norms = sum(_squared_norms(g) for g in gradients)
        if sample_weight is not None:
            squared_norms = squared_norms * _example_weights(sample_weight, batch_size)
        penalty = ops.mean(squared_norms)
        self.penalty_tracker.update_state(ops.stop_gradient(penalty), sample_weight=batch_size)
        return penalty

    def _take_record(self, y_pred):
        record, self._step.record = self._step.record, None
        given = keras.tree.flatten(y_pred)
        if record is None or [id(t) for t in given] != [id(t) for t in keras.tree.flatten(record.y_pred)]:
            raise ValueError(
                "InputGradientRegularized.compute_loss expects the very `y_pred` that the last call of the model "
                "in this step returned, once. Received: "
                f"{', '.join(validation.describe(t) for t in given)}, computed otherwise. Do what comes after the "
                "model's output inside the wrapped model, or in the loss."
            )
        return record.tape, record.inputs

    def get_config(self):
        model = keras.saving.serialize_keras_object(self.model)
        return {**super().get_config(), "model": model, "weight": self.weight}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        model = keras.saving.deserialize_keras_object(config["model"], custom_objects=custom_objects)
        return cls(**{**config, "model": model})


class _Record(NamedTuple):
    tape: GradientTape
    inputs: list
    y_pred: Any


class _Step(threading.local):
    """The step that runs on this thread: the replicas of a distribution strategy are threads."""

    recording = False
    record: _Record | None = None


def _squared_norms(gradients):
    """The squared norm of each example's gradient, at least in single precision, of shape `(batch,)`."""
    gradients = ops.cast(gradients, keras.backend.result_type(gradients.dtype, "float32"))
    return ops.sum(ops.reshape(ops.square(gradients), (ops.shape(gradients)[0], -1)), axis=1)


def _example_weights(sample_weight, batch_size):
    """One weight for each example, of shape `(batch,)`: the mean over its time steps and outputs."""
    per_output = [
        ops.ones((batch_size,))
        if weights is None
        else ops.mean(ops.reshape(ops.cast(weights, "float32"), (batch_size, -1)), axis=1)
        for weights in keras.tree.flatten(sample_weight)
    ]
    return sum(per_output) / len(per_output)


def _as_tensor(x):
    return x if x is None or ops.is_tensor(x) else ops.convert_to_tensor(x)


def _differentiable(inputs):
    tensors = [x for x in keras.tree.flatten(inputs) if x is not None]
    watched = [x for x in tensors if keras.backend.is_float_dtype(validation.dtype_of(x))]
    if not watched:
        raise _no_gradient("inputs without a gradient", tensors)
    return watched


def _no_gradient(received, tensors):
    return ValueError(
        "InputGradientRegularized penalizes the gradient by the model's floating-point inputs. Received: "
        f"{received}, {', '.join(validation.describe(x) for x in tensors)}. Where the values are numbers, such as "
        "pixels, cast them to 'float32' first. Where they are indices, penalize the output of the embedding: wrap "
        "the part of the model that comes after it, and train that on embedded data."
    )


def _check_model(model):
    if not isinstance(model, keras.Model):
        raise ValueError(
            "InputGradientRegularized expects a keras.Model as `model`. Received: "
            f"{validation.describe(model)}. Put layers into a keras.Sequential with a keras.Input first."
        )
    if not model.built:
        raise ValueError(
            "InputGradientRegularized expects a built model. Received: the unbuilt model "
            f"{model.name!r}. Give it a keras.Input, call `model.build(input_shape)`, or call it on data once."
        )


def _checked_weight(weight):
    real = isinstance(weight, numbers.Real) and not isinstance(weight, bool)
    if not real or not math.isfinite(weight) or weight < 0:
        raise ValueError(
            "InputGradientRegularized expects a finite number of 0 or more as `weight`. Received: "
            f"weight={validation.describe(weight)}. Try 0.1, and raise it until the clean accuracy suffers."
        )
    return float(weight)
