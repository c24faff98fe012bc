"""Jacobians as transforms: called as they are, compiled by themselves, over compiled hand-written code."""

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
    # With the blocks of zeros between the examples: growth.py shows what they cost.
    transformed = kg.jacobian(lambda x: model(x))
    return lambda x, y: transformed(x)


@row("full Jacobian, more outputs than inputs", {"decoder": 4}, modes=SELF_COMPILED)
def jacobian_of_decoder(model):
    return jacobian(model)
