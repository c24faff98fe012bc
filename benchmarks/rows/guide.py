"""Repeated calls of our transforms, compared with the eager code of TensorFlow's guide on its own small models."""

from keras import ops

import keras_gradtools as kg
from benchmarks.rows import row


def over_guide(name, model):
    return row(name, {model: 7}, modes=("eager",), backends=("tensorflow",), target=1 / 30, grow=False)


@over_guide("batch Jacobian over the guide's code", "guide's layers, ELU")
def guide_batch_jacobian(model):
    transformed = kg.batch_jacobian(model)
    return lambda x, y: transformed(x)


@over_guide("Jacobian over the guide's code", "guide's layer")
def guide_jacobian(model):
    apply, _ = kg.functionalize(model)
    transformed = kg.jacobian(lambda kernel, bias, x: apply([kernel, bias], x))
    (layer,) = model.layers
    return lambda x, y: transformed(layer.kernel, layer.bias, x)


@over_guide("Hessian over the guide's code", "guide's layers, ReLU")
def guide_hessian(model):
    apply, _ = kg.functionalize(model)

    def value(kernel, others, x):
        return ops.mean(apply([kernel, *others], x) ** 2)

    transformed = kg.hessian(value)
    kernel, *others = model.trainable_variables
    return lambda x, y: transformed(kernel, others, x)
