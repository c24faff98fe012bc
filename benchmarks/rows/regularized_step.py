"""Training steps with the input gradient penalty, as `fit` runs them."""

import keras

from benchmarks.rows import row
from keras_gradtools.models import InputGradientRegularized

WEIGHT = 0.1
STEP_SIZE = 0.1


def compiled(model):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.Adam(1e-4), loss=loss)
    return model


def example_losses(y, y_pred):
    return keras.losses.sparse_categorical_crossentropy(y, y_pred, from_logits=True)


def copy_of(model):
    """A copy of the model, because both sides of a comparison train theirs."""
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    return twin


class Handwritten(keras.Model):
    """The base class of the hand-written training steps: the model and the metrics."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.penalty_tracker = keras.metrics.Mean(name="penalty")
        self.norm_tracker = keras.metrics.Mean(name="norm")
        self.built = True

    def call(self, x, training=None):
        return self.model(x, training=training)


def plain_step(model, compiler):
    return compiled(copy_of(model)).train_on_batch


def step(model, **options):
    return compiled(InputGradientRegularized(copy_of(model), WEIGHT, **options)).train_on_batch


def against(name, sizes, **options):
    return row(name, sizes, modes=("fit",), grow=False, **options)


def over_plain(name, sizes, target=None):
    return against(name, sizes, target=target, reference=plain_step, check=False)


SMOOTH = {"demo's model": (64, 512), "conv net": 32, "image conv net": 32}
KINKED = {"image conv net, ReLU": 32}
LARGE = {"image conv net": 32}


@against("exact step", SMOOTH, target={"tensorflow": 1.05, "jax": 1.05, "torch": 1.1})
def exact_step(model):
    return step(model, method="exact")


@against("finite-difference step", SMOOTH | KINKED, target={"tensorflow": 1.05, "jax": 1.05, "torch": 1.1})
def finite_difference_step(model):
    return step(model, method="finite_difference", step_size=STEP_SIZE)


@over_plain("exact step over plain step", LARGE, target={"tensorflow": 2.2, "jax": 2.2, "torch": 2.9})
def exact_over_plain(model):
    return exact_step(model)


@over_plain(
    "finite-difference step over plain step", LARGE | KINKED, target={"tensorflow": 2.6, "jax": 2.6, "torch": 2.8}
)
def finite_difference_over_plain(model):
    return finite_difference_step(model)


@over_plain("exact step over plain step, smaller", {"demo's model": (64, 512), "conv net": 32})
def exact_over_plain_smaller(model):
    return exact_step(model)


@over_plain("finite-difference step over plain step, smaller", {"demo's model": (64, 512), "conv net": 32})
def finite_difference_over_plain_smaller(model):
    return finite_difference_step(model)
