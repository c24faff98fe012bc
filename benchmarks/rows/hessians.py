"""The Hessian of the loss with respect to one kernel: by `hessian`, and by `kernel_hessian`."""

import keras_gradtools as kg
from benchmarks.models import HESSIAN_CHUNK, HESSIAN_KERNEL, HESSIAN_LAYER, loss
from benchmarks.rows import SELF_COMPILED, row


def _transformed(model, chunk_size):
    apply, w = kg.functionalize(model)
    i = HESSIAN_KERNEL

    def value(kernel, w, x, y):
        return loss(y, apply([*w[:i], kernel, *w[i + 1 :]], x))

    matrix = kg.hessian(value, chunk_size=chunk_size)

    return lambda x, y: matrix(w[i], w, x, y)


@row("Hessian of one kernel", {"small MLP": 32}, modes=SELF_COMPILED)
def hessian(model):
    return _transformed(model, None)


@row("Hessian of one kernel, in chunks", {"small MLP": 256}, modes=SELF_COMPILED)
def hessian_in_chunks(model):
    return _transformed(model, HESSIAN_CHUNK)


# Both are in single precision, so the difference between them is the rounding of both. The target is 1e-6.
@row(
    "kernel Hessian by pre-activations",
    {"small MLP": (32, 256)},
    modes=SELF_COMPILED,
    target=0.25,
    tolerance=1e-6,
    grow=False,
    reference="hessian_in_chunks",
)
def kernel_hessian(model):
    return kg.kernel_hessian(lambda x, y: loss(y, model(x)), model.layers[HESSIAN_LAYER])
