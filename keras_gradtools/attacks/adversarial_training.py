"""Adversarial training: every batch is attacked before it is trained on."""

from typing import Any, Self

import keras

from keras_gradtools import chosen_inputs, nesting, validation
from keras_gradtools.annotations import InputNames, Nested
from keras_gradtools.attacks.perturbed_input import OfOneInput
from keras_gradtools.training.wrapped_model import StateOfStep, WrappedModel, no_labels

NAME = "AdversarialTraining"


@keras.saving.register_keras_serializable(package="keras_gradtools")
class AdversarialTraining(WrappedModel):
    r"""Trains a model on attacked examples: $\min_\theta \frac1N \sum_i w_i \, \ell_i(x'_i)$.

    $x'_i$ is the attacked version of example $x_i$, and $w_i$ its sample weight.

    Compile, fit, evaluate, call, save and export it like any other model. It trains the wrapped model itself,
    `adversarial.model`. Every training step attacks its batch with the current weights, in inference mode: dropout is
    off, and BatchNormalization uses its moving statistics, which the attack does not update. No gradient flows through
    the attack. The training loss and metrics are computed on the attacked examples. `evaluate` and the `val_...`
    metrics use the original examples.

    Save it to a `.keras` file. `keras.models.load_model` finds the class in every process that has imported
    `keras_gradtools`. Without the import, Keras raises "Could not locate class".

    Args:
        model: A built `keras.Model` with one floating-point input, or with several inputs of which one is attacked. It
            is shared, not copied.
        attack: `kg.attacks.FGSM`, `kg.attacks.PGD` or `kg.attacks.GaussianNoise` with its options, or any object with a
            method `perturb(model, x, y, seed)` that returns the perturbed `x`. In training, PGD does a single run on
            the first of its losses and uses the last point of that run.
        seed: An integer that seeds random starts and noise. Keras does not save the states of seeds, so a loaded model
            starts again from this seed.
        inputs: Name, key or position of the input to attack if the model has several. Default: the only floating-point
            input. The other inputs are not changed.
        **kwargs: `name`, `trainable` and `dtype`, as for any `keras.Model`. `dtype` defaults to that of `model`.

    Raises:
        ValueError: If `model` is not built, if several inputs could be attacked and `inputs` does not say which, or if
            `attack` has no `perturb` method. In a training step, if there are no labels. The weights do not change. In
            `save`, for an HDF5 file.

    Cost:
        Relative to a plain training step, counted as 3 forward passes: 5/3 for FGSM, 1 + 2 n / 3 for PGD with n steps,
        1 for noise.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, use_bias=False)])
    >>> adversarial = kg.models.AdversarialTraining(model, kg.attacks.FGSM(0.1))
    >>> adversarial.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    >>> x, y = np.full((8, 2), 0.5, "float32"), np.zeros(8, "int32")
    >>> history = adversarial.fit(x, y, epochs=2, verbose=0)
    >>> history.history["loss"][1] < history.history["loss"][0]
    True

    Source: Goodfellow et al. (arXiv:1412.6572, 2014) for FGSM; Madry et al. (arXiv:1706.06083, 2017), equation 2.1.
    """

    def __init__(
        self, model: keras.Model, attack: Any, seed: int | None = None, inputs: InputNames = None, **kwargs: Any
    ) -> None:
        if not callable(getattr(attack, "perturb", None)):
            expected = "an attack, such as keras_gradtools.attacks.PGD(0.1, steps=7),"
            raise validation.refused(NAME, expected, "attack", attack)
        inputs = chosen_inputs.require_names(NAME, inputs)
        super().__init__(NAME, model, **kwargs)
        known = chosen_inputs.model_inputs(model)
        if known is not None and len(nesting.flatten(known)) > 1:
            chosen_inputs.choose_one(NAME, model, known, inputs)
        self._inputs = inputs
        self.attack = attack
        self._seed = validation.require_seed(NAME, seed, may_be_none=True)
        self._seeds = keras.random.SeedGenerator(self._seed)
        self._step: Any = StateOfStep(labels=None)

    def train_step(self, *args: Any) -> Any:
        _, y, _ = keras.utils.unpack_x_y_sample_weight(args[-1])
        if y is None:
            raise no_labels(NAME)
        self._step.labels = (y,)
        try:
            return super().train_step(*args)
        finally:
            self._step.labels = None

    def call(self, inputs: Nested, training: bool | None = None) -> Nested:
        if self._step.labels is not None:
            (y,) = self._step.labels
            inputs = self._attacked(inputs, y)
        return self._forward(inputs, training)

    def _attacked(self, inputs, y):
        if len(nesting.flatten(inputs)) == 1:
            return nesting.map_structure(lambda x: self.attack.perturb(self.model, x, y, self._seeds), inputs)
        inputs = chosen_inputs.as_tensors(inputs)
        chosen = chosen_inputs.choose_one(NAME, self.model, inputs, self._inputs)
        (x,) = chosen.parts(inputs)
        model = OfOneInput(self.model, chosen, inputs)
        return chosen.filled(inputs, [self.attack.perturb(model, x, y, self._seeds)])

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "attack": keras.saving.serialize_keras_object(self.attack),
            "seed": self._seed,
            "inputs": self._inputs,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Self:
        restored = {
            name: keras.saving.deserialize_keras_object(config[name], custom_objects=custom_objects)
            for name in ("model", "attack")
        }
        return cls(**config | restored)
