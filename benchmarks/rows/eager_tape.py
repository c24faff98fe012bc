"""The eager tape on JAX from the second run of a block on, when its derivative is compiled, over `jax.grad`."""

from benchmarks.rows import gradients, row


@row(
    "eager tape on JAX",
    {"MLP": (1, 32, 256), "conv net": (1, 8, 64)},
    modes=("eager",),
    backends=("jax",),
    target=0.5,
    grow=False,
)
def gradient_by_weights(model):
    return gradients.gradient_by_weights(model)
