"""Forward over reverse compared with reverse over reverse, for a product with the Hessian. Both are our code."""

import keras_gradtools as kg
from benchmarks.models import direction
from benchmarks.rows import row
from benchmarks.rows.products import BATCHES, objective, weights


def reverse_over_reverse(model, compiler):
    value, v = objective(model), direction(model)

    def product(w, v, x, y):
        # A vjp of the gradient is a product with the transposed Hessian, which is symmetric.
        return kg.vjp(kg.grad(lambda w: value(w, x, y)), w)[1](v)

    product = compiler(product)
    return lambda x, y: product(weights(model), v, x, y)


@row(
    "forward over reverse, over reverse twice",
    BATCHES,
    modes=("eager", "compiled"),
    target={},
    least_ms=20.0,
    compiles=True,
    reference=reverse_over_reverse,
)
def forward_over_reverse(model, compiler):
    value, v = objective(model), direction(model)
    product = compiler(lambda w, v, x, y: kg.jvp(kg.grad(lambda w: value(w, x, y)), (w,), (v,))[1])
    return lambda x, y: product(weights(model), v, x, y)
