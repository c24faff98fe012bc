"""Random noise, the baseline that an attack and a defence have to beat."""

import math

import keras
from keras import ops

from keras_gradtools import validation
from keras_gradtools.attacks.attack import Attack
from keras_gradtools.attacks.data_range import bounds, checked_clip


@keras.saving.register_keras_serializable(package="keras_gradtools")
class GaussianNoise(Attack):
    """Adds noise to examples, for `kg.models.AdversarialTraining`: the baseline for what it trains otherwise.

    Args:
        stddev: the standard deviation of the noise of each number of an example, in units of the input.
        clip: the range to clip to, `(smallest, largest)`; None, the default, leaves the noise as it is.

    Raises:
        ValueError: if `stddev` is not a number of 0 or more, or `clip` no range.

    Example:

    >>> import keras_gradtools as kg
    >>> kg.attacks.GaussianNoise(0.3).stddev
    0.3

    Source: Bishop, "Training with noise is equivalent to Tikhonov regularization" (Neural Computation 7(1), 1995).
    """

    def __init__(self, stddev, clip=None):
        if not validation.is_number(stddev) or not math.isfinite(stddev) or stddev < 0:
            raise ValueError(
                "GaussianNoise expects a finite number of 0 or more as `stddev`. Received: "
                f"stddev={validation.describe(stddev)}."
            )
        self.stddev, self.clip = float(stddev), checked_clip("GaussianNoise", clip)

    def perturb(self, model, x, y, seed=None):
        """Noisy examples; nothing depends on the model or the labels."""
        x = ops.convert_to_tensor(x)
        noisy = x + ops.cast(keras.random.normal(ops.shape(x), stddev=self.stddev, seed=seed), x.dtype)
        return noisy if self.clip is None else ops.clip(noisy, *bounds(self.clip, noisy.dtype))

    def get_config(self):
        return {"stddev": self.stddev, "clip": self.clip}
