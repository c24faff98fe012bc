"""The cost of derivatives in units of a hand-written gradient, at sizes where computation dominates."""

from benchmarks.rows import COMPILED, SELF_COMPILED, jacobians, products, row

BATCHES = {"MLP": 512, "conv net": 128, "wide MLP": 512}
LEAST_MS = 20.0
# Both sides compiled, or neither.
COSTS = {**COMPILED, "torch": ("eager", "inductor, both")}


def _targets(compiled, torch):
    return {"tensorflow": compiled, "jax": compiled, "torch": torch}


def over_gradient_by_weights(name, targets):
    return row(
        name,
        BATCHES,
        modes=COSTS,
        target=targets,
        check=False,
        least_ms=LEAST_MS,
        compiles=True,
        reference="gradient_by_weights",
    )


@over_gradient_by_weights("Hessian product over one gradient", _targets(2.2, 2.5))
def hvp(model, compiler):
    return products.hvp(model, compiler)


@over_gradient_by_weights("linearized Hessian product over one gradient", _targets(1.6, 2.0))
def linearized_hvp(model, compiler):
    return products.linearized_hvp(model, compiler)


@over_gradient_by_weights("Gauss-Newton product over one gradient", _targets(1.8, 2.2))
def ggnvp(model, compiler):
    return products.ggnvp(model, compiler)


# The target for the conv net on JAX: ten outputs for the cost of six gradients.
@row(
    "batch Jacobian over one gradient",
    {"conv net": 32},
    modes={**SELF_COMPILED, "torch": ("self-compiled", "inductor, both")},
    target={"jax": 6.0},
    check=False,
    least_ms=LEAST_MS,
    reference="gradient_of_sum_by_inputs",
)
def batch_jacobian(model):
    return jacobians.batch_jacobian(model)
