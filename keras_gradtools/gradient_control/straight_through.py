"""Passing the gradient through a function unchanged: a function and a layer."""

import functools
from collections.abc import Callable
from typing import Any

import keras

from keras_gradtools import validation
from keras_gradtools.annotations import Function, Nested, Tensor
from keras_gradtools.gradient_control.control import FunctionControl, require_differentiable
from keras_gradtools.gradient_control.custom_gradient import custom_gradient
from keras_gradtools.tape import vectors
from keras_gradtools.validation import name_of


def straight_through(fun: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    r"""Gives `fun` the gradient of the identity, $\partial y / \partial x \cdot u := u$.

    It lets gradients through functions such as step, round and sign, whose own gradient is zero.

    Args:
        fun: A function of one tensor that keeps its shape. Its result is cast to the dtype of `x`.

    Returns:
        A function of one real floating-point tensor, symbolic tensor or variable, with the values of `fun`. For a
        symbolic tensor it returns the output of a layer `keras_gradtools.layers.StraightThrough`, whose docstring says
        which functions can be saved.

    Raises:
        ValueError: If `fun` is not a function or changes the shape, or `x` is not a real floating-point tensor.

    Cost:
        One call of `fun`. The backward pass costs nothing.

    Example:

    >>> import keras_gradtools as kg
    >>> from keras import ops
    >>> x = ops.convert_to_tensor(2.7)
    >>> with kg.GradientTape() as tape:
    ...     tape.watch(x)
    ...     y = ops.square(kg.straight_through(ops.round)(x))
    >>> float(y), float(tape.gradient(y, x))
    (9.0, 6.0)

    Source: Bengio, Leonard & Courville, "Estimating or propagating gradients through stochastic neurons for
    conditional computation" (2013), section 4.
    """
    if not callable(fun):
        raise ValueError(
            f"straight_through takes a function. Received: {validation.describe(fun)}. Call it as "
            "`straight_through(fun)(x)`."
        )

    @custom_gradient
    def forward(x):
        y = vectors.real_tensor(fun(x), x.dtype, f"What {name_of(fun)!r} returns under straight_through")
        validation.require_shape(y, x.shape, f"What {name_of(fun)!r} returns under straight_through", "its argument")
        return y, lambda upstream: upstream

    @functools.wraps(fun)
    def straight(x):
        x = require_differentiable("straight_through", x)
        return StraightThrough(fun, dtype=x.dtype)(x) if isinstance(x, keras.KerasTensor) else forward(x)

    return straight


@keras.saving.register_keras_serializable(package="keras_gradtools")
class StraightThrough(FunctionControl):
    """Applies a function and passes the gradient through unchanged, as `straight_through` does.

    Args:
        fun: A function of one tensor that keeps its shape. To save the layer, use one of `keras.ops` or
            `keras.activations`, or a function registered with `keras.saving.register_keras_serializable`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: A floating-point tensor of any shape.

    Returns:
        `fun(inputs)` in the dtype of the inputs.

    Raises:
        ValueError: If `fun` is not a function.

    Cost:
        One call of `fun` in the forward pass. The backward pass costs nothing.

    Example:

    >>> import keras_gradtools as kg
    >>> from keras import ops
    >>> quantize = kg.layers.StraightThrough(ops.round)
    >>> x = ops.convert_to_tensor(2.7)
    >>> with kg.GradientTape() as tape:
    ...     tape.watch(x)
    ...     y = ops.square(quantize(x))
    >>> float(y), float(tape.gradient(y, x))
    (9.0, 6.0)

    Source: As for `straight_through`.
    """

    def __init__(self, fun: Function, **kwargs: Any) -> None:
        super().__init__(fun, **kwargs)
        self._forward = straight_through(fun)

    def call(self, inputs: Nested) -> Nested:
        return self._forward(inputs)
