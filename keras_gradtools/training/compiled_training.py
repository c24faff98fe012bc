"""`fit` with compiled steps, also on torch."""

from typing import Any

import keras

from keras_gradtools.training.residual_training import ResidualTraining

NAME = "CompiledTraining"


@keras.saving.register_keras_serializable(package="keras_gradtools")
class CompiledTraining(ResidualTraining):
    """Trains a model with plain `fit`, whose steps are compiled on every backend.

    Compile, fit, evaluate, predict, save and export it like any other model. It trains the wrapped model itself,
    `compiled.model`, and gives the same weights. TensorFlow and JAX compile the steps of every model. On torch, Keras
    runs them eagerly, or with torch's own compiler, which cannot differentiate twice. Here a whole step is recorded and
    run again, as by `kg.jit`: the forward pass, derivatives of any order, the optimizer and the metrics. The results
    are exactly those of the eager step. Small models, and derivatives inside a model or its loss, gain most.

    `run_eagerly=True` in `compile` turns this off. On torch, `jit_compile="inductor"` compiles the recorded step with
    torch's compiler, which takes seconds or more and rounds differently. On TensorFlow, `jit_compile="xla"` means the
    same as `jit_compile=True`. `loss` may also be a `kg.losses.SquaredResiduals`, so that Adam can train on residuals
    before `kg.models.SecondOrder` continues with them.

    Args:
        model: A built `keras.Model`. It is shared, not copied.
        **kwargs: `name`, `trainable` and `dtype`, as for any `keras.Model`. `dtype` defaults to that of `model`.

    Raises:
        ValueError: If `model` is not built. In `save`, for an HDF5 file.

    Cost:
        That of a training step. On torch, the first three steps with a new shape of the batch are recorded. Each of
        them takes about as long as five eager steps.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")])
    >>> compiled = kg.models.CompiledTraining(model)
    >>> compiled.compile(keras.optimizers.SGD(0.25), "mse")
    >>> x = np.ones((8, 1), "float32")
    >>> history = compiled.fit(x, x, batch_size=2, epochs=1, verbose=0)
    >>> float(model.get_weights()[0][0, 0])  # the distance to 1 is halved in each of four steps
    0.9375
    """

    def __init__(self, model: keras.Model, **kwargs: Any) -> None:
        super().__init__(NAME, model, **kwargs)

    def _compiles(self):
        return not self.run_eagerly

    def _require_labels(self, y):
        """Keras itself says what is missing: a model may have only losses that its layers add."""
