"""The curvature operators: a product summed over the batches of a data set, and the dense Hessian by all weights."""

import keras
import numpy as np

import keras_gradtools as kg
from benchmarks.models import direction
from benchmarks.rows import SELF_COMPILED, row, with_preparation

# The operators' own batch size, but where the hand-written product takes long.
BATCHES = {"MLP": 256, "conv net": 64, "wide MLP": 256}
# Of the data set: each batch but the last one, which is half of it.
BATCHES_OF_DATA = 4


def batches_of(x, y):
    """A data set made of one batch, whose last batch is a smaller one."""
    whole = [(keras.ops.roll(x, i, axis=0), keras.ops.roll(y, i, axis=0)) for i in range(BATCHES_OF_DATA - 1)]
    return [*whole, (x[: len(x) // 2], y[: len(y) // 2])]


def operator(cls, model, data, **options):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return cls(model, loss, data, verbose=0, **options)


def _accumulated(cls, model):
    v = direction(model)

    def prepare(x, y):
        matrix = operator(cls, model, batches_of(x, y))
        return lambda: matrix @ v

    return with_preparation(prepare)


@row("Hessian product over a data set", BATCHES, modes=SELF_COMPILED)
def accumulated_hvp(model):
    return _accumulated(kg.curvature.Hessian, model)


@row("Gauss-Newton product over a data set", BATCHES, modes=SELF_COMPILED)
def accumulated_ggnvp(model):
    return _accumulated(kg.curvature.GaussNewton, model)


@row(
    "dense Hessian",
    {"digits classifier": (256, 1024)},
    modes=SELF_COMPILED,
    target=dict.fromkeys(("tensorflow", "jax", "torch"), 1.1),
    tolerance=1e-6,
    grow=False,
)
def dense_hessian(model):
    def prepare(x, y):
        matrix = operator(kg.curvature.Hessian, model, [(x, y)])

        def dense():
            found = matrix.dense()
            asymmetry = np.abs(found - found.T).max() / np.abs(found).max()
            if not asymmetry < 1e-6:
                raise AssertionError(f"The Hessian has an asymmetry of {asymmetry:.0e}.")
            return found

        dense()
        return matrix.dense

    return with_preparation(prepare)
