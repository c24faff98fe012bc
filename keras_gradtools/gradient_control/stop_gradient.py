"""Stopping the gradient: a function and a layer."""

from typing import Any

import keras
from keras import ops

from keras_gradtools import nesting, validation
from keras_gradtools.annotations import Nested
from keras_gradtools.gradient_control.control import GradientControl


def stop_gradient(x: Nested) -> Nested:
    r"""Returns `x` as a constant, $\partial\,\mathrm{stop}(x) / \partial x = 0$.

    Unlike `keras.ops.stop_gradient`, it takes nested structures with constants in them, keeps the mask of a symbolic
    tensor, and refuses NumPy arrays and numbers, which have no gradient.

    Args:
        x: Tensors and variables of any shape and dtype, in any nested structure. None, integers, strings and functions
            in the same structure are returned unchanged.

    Returns:
        The same structure with the same values. A variable is replaced by its current value, a symbolic tensor by the
        output of a layer `keras_gradtools.layers.StopGradient`.

    Raises:
        ValueError: For any other entry.

    Cost:
        None.

    Example:

    >>> import keras_gradtools as kg
    >>> from keras import ops
    >>> x = ops.convert_to_tensor(3.0)
    >>> with kg.GradientTape() as tape:
    ...     tape.watch(x)
    ...     y = x * x * kg.stop_gradient(x)
    >>> float(tape.gradient(y, x))
    18.0

    Source: TensorFlow's guide "Advanced automatic differentiation", section "Stop gradient".
    """
    outline, leaves = nesting.split(x)
    has_tensors = any(map(_is_stopped, leaves))
    for leaf in leaves:
        if not (_is_stopped(leaf) or has_tensors and validation.is_constant(leaf)):
            raise ValueError(
                "stop_gradient takes tensors of the backend and keras.Variables, in any nested structure. "
                f"Received: {validation.describe(leaf)}. It has no gradient to stop: leave it out."
            )
    return outline.pack([_stopped(leaf) if _is_stopped(leaf) else leaf for leaf in leaves])


def _is_stopped(leaf):
    return ops.is_tensor(leaf) or isinstance(leaf, (keras.Variable, keras.KerasTensor))


def _stopped(leaf):
    return StopGradient(dtype=leaf.dtype)(leaf) if isinstance(leaf, keras.KerasTensor) else ops.stop_gradient(leaf)


@keras.saving.register_keras_serializable(package="keras_gradtools")
class StopGradient(GradientControl):
    """Passes its inputs on as constants, as `stop_gradient` does.

    The layers before it receive no gradient through it.

    Args:
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Tensors of any shape and dtype, in any nested structure.

    Returns:
        The inputs, unchanged.

    Cost:
        None.

    Example:

    >>> import keras
    >>> import keras_gradtools as kg
    >>> from keras import ops
    >>> stop = kg.layers.StopGradient()
    >>> x = ops.convert_to_tensor(3.0)
    >>> with kg.GradientTape() as tape:
    ...     tape.watch(x)
    ...     y = x * x * stop(x)
    >>> float(tape.gradient(y, x))
    18.0

    Source: As for `stop_gradient`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def call(self, inputs: Nested) -> Nested:
        return stop_gradient(inputs)
