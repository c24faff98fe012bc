"""The code of the works, the same on every backend.

Each function takes a model, inputs and labels, and returns a function and its arguments. The function is compiled by
`kg.jit`, and weights are arguments of it. Training steps are compiled by Keras and the model wrappers instead.
"""

import keras
from keras import ops

import keras_gradtools as kg
from benchmarks import models


def _objective(model):
    """The loss as a pure function of the weights, and copies of the weights."""
    apply, weights = kg.functionalize(model)
    return lambda w, x, y: models.loss(y, apply(w, x)), weights


def gradient(model, x, y):
    value, w = _objective(model)
    return kg.grad(value), (w, x, y)


def double_backward(model, x, y):
    value, w = _objective(model)
    return kg.grad(lambda w, x, y: ops.sum(ops.square(kg.grad(value, argnums=1)(w, x, y)))), (w, x, y)


def hvp(model, x, y):
    value, w = _objective(model)
    return lambda w, v, x, y: kg.hvp(lambda w: value(w, x, y), (w,), (v,)), (w, models.direction(model), x, y)


def ggnvp(model, x, y):
    apply, w = kg.functionalize(model)

    def product(w, v, x, y):
        return kg.ggnvp(lambda w: apply(w, x), lambda outputs: models.loss(y, outputs), (w,), (v,))

    return product, (w, models.direction(model), x, y)


def batch_jacobian(model, x, y):
    return kg.batch_jacobian(model), (x,)


def per_example_gradients(model, x, y):
    value, w = _objective(model)
    return kg.per_example_grad(value), (w, x, y)


def hessian(model, x, y):
    value, w = _objective(model)
    i = models.HESSIAN_KERNEL
    by_kernel = kg.hessian(lambda kernel, w, x, y: value([*w[:i], kernel, *w[i + 1 :]], x, y))
    return by_kernel, (w[i], w, x, y)


def kernel_hessian(model, x, y):
    return kg.kernel_hessian(lambda x, y: models.loss(y, model(x)), model.layers[models.HESSIAN_LAYER]), (x, y)


def laplacian(model, x, y):
    return kg.laplacian(model), (x,)


# It compiles itself, and checks the result outside of what it compiles.
SELF_COMPILED = ("kernel_hessian",)


def prepared(function, model, x, y, compiler):
    """The work `function`, compiled, as a function without arguments."""
    fun, arguments = globals()[function](model, *map(ops.convert_to_tensor, (x, y)))
    compiled = fun if function in SELF_COMPILED and compiler is None else kg.jit(fun, compiler=compiler)
    return lambda: compiled(*arguments)


# The model wrappers of the training steps.
STEPS = {
    "plain_step": kg.models.CompiledTraining,
    "penalized_step": lambda model: kg.models.InputGradientRegularized(model, 0.1, method="exact"),
}


def prepared_step(function, model, x, y, jit_compile):
    """A training step as `fit` runs it, as a function without arguments that returns the logs."""
    trained = STEPS[function](model)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    trained.compile(keras.optimizers.Adam(1e-3), loss, jit_compile=jit_compile)
    return lambda: trained.train_on_batch(x, y, return_dict=True)
