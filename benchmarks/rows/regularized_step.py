"""A training step with the input-gradient penalty, as `fit` runs it."""

import keras

from benchmarks.rows import row
from keras_gradtools.models import InputGradientRegularized

WEIGHT = 0.1


def compiled(model):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.Adam(1e-4), loss=loss)
    return model


def copy_of(model):
    """The two sides train, so that each needs a model of its own."""
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    return twin


SIZES = {"demo's model": (64, 512), "conv net": 32}


@row("regularized step", SIZES, modes=("fit",), target=1.1, grow=False)
def regularized_step(model):
    return compiled(InputGradientRegularized(copy_of(model), weight=WEIGHT)).train_on_batch


@row("regularized step over plain step", SIZES, modes=("fit",), grow=False, check=False)
def plain_step(model):
    return regularized_step(model)
