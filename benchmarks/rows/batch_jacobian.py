"""The Jacobian of each example's outputs with respect to its inputs, by a tape."""

import keras_gradtools as kg
from benchmarks.rows import row


@row("batch Jacobian", {"MLP": 32, "conv net": 8})
def batch_jacobian(model):
    def ours(x, y):
        with kg.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(x)
            logits = model(x)
        return tape.batch_jacobian(logits, x)

    return ours


@row("batch Jacobian, usual code", {"MLP": 32, "conv net": 8}, modes=("compiled",), backends=("jax",))
def batch_jacobian_usual(model):
    return batch_jacobian(model)
