"""First derivatives of the loss, by a tape."""

import keras_gradtools as kg
from benchmarks.models import loss
from benchmarks.rows import row


@row("gradient by weights", {"MLP": 64, "conv net": 32})
def gradient_by_weights(model):
    def ours(x, y):
        with kg.GradientTape() as tape:
            value = loss(y, model(x))
        return tape.gradient(value, model.trainable_variables)

    return ours


@row("gradient by inputs", {"MLP": 128, "conv net": 32})
def gradient_by_inputs(model):
    def ours(x, y):
        with kg.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(x)
            value = loss(y, model(x))
        return tape.gradient(value, x)

    return ours
