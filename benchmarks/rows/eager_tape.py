"""The eager tape on JAX after its first runs, when the derivative is compiled, compared with eager `jax.grad`."""

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
