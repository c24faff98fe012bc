"""Products with the Hessian and the Gauss-Newton matrix of all weights, and per-example gradients."""

import keras_gradtools as kg
from benchmarks.models import direction, loss
from benchmarks.rows import BY_INDUCTOR, COMPILED, row, with_preparation

MODES = ("eager", "compiled", "replayed", *BY_INDUCTOR)
BATCHES = {"MLP": 64, "conv net": 16, "wide MLP": 128}


def objective(model):
    """The loss as a pure function of the weights."""
    apply, _ = kg.functionalize(model)
    return lambda w, x, y: loss(y, apply(w, x))


def weights(model):
    """Copies of the weights, so that nothing outside of the product is differentiated."""
    return kg.functionalize(model)[1]


@row("Hessian-vector product", BATCHES, modes=MODES, compiles=True)
def hvp(model, compiler):
    value, w, v = objective(model), weights(model), direction(model)
    product = compiler(lambda w, v, x, y: kg.hvp(lambda w: value(w, x, y), (w,), (v,)))
    return lambda x, y: product(w, v, x, y)


@row("Hessian-vector product, linearized", BATCHES, modes=MODES, compiles=True)
def linearized_hvp(model, compiler):
    value, v = objective(model), direction(model)

    def prepare(x, y):
        _, push = kg.linearize(kg.grad(lambda w: value(w, x, y)), weights(model))
        push = compiler(push)
        return lambda: push(v)

    return with_preparation(prepare)


@row("Gauss-Newton product", BATCHES, modes=MODES, compiles=True)
def ggnvp(model, compiler):
    apply, w = kg.functionalize(model)
    v = direction(model)

    def product(w, v, x, y):
        return kg.ggnvp(lambda w: apply(w, x), lambda outputs: loss(y, outputs), (w,), (v,))

    product = compiler(product)
    return lambda x, y: product(w, v, x, y)


@row("per-example gradients", {"MLP": 16, "conv net": 16, "wide MLP": 16}, modes=COMPILED, compiles=True)
def per_example_gradients(model, compiler):
    gradients, w = compiler(kg.per_example_grad(objective(model))), weights(model)
    return lambda x, y: gradients(w, x, y)
