"""Keras computations as functions that a compiler can take."""

from keras_gradtools import backend
from keras_gradtools.transforms.taped_call import require_function


def jit(fun):
    """Compiles `fun` with the backend's compiler: `tf.function`, `jax.jit`, and on torch not at all.

    Keras variables are state, on every backend: `fun` reads their current values at every call, and what it
    assigns (BatchNormalization's statistics, the state of a dropout seed, the weights in a training step of
    your own) is written back.

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
    return backend.jit(fun)
