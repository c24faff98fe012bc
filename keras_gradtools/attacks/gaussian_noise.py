"""Random noise, the baseline for attacks and defenses."""

from typing import Any

import keras
from keras import ops

from keras_gradtools import validation
from keras_gradtools.annotations import Function, Nested, Tensor
from keras_gradtools.attacks.attack import Attack
from keras_gradtools.attacks.data_range import bounds, require_clip


@keras.saving.register_keras_serializable(package="keras_gradtools")
class GaussianNoise(Attack):
    r"""Adds Gaussian noise to examples, as a baseline attack for `kg.models.AdversarialTraining`.

    $$x' = \text{clip}(x + n), \qquad n \sim \mathcal{N}(0, \text{stddev}^2)$$

    Args:
        stddev: The standard deviation of the noise added to each element of an example, in units of the input.
        clip: The range of the data, `(smallest, largest)`, to which the noisy examples are clipped. None, the default,
            does not clip.

    Raises:
        ValueError: If `stddev` is not a finite number of 0 or more, or `clip` is not a range.

    Cost:
        No gradient and no call of the model.

    Example:

    >>> import keras_gradtools as kg
    >>> kg.attacks.GaussianNoise(0.3).stddev
    0.3

    Source: Bishop, "Training with noise is equivalent to Tikhonov regularization" (Neural Computation 7(1), 1995).
    """

    def __init__(self, stddev: float, clip: tuple[float, float] | None = None) -> None:
        self.stddev = validation.require_number(self.name, "stddev", stddev, least=0)
        self.clip = require_clip(self.name, clip)

    def perturb(self, model: Function, x: Nested, y: Nested, seed: Any = None) -> Tensor:
        """The noisy examples. The model and the labels are not used."""
        x = ops.convert_to_tensor(x)
        noisy = x + ops.cast(keras.random.normal(ops.shape(x), stddev=self.stddev, seed=seed), x.dtype)
        return noisy if self.clip is None else ops.clip(noisy, *bounds(self.clip, noisy.dtype))

    def get_config(self) -> dict[str, Any]:
        return {"stddev": self.stddev, "clip": self.clip}
