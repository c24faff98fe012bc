"""The curvature operators: a product over the batches of a data set, and the dense Hessian of all weights."""

import keras
import numpy as np

import keras_gradtools as kg
from benchmarks.models import direction
from benchmarks.rows import row, with_preparation

# The default batch size of the operators, or less where the hand-written product takes long.
BATCHES = {"MLP": 256, "conv net": 64, "wide MLP": 256}
# The operators choose how they compile.
MODES = ("self-compiled",)
# The number of batches in the data set. The last one has half the size of the others.
BATCHES_OF_DATA = 4


def batches_of(x, y):
    """A data set made from one batch, whose last batch is smaller."""
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


@row("Hessian product over a data set", BATCHES, modes=MODES)
def accumulated_hvp(model):
    return _accumulated(kg.curvature.Hessian, model)


@row("Gauss-Newton product over a data set", BATCHES, modes=MODES)
def accumulated_ggnvp(model):
    return _accumulated(kg.curvature.GaussNewton, model)


@row(
    "dense Hessian",
    {"digits classifier": (256, 1024)},
    modes=MODES,
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
