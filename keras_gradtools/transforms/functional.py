"""Compiling Keras computations, and turning models into pure functions."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_gradtools import backend, validation
from keras_gradtools.annotations import Arguments, Result, Tensor
from keras_gradtools.keras_state.scopes import StateScope
from keras_gradtools.tape import vectors
from keras_gradtools.transforms import compiled
from keras_gradtools.transforms.taped_call import require_function


def jit(fun: Callable[Arguments, Result], compiler: str | None = None) -> Callable[Arguments, Result]:
    """Compiles `fun` with `tf.function` on TensorFlow and `jax.jit` on JAX. On torch it is recorded and run again.

    torch's own compiler cannot differentiate twice. Here the first two calls run eagerly, and the operations of torch
    that they run are recorded, also those of derivatives. Later calls run only these, without Python, Keras and
    autograd, with exactly the same results. If the two calls differ, as with NumPy's random numbers, or if Python reads
    values other than bools, `fun` runs eagerly, with one warning that says why. Calls under a tape run eagerly as well.

    Keras variables are state on every backend. Each call of `fun` reads their current values and writes back what it
    assigns: BatchNormalization's statistics, the state of a dropout seed, the weights in a custom training step.

    `fun` is traced again when one of its captured values has changed. The earlier program stays cached. Captured values
    are

    - what `fun` closes over, its defaults, the globals and attributes that it names, and the contents of its lists
      and dicts,
    - the same for the functions that it names,
    - for models: their layers, the constructor arguments of these, which variables are trainable, and the precision.

    Some changes are not noticed: those inside an array that is modified in place, those of values that are read with
    `getattr` or by the code of an installed package, and those that `fun` itself makes while it is traced. These rules
    apply to everything that keras_gradtools compiles.

    Args:
        fun: A function of tensors in any nested structure. Arrays and Python floats are inputs. Anything else (an
            integer, a bool, a string, None) is a constant, and each value of it gets its own program. The Python code
            of `fun` runs only while it is traced, so its control flow must not depend on the values of tensors.
        compiler: None for the usual compiler. `"xla"` on TensorFlow and `"inductor"` on torch compile longer, and fuse
            operations, so that the program is faster and rounds differently. inductor needs a C++ compiler. JAX always
            uses XLA, and takes only None.

    Returns:
        A function with the signature of `fun`, which returns tensors in the structure that `fun` returns.

    Raises:
        ValueError: If `fun` is not a function, or if the backend has no such compiler.
        RuntimeError: In a call, if inductor finds no C++ compiler.

    Cost:
        The first call with a new structure, shape or dtype of the arguments traces and compiles `fun`, which takes from
        a tenth of a second to minutes. On torch, each of the first two calls takes about as long as five eager calls.

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
    if compiler is not None and compiler not in backend.COMPILERS:
        known = " or ".join(map(repr, (*backend.COMPILERS, None)))
        raise validation.refused("jit", f"{known} on {backend.name()}", "compiler", compiler)
    return compiled.jitted(fun, compiler)


def functionalize(model: keras.Layer) -> tuple[Callable[..., Any], list[Tensor]]:
    r"""Turns a model into a pure function of its weights, $f(\theta, x)$, to which every transform can be applied.

    Args:
        model: A built Keras model or layer.

    Returns:
        `(fun, weights)`.

        - `weights` is a list of tensors, copies of the trainable variables in the order of `model.trainable_variables`.
        - `fun(weights, *inputs, training=False, return_losses=False)` calls the model with these weights instead of its
          own, and returns its outputs. With `return_losses` it returns `(outputs, losses)`, with the losses that this
          call has added and those of the regularizers.

        Non-trainable variables have their current values. Assignments made by the call (BatchNormalization's
        statistics, the state of a dropout seed) are discarded, so the model does not change, and two calls draw the
        same dropout mask (on torch only if dropout has a seed).

    Raises:
        ValueError: If `model` is not a layer or is not built. When called, if the shapes of `weights` do not match.

    Cost:
        One copy of the weights. Each call costs one call of the model.

    Example:

    >>> import keras
    >>> import keras_gradtools as kg
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer="ones")])
    >>> fun, weights = kg.functionalize(model)
    >>> x = keras.ops.convert_to_tensor([[2.0, 5.0]])
    >>> kernel, bias = kg.grad(lambda w: keras.ops.sum(fun(w, x)))(weights)
    >>> [float(g) for g in kernel[:, 0]], [float(g) for g in bias]
    ([2.0, 5.0], [1.0])

    Source: `torch.func.functional_call`, which does the same for torch modules.
    """
    if not isinstance(model, keras.Layer):
        raise ValueError(f"functionalize takes a Keras model or layer. Received: {validation.describe(model)}.")
    validation.require_built("functionalize", model)
    variables = list(model.trainable_variables)

    def fun(weights, *inputs, training=False, return_losses=False, **kwargs):
        mapping = list(zip(variables, _require_weights(weights, variables), strict=True))
        scope = StateScope(mapping)
        with scope, scope:
            outputs = model(*inputs, training=training, **kwargs)
            return (outputs, list(model.losses)) if return_losses else outputs

    return fun, [ops.copy(ops.stop_gradient(ops.convert_to_tensor(v))) for v in variables]


def _require_weights(weights, variables):
    given = list(weights) if isinstance(weights, (list, tuple)) else [weights]
    shapes = [tuple(getattr(w, "shape", ())) for w in given]
    if shapes != [tuple(v.shape) for v in variables]:
        raise ValueError(
            "A functionalized model takes a list of weights of the shapes "
            f"{[tuple(v.shape) for v in variables]}. Received: {shapes}."
        )
    # Converted as an assignment would convert them. Keras itself would silently drop an imaginary part.
    return [
        w if ops.is_tensor(w) and validation.dtype_of(w) == v.dtype else vectors.real_tensor(w, v.dtype, "Each weight")
        for w, v in zip(given, variables, strict=True)
    ]
