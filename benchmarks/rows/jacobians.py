"""Jacobian transforms, which compile themselves, compared with compiled hand-written code."""

import keras_gradtools as kg
from benchmarks.rows import COMPILED, SELF_COMPILED, row

BATCHES = {"MLP": 32, "conv net": 8, "wide MLP": 32}


@row("batch Jacobian, transform", BATCHES, modes=SELF_COMPILED, reference="batch_jacobian")
def batch_jacobian(model):
    transformed = kg.batch_jacobian(model)
    return lambda x, y: transformed(x)


@row("batch Jacobian inside jit", BATCHES, modes=COMPILED, backends=("tensorflow", "jax"), reference="batch_jacobian")
def batch_jacobian_inside(model):
    return batch_jacobian(model)


@row("full Jacobian", {"MLP": 4, "conv net": 2}, modes=SELF_COMPILED)
def jacobian(model):
    # Includes the zero blocks between different examples. growth.py shows their cost.
    transformed = kg.jacobian(lambda x: model(x))
    return lambda x, y: transformed(x)


@row("full Jacobian, more outputs than inputs", {"decoder": 4}, modes=SELF_COMPILED)
def jacobian_of_decoder(model):
    return jacobian(model)
