"""Fast products with flat NumPy vectors at fixed weights, for solvers and estimators."""

import numpy as np
from keras import ops

from keras_gradtools import backend
from keras_gradtools.curvature.data import batch_sums
from keras_gradtools.curvature.data.batches import batch_size_of
from keras_gradtools.curvature.data.data_sums import on_devices
from keras_gradtools.curvature.operators.solver_vectors import solver_dtype


def fast_matvec(sums):
    """A function that multiplies a flat NumPy vector, at the current weights. None if `@` is as fast."""
    if not sums.is_one_batch:
        return None
    if backend.LINEARIZES_ONCE:
        return matvec_by_one_tape(sums)
    # Large models use the existing program of `operator @ vector`, whose call overhead is small compared with the
    # product.
    return matvec_by_one_program(sums) if sums.is_quick_to_trace else None


def matvec_by_one_tape(sums):
    """The product from one tape, which computes everything that does not depend on the vector once."""
    sums.prepare()
    (batch,) = sums.batches
    size, batch, parameters = batch_size_of(batch), on_devices(batch), sums.parameters
    spec = sums.spec.drawing(sums.draws)
    linear = spec.of_batch(sums.model, parameters.variables_as_tensors(), batch, sums.seed(0))
    linear.linearize()

    def product(vector):
        products = linear.apply(parameters.split(np.asarray(vector)))
        totals, count = backend.summed_over_processes([size * ops.stop_gradient(p) for p in products], size)
        return parameters.joined_in_numpy([total / count for total in totals])

    return product


def matvec_by_one_program(sums):
    """The product from a program that takes a few tensors, not two for each variable.

    On small models, passing so many tensors takes longer than the product.
    """
    sums.prepare()
    (batch,) = sums.batches
    size, seed, batch = batch_size_of(batch), sums.seed(0), on_devices(batch)
    dtype, values = solver_dtype(sums.parameters.dtype), sums.draws.values
    run = sums.compiled("flat product", batch_sums.flat_product, np.zeros(sums.parameters.size, dtype), batch, seed)

    def product(vector):
        # Passing an array is faster than converting it with Keras.
        total, _ = run((values, np.asarray(vector, dtype), batch, seed), {})
        (total,), count = backend.summed_over_processes([total], size)
        return ops.convert_to_numpy(total) / count

    return product
