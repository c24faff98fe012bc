"""Training steps with the input gradient penalty, as `fit` runs them."""

import keras

from benchmarks.rows import FIT, row
from keras_gradtools.models import CompiledTraining, InputGradientRegularized

WEIGHT = 0.1
STEP_SIZE = 0.1
LEARNING_RATE = 1e-4


def compiled(model, jit_compile="auto"):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.Adam(LEARNING_RATE), loss=loss, jit_compile=jit_compile)
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


def plain_step(model, jit_compile):
    """A step without a penalty, compiled as the other side is. Keras itself compiles it on TensorFlow and JAX."""
    if jit_compile in (False, "auto"):
        return compiled(copy_of(model), jit_compile).train_on_batch
    return compiled(CompiledTraining(copy_of(model)), jit_compile).train_on_batch


def eager_step(model, jit_compile):
    """A plain step as Keras runs it on torch by default."""
    return compiled(copy_of(model)).train_on_batch


def step_by_keras(model, jit_compile):
    """A plain step with Keras' own `jit_compile=True`."""
    return compiled(copy_of(model), True).train_on_batch


def step(model, jit_compile, **options):
    return compiled(InputGradientRegularized(copy_of(model), WEIGHT, **options), jit_compile).train_on_batch


def against(name, sizes, modes=FIT, **options):
    return row(name, sizes, modes=modes, grow=False, compiles=True, **options)


def over_plain(name, sizes, target=None):
    # The same mode on both sides.
    return against(name, sizes, modes=FIT[:3], target=target, reference=plain_step, check=False)


SMOOTH = {"demo's model": (64, 512), "conv net": 32, "image conv net": 32}
KINKED = {"image conv net, ReLU": 32}
LARGE = {"image conv net": 32}


@against("exact step", SMOOTH, target={"tensorflow": 1.05, "jax": 1.05, "torch": 1.1})
def exact_step(model, jit_compile):
    return step(model, jit_compile, method="exact")


# With kinks, the last bits decide on which side of one a pixel is, so that two right steps may differ by more.
@against(
    "finite-difference step", SMOOTH | KINKED, target={"tensorflow": 1.05, "jax": 1.05, "torch": 1.1}, tolerance=1e-2
)
def finite_difference_step(model, jit_compile):
    return step(model, jit_compile, method="finite_difference", step_size=STEP_SIZE)


@over_plain("exact step over plain step", LARGE, target={"tensorflow": 2.2, "jax": 2.2, "torch": 2.9})
def exact_over_plain(model, jit_compile):
    return exact_step(model, jit_compile)


@over_plain(
    "finite-difference step over plain step", LARGE | KINKED, target={"tensorflow": 2.6, "jax": 2.6, "torch": 2.8}
)
def finite_difference_over_plain(model, jit_compile):
    return finite_difference_step(model, jit_compile)


@over_plain("exact step over plain step, smaller", {"demo's model": (64, 512), "conv net": 32})
def exact_over_plain_smaller(model, jit_compile):
    return exact_step(model, jit_compile)


@over_plain("finite-difference step over plain step, smaller", {"demo's model": (64, 512), "conv net": 32})
def finite_difference_over_plain_smaller(model, jit_compile):
    return finite_difference_step(model, jit_compile)


@against("plain step over Keras' eager step", SMOOTH, modes=FIT[1:3], backends=("torch",), reference=eager_step)
def compiled_step(model, jit_compile):
    return plain_step(model, jit_compile)


@against("plain step over Keras' compiled step", SMOOTH, modes=FIT[1:3], backends=("torch",), reference=step_by_keras)
def compiled_over_compiled(model, jit_compile):
    return plain_step(model, jit_compile)
