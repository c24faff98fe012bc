"""Functions with a custom gradient: a decorator and a layer."""

import functools
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_gradtools import backend, nesting, validation
from keras_gradtools.annotations import Arguments, Function, Nested
from keras_gradtools.gradient_control.control import FunctionControl
from keras_gradtools.gradient_control.custom_gradient_values import (
    checked_pair,
    checked_values,
    flat_gradients,
    is_floating,
    split,
)
from keras_gradtools.keras_state import recording


def custom_gradient(fun: Callable[Arguments, tuple[Any, Function]]) -> Callable[Arguments, Any]:
    r"""Defines the gradient of a function yourself, $\partial y / \partial x \cdot u := \mathrm{grad\_fn}(u)$.

    `fun` returns its value, and a function that maps the gradient $u$ of the value to the gradients of the arguments.
    If both use only `keras.ops`, the result works the same on every backend, compiled and in `fit`. Higher derivatives
    are those of the operations in `grad_fn`.

    Args:
        fun: A function `fun(*args, **kwargs) -> (value, grad_fn)`.

            Positional arguments that are floating-point tensors, variables, arrays or Python floats, alone or in any
            nested structure, are passed to it as tensors and have a gradient. All other positional arguments (integers,
            booleans, strings, None) and all keyword arguments are passed unchanged. They are constants.

            `value` is a tensor, or a nested structure of tensors and None.

            `grad_fn(upstream)` receives the gradient of `value`, in its structure. If `value` is a tuple or list, it
            receives the gradients of the entries as separate arguments, `grad_fn(*upstreams)`. An entry that is not
            floating-point gets None. `grad_fn` returns one gradient per positional argument (not in a tuple if there
            is only one argument), in the structure and shape of the argument. Each is cast to the dtype of its tensor.
            None stands for zeros, also for a whole nested argument. The gradients of constant arguments are ignored.

            Variables and tensors that `fun` uses without receiving them as positional arguments are constants. Pass
            them as arguments if they should have a gradient.

    Returns:
        A function with the arguments of `fun` that returns its `value`.

    Raises:
        ValueError: If `fun` is not a function or does not return a pair of a value and a function, if `grad_fn` does
            not return one gradient of the right structure and shape per argument, if no argument can have a gradient,
            or if an argument is complex or symbolic. For symbolic tensors use
            `keras_gradtools.layers.CustomGradient`.

    Cost:
        One call of `fun`, and one of `grad_fn` for each gradient.

    Example:

    TensorFlow's own derivative of $\log(1 + e^x)$ is NaN for large $x$. This one is not.

    >>> import keras_gradtools as kg
    >>> from keras import ops
    >>> @kg.custom_gradient
    ... def log1pexp(x):
    ...     e = ops.exp(x)
    ...     return ops.log(1 + e), lambda upstream: upstream * (1 - 1 / (1 + e))
    >>> x = ops.convert_to_tensor(1.0)
    >>> with kg.GradientTape() as outer:
    ...     outer.watch(x)
    ...     with kg.GradientTape() as inner:
    ...         inner.watch(x)
    ...         y = log1pexp(x)
    ...     slope = inner.gradient(y, x)
    >>> round(float(slope), 4), round(float(outer.gradient(slope, x)), 4)
    (0.7311, 0.1966)

    Source: TensorFlow's guide "Advanced automatic differentiation", section "Custom gradients".
    """
    if not callable(fun):
        raise ValueError(
            f"custom_gradient takes a function. Received: {validation.describe(fun)}. Decorate a function "
            "`fun(*args)` that returns a pair `(value, grad_fn)`."
        )

    @functools.wraps(fun)
    def differentiated(*args, **kwargs):
        return _call(fun, *split(fun, args, kwargs))

    return differentiated


def _call(fun, tensors, arguments, kwargs):
    """The value of `fun`, as a function of `tensors` whose gradient the backend takes from `grad_fn`."""
    places: Any = None

    def run(*tensors):
        nonlocal places
        given = iter(tensors)
        value, grad_fn = checked_pair(fun, fun(*[a.filled(given) for a in arguments], **kwargs))
        several = isinstance(value, (tuple, list))
        outline, leaves = nesting.split(value)
        # A backend may call this several times. Each `flat_grad_fn` has the structure of its own call.
        places = own_places = nesting.Places(outline, tuple([y is not None for y in leaves]))
        values = checked_values(fun, leaves)
        floating = [is_floating(y) for y in values]

        def flat_grad_fn(*upstreams):
            upstream = own_places.pack([u if f else None for u, f in zip(upstreams, floating, strict=True)])
            gradients = grad_fn(*upstream) if several else grad_fn(upstream)
            return flat_gradients(fun, gradients, arguments, tensors)

        return values, flat_grad_fn

    recording.note_custom_gradient()
    values = backend.custom_gradient(run)(*tensors)
    # JAX may return an argument itself, which a tape would confuse with the value.
    return places.pack([ops.copy(y) if any(y is x for x in tensors) else y for y in values])


@keras.saving.register_keras_serializable(package="keras_gradtools")
class CustomGradient(FunctionControl):
    """Applies a function that has a custom gradient, as `custom_gradient` does.

    Args:
        fun: A function `fun(*tensors) -> (value, grad_fn)` as for `custom_gradient`, without the decorator. To save the
            layer, register the function with `keras.saving.register_keras_serializable`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: The single argument of `fun` if it is a tensor or a dict of tensors. A list or tuple holds the
            arguments of `fun`.

    Returns:
        The value of `fun`.

    Raises:
        ValueError: As `custom_gradient`.

    Cost:
        One call of `fun` in the forward pass, and one of its `grad_fn` in the backward pass.

    Example:

    >>> import keras
    >>> import keras_gradtools as kg
    >>> from keras import ops
    >>> @keras.saving.register_keras_serializable(package="example")
    ... def log1pexp(x):
    ...     e = ops.exp(x)
    ...     return ops.log(1 + e), lambda upstream: upstream * (1 - 1 / (1 + e))
    >>> layer = kg.layers.CustomGradient(log1pexp)
    >>> x = ops.convert_to_tensor(1.0)
    >>> with kg.GradientTape() as tape:
    ...     tape.watch(x)
    ...     y = layer(x)
    >>> round(float(tape.gradient(y, x)), 4)
    0.7311

    Source: As for `custom_gradient`.
    """

    def __init__(self, fun: Function, **kwargs: Any) -> None:
        super().__init__(fun, **kwargs)
        self._differentiated = custom_gradient(fun)

    def call(self, inputs: Nested) -> Nested:
        return self._differentiated(*inputs) if isinstance(inputs, (list, tuple)) else self._differentiated(inputs)

    def compute_output_spec(self, inputs: Nested) -> Nested:
        return keras.layers.Layer.compute_output_spec(self, inputs)  # the value may have another shape and dtype
