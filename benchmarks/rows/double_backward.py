"""A second derivative: the weight gradient of the squared norm of the input gradient."""

from keras import ops

import keras_gradtools as kg
from benchmarks.models import loss
from benchmarks.rows import row


@row("double backward", {"MLP": 64, "conv net": 16})
def double_backward(model):
    def ours(x, y):
        with kg.GradientTape() as outer:
            with kg.GradientTape(watch_accessed_variables=False) as inner:
                inner.watch(x)
                value = loss(y, model(x))
            penalty = ops.sum(ops.square(inner.gradient(value, x)))
        return outer.gradient(penalty, model.trainable_variables)

    return ours
