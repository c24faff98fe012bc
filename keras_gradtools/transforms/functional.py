"""Keras computations as functions that a compiler can take."""

import keras
from keras import ops

from keras_gradtools import backend, validation, vectors
from keras_gradtools.backend.state import StateScope
from keras_gradtools.transforms import compiled
from keras_gradtools.transforms.taped_call import require_function


def jit(fun):
    """Compiles `fun` with the backend's compiler: `tf.function`, `jax.jit`, and on torch not at all.

    Keras variables are state, on every backend: `fun` reads their current values at every call, and what it
    assigns (BatchNormalization's statistics, the state of a dropout seed, the weights in a training step of
    your own) is written back.

    It is traced anew, and the former program kept, when something around `fun` has changed: what it closes over, its
    defaults, the globals and attributes that it names, what is in its lists and dicts; the same of the functions that
    it names; of models, their layers, what is trainable in them, their precision and the arguments that they were made
    with. Not seen is what is in an array that is changed in place, what is read by `getattr` or by the code of an
    installed package, and what `fun` itself changes while it is traced. All that compiles here goes by this rule.

    Args:
        fun: a function of tensors, in any nesting. Arrays and Python floats are inputs; anything else (an
            integer, a bool, a string, None) is a constant, and another value of it another program. Its
            Python runs only while it is traced, so its control flow must not depend on the values of
            tensors.

    Returns:
        A function with the signature of `fun`, which returns tensors in the nesting that `fun` returns.

    Cost:
        The first call for a new structure, shape or dtype of the arguments traces and compiles, which takes
        from a tenth of a second to minutes. On torch, whose compiler cannot differentiate twice, `fun` runs
        eagerly.

    Example:

    >>> import keras
    >>> import keras_gradtools as kg
    >>> counter = keras.Variable(0.0)
    >>> @kg.jit
    ... def add(x):
    ...     counter.assign_add(x)
    ...     return 2.0 * counter
    >>> float(add(1.0)), float(add(3.0)), float(counter)
    (2.0, 8.0, 4.0)
    """
    require_function("jit", fun)
    return compiled.jitted(fun) if backend.COMPILES_SECOND_ORDER else backend.jit(fun)


def functionalize(model):
    r"""Turns a model into a pure function of its weights, $f(\theta, x)$, so that every transform works on them.

    Args:
        model: a built Keras model or layer.

    Returns:
        `(fun, weights)`. `weights` is a list of tensors, copies of the trainable variables in the order of
        `model.trainable_variables`. `fun(weights, *inputs, training=False, return_losses=False)` calls the model with
        these in their place, and returns its outputs; with `return_losses` also the losses that this call has added
        and those of the regularizers, as `(outputs, losses)`. The other variables enter with the values of the
        moment. What the call assigns (BatchNormalization's statistics, the state of a dropout seed) is dropped, so
        that two calls draw the same mask (on torch if dropout has a seed); nothing is left in the model.

    Raises:
        ValueError: if `model` is not a layer, or not built; when called, if `weights` do not fit.

    Cost:
        A copy of the weights here; a call costs what a call of the model does.

    Example:

    >>> import keras
    >>> import keras_gradtools as kg
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer="ones")])
    >>> fun, weights = kg.functionalize(model)
    >>> x = keras.ops.convert_to_tensor([[2.0, 5.0]])
    >>> kernel, bias = kg.grad(lambda w: keras.ops.sum(fun(w, x)))(weights)
    >>> [float(g) for g in kernel[:, 0]], [float(g) for g in bias]
    ([2.0, 5.0], [1.0])
    """
    if not isinstance(model, keras.Layer):
        raise ValueError(f"functionalize takes a Keras model or layer. Received: {validation.describe(model)}.")
    if not model.built:
        raise ValueError(
            f"functionalize takes a built model. Received: {model.name!r}, which is not. Give it a keras.Input, or "
            "call it on data once."
        )
    variables = list(model.trainable_variables)

    def fun(weights, *inputs, training=False, return_losses=False, **kwargs):
        mapping = list(zip(variables, _checked_weights(weights, variables), strict=True))
        scope = StateScope(mapping)
        with scope, scope:
            outputs = model(*inputs, training=training, **kwargs)
            return (outputs, list(model.losses)) if return_losses else outputs

    return fun, [ops.copy(ops.stop_gradient(ops.convert_to_tensor(v))) for v in variables]


def _checked_weights(weights, variables):
    given = list(weights) if isinstance(weights, (list, tuple)) else [weights]
    shapes = [tuple(getattr(w, "shape", ())) for w in given]
    if shapes != [tuple(v.shape) for v in variables]:
        raise ValueError(
            "A functionalized model takes a list of weights of the shapes "
            f"{[tuple(v.shape) for v in variables]}. Received: {shapes}."
        )
    # As an assignment would take them; Keras itself would drop an imaginary part.
    return [
        w if ops.is_tensor(w) and validation.dtype_of(w) == v.dtype else vectors.real_tensor(w, v.dtype, "Each weight")
        for w, v in zip(given, variables, strict=True)
    ]
