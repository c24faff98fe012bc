"""A layer that penalizes the gradient of a wrapped layer's output with respect to its input."""

from typing import Any, Literal, Self

import keras
from keras import ops

from keras_gradtools import validation
from keras_gradtools.annotations import Function, Nested, Schedule
from keras_gradtools.input_gradients.penalty import Penalty, chosen_positions, restored
from keras_gradtools.input_gradients.recorded_call import RecordedCall, Snapshot
from keras_gradtools.input_gradients.strength import Strength
from keras_gradtools.input_gradients.targets import FunctionTarget, OutputsTarget

NAME = "InputGradientPenalty"


@keras.saving.register_keras_serializable(package="keras_gradtools")
class InputGradientPenalty(keras.layers.Wrapper):
    r"""Wraps a layer, and adds to the loss a penalty on the gradient of its output with respect to its input.

    $$\text{weight} \cdot \frac1N \sum_i \text{pen}(g_i), \qquad g_i = \frac{\partial y_i}{\partial x_i}, \qquad
      \text{pen}(g) = (\lVert g \rVert - \text{center})^2 \text{ or } \bigl| \lVert g \rVert - \text{center} \bigr|$$

    where $x_i$ is one example of the layer's input and $y_i$ its output. By default $g_i$ is the whole Jacobian as
    one vector. Use this layer for a part of a model, such as the head after an embedding, an encoder (a contractive
    autoencoder), or a critic inside a larger model. It needs no labels. In training mode the penalty is added with
    `add_loss`. In inference mode the layer behaves like the wrapped one. Examples and time steps that the mask of the
    input or of the output marks as padding are not penalized.

    Args:
        layer: A Keras layer or model that takes one tensor, or several in a list or dict. It is shared, not copied.
        weight: The factor of the penalty, a non-negative number or a
            `keras.optimizers.schedules.LearningRateSchedule` evaluated at the number of training steps.
        target: `"outputs"`, or a function of the layer's output that returns one number per example, of shape
            `(batch,)`.
        norm, squared, center, method, step_size, projections, frozen_statistics, every, seed: As for
            `kg.models.InputGradientRegularized`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: The inputs of `layer`, of shape `(batch, ...)`.
        training: Whether to add the penalty. Passed on to `layer`.

    Returns:
        The output of `layer`.

    Raises:
        ValueError: For an invalid option (the message names it), or if no input is floating-point.

    Cost:
        In training, that of `kg.regularization.input_gradient_penalty` on this part of the model.

    Example:

    >>> import keras
    >>> import keras_gradtools as kg
    >>> dense = keras.layers.Dense(2, use_bias=False, kernel_initializer="ones")
    >>> layer = kg.layers.InputGradientPenalty(dense, weight=0.5)
    >>> y = layer(keras.ops.ones((4, 3)), training=True)
    >>> [float(loss) for loss in layer.losses]  # 0.5 times the squared norm of a 2 x 3 matrix of ones
    [3.0]

    Source: Rifai et al., "Contractive auto-encoders" (ICML 2011); Hoffman, Roberts & Yaida, "Robust learning with
    Jacobian regularization" (arXiv:1908.02729, 2019).
    """

    def __init__(
        self,
        layer: keras.Layer,
        weight: Schedule,
        target: str | Function = "outputs",
        norm: Literal["inf", 1, 2] = 2,
        squared: bool = True,
        center: float = 0.0,
        method: str = "auto",
        step_size: float = 0.1,
        projections: int = 1,
        frozen_statistics: bool = False,
        every: int = 1,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(layer, keras.Layer):
            raise validation.refused(NAME, "a Keras layer", "layer", layer)
        seed = validation.require_seed(NAME, seed, may_be_none=True)
        if validation.is_one_of(target, ("loss",)):
            raise ValueError(
                f"{NAME} expects 'outputs' or a function of the output as `target`. Received: target='loss', but a "
                "layer does not know the loss. Use keras_gradtools.models.InputGradientRegularized for that."
            )
        penalty = Penalty(NAME, target, norm, squared, center, method, step_size, projections, frozen_statistics)
        strength = Strength(NAME, weight, every)
        super().__init__(layer, **kwargs)
        self.supports_masking = True
        self._penalty, self._strength, self._seed = penalty, strength, seed
        self._steps: Any = None
        if strength.depends_on_step:
            self._steps = self.add_weight(name="steps", shape=(), dtype="int32", initializer="zeros", trainable=False)
        self._choice: Any = None
        self._seeds = keras.random.SeedGenerator(seed) if penalty.may_draw else None
        penalty.warn_of_rounding(self.compute_dtype)

    def call(self, inputs: Nested, training: bool | None = None) -> Nested:
        if not training:
            return self.layer(inputs, training=training)
        if self._choice is None:
            self._choice = self._penalty.choose(self.layer)
        choice = self._choice
        chosen = chosen_positions(NAME, self.layer, inputs, None)
        snapshot = Snapshot(self.layer) if self._penalty.calls_again(choice) else None
        call = RecordedCall(lambda x: self.layer(x, training=True), inputs, chosen, snapshot)
        target: Any
        if self._penalty.target == "outputs":
            target = OutputsTarget(call.outputs, choice.projections, self._seeds)
        else:
            target = FunctionTarget(NAME, self._penalty.target)

        def measured():
            found = self._penalty.measure(choice, call, target, self.layer, training)
            return ops.mean(found.values), ops.mean(found.norms)

        dtype = keras.backend.result_type(call.sources[0].dtype, "float32")
        applied = self._strength.apply(measured, self._steps, training, dtype)
        if self._steps is not None:
            self._steps.assign_add(1)
        if applied.weighted is not None:
            self.add_loss(applied.weighted)
        return call.outputs

    def compute_output_spec(self, inputs: Nested, training: bool | None = None) -> Nested:
        # The penalty changes the loss, not the output.
        return self.layer.compute_output_spec(inputs)

    def compute_mask(self, inputs: Nested, previous_mask: Nested) -> Nested:
        return self.layer.compute_mask(inputs, previous_mask)

    def get_config(self) -> dict[str, Any]:
        config = {**super().get_config(), **self._strength.get_config(), **self._penalty.get_config()}
        return {**config, "seed": self._seed}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Self:
        return cls(**restored(config, ("layer", "weight", "target"), custom_objects))
