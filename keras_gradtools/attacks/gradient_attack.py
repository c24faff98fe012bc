"""The base class of the gradient attacks: their options, and their use inside and outside of a training step."""

from collections.abc import Sequence
from typing import Any, Literal, Self

import keras
from keras import ops

from keras_gradtools import chosen_inputs, validation
from keras_gradtools.annotations import Function, InputNames, Nested, Tensor, Verbose
from keras_gradtools.attacks import norm_balls
from keras_gradtools.attacks.ascent import CompiledAscent, ascend
from keras_gradtools.attacks.attack import Attack
from keras_gradtools.attacks.batches import map_batches, require_examples, require_labels
from keras_gradtools.attacks.data_range import bounds, require_clip
from keras_gradtools.attacks.objectives import NAMED, Objective


class GradientAttack(Attack):
    """Gradient ascent on the objectives, within a ball around each example and within the range of the data.

    The public subclasses document the options.
    """

    steps = 1
    random_start = False

    def __init__(
        self,
        epsilon: float,
        norm: Literal["inf", 2],
        clip: tuple[float, float] | None,
        loss: str | Sequence[str] | None,
        targeted: bool,
    ) -> None:
        self.epsilon: float = validation.require_number(self.name, "epsilon", epsilon, least=0)
        self.norm = norm_balls.require_norm(self.name, norm)
        self.clip: tuple[float, float] | None = require_clip(self.name, clip)
        self.targeted: bool = validation.require_flag(self.name, "targeted", targeted)
        self.objectives: tuple[Objective, ...] = tuple(
            Objective(loss, -1.0 if targeted else 1.0) for loss in self._require_losses(loss)
        )

    @property
    def rate(self) -> float:
        """The step size as a fraction of `epsilon`."""
        return 1.0

    def perturb(self, model: Function, x: Nested, y: Nested, seed: Any = None) -> Tensor:
        """The perturbed examples as constants. Can be called inside a compiled function.

        They are the end points of one run on the first of the losses. The model is called in inference mode and is not
        changed. No gradient reaches its weights.
        """
        x = ops.convert_to_tensor(x)
        low, high = bounds(self.clip, x.dtype)
        epsilon = ops.full((ops.shape(x)[0],), self.epsilon, dtype=x.dtype)
        moved = x
        if self.random_start:
            moved = ops.clip(x + norm_balls.random_points(x, epsilon, self.norm, seed), low, high)
        for _ in range(self.steps):
            moved, _ = ascend(
                model, self.objectives[0], self.norm, moved, x, y, epsilon, self.rate * epsilon, low, high
            )
        return ops.stop_gradient(moved)

    def generate(
        self,
        model: Function,
        x: Nested,
        y: Nested,
        batch_size: int = 128,
        verbose: Verbose = "auto",
        inputs: InputNames = None,
    ) -> Tensor:
        """The perturbed examples as a NumPy array, or in the nested structure of `x`, computed batch by batch."""
        batch_size = validation.require_count(self.name, "batch_size", batch_size)
        validation.require_verbose(self.name, verbose)
        names = chosen_inputs.require_names(self.name, inputs)
        examples = require_examples(self.name, model, x, y, self.clip, names)
        if all(objective.is_named for objective in self.objectives):
            require_labels(self.name, model, examples)
        ascent = CompiledAscent(model, self.norm, self.clip, examples)
        attacker = self._attacker(ascent)

        def attacked(x, y, *rest):
            x, y = ops.convert_to_tensor(x), ops.convert_to_tensor(y)
            ascent.carry(examples.carried(x, rest))
            epsilon = ops.full((len(x),), self.epsilon, dtype=x.dtype)
            return [ops.convert_to_numpy(attacker(x, y, epsilon))]

        return examples.with_perturbed(map_batches(attacked, examples.arrays, batch_size, verbose, self.name)[0])

    def _attacker(self, ascent):
        """A function `(x, y, epsilon)` that returns the perturbed examples of one batch."""
        raise NotImplementedError

    def get_config(self) -> dict[str, Any]:
        return {
            "epsilon": self.epsilon,
            "norm": self.norm,
            "clip": self.clip,
            "loss": self._loss_config(),
            "targeted": self.targeted,
        }

    def _loss_config(self):
        losses = [
            o.loss if isinstance(o.loss, str) else keras.saving.serialize_keras_object(o.loss) for o in self.objectives
        ]
        return losses[0] if len(losses) == 1 else losses

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Self:
        loss = config["loss"]
        if isinstance(loss, dict):
            loss = keras.saving.deserialize_keras_object(loss, custom_objects=custom_objects)
        return cls(**config | {"loss": loss})

    def _require_losses(self, loss):
        losses = tuple(loss) if isinstance(loss, (tuple, list)) else (loss,)
        is_named = [isinstance(each, str) and each in NAMED for each in losses]
        if losses and all(is_named) or len(losses) == 1 and (callable(losses[0]) or isinstance(losses[0], str)):
            return losses
        expected = "'cross_entropy', 'margin', both in a tuple, a Keras loss or a function (y, y_pred)"
        raise validation.refused(self.name, expected, "loss", loss)
