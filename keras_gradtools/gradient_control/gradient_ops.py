"""Functions that return their argument unchanged but stop, clip, scale or reverse its gradient."""

import functools
import math

import keras
import numpy as np
from keras import ops

from keras_gradtools import nesting, validation
from keras_gradtools.gradient_control.custom_gradients import custom_gradient, distinct
from keras_gradtools.tape import vectors
from keras_gradtools.validation import name_of


def stop_gradient(x):
    r"""Returns `x` as a constant, $\partial\,\mathrm{stop}(x) / \partial x = 0$.

    Args:
        x: Tensors and variables of any shape and dtype, in any nested structure. None, integers, strings and functions
            in the same structure are returned unchanged.

    Returns:
        The same structure with the same values. A variable is replaced by its current value.

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
    leaves = nesting.flatten(x)
    stopped = [ops.is_tensor(y) or isinstance(y, (keras.Variable, keras.KerasTensor)) for y in leaves]
    for entry, is_stopped in zip(leaves, stopped, strict=True):
        if not (is_stopped or any(stopped) and validation.is_constant(entry)):
            raise ValueError(
                "stop_gradient takes tensors of the backend and keras.Variables, in any nested structure. "
                f"Received: {validation.describe(entry)}. It has no gradient to stop: leave it out."
            )
    pairs = zip(leaves, stopped, strict=True)
    return nesting.pack_as(x, [distinct(ops.stop_gradient(y), [y]) if is_stopped else y for y, is_stopped in pairs])


def clip_gradient_norm(x, max_norm):
    r"""Returns `x` and clips the norm of its gradient $u$: $u \cdot \min(1, m / \lVert u \rVert_2)$.

    The norm is that of the whole tensor, including the batch axis. For half precision it is computed in float32.

    Args:
        x: A real floating-point tensor or variable of any shape.
        max_norm: The largest norm $m$, a positive number.

    Returns:
        A tensor with the values, shape and dtype of `x`.

    Raises:
        ValueError: If `x` is not a real floating-point tensor, or `max_norm` not a positive finite number.

    Cost:
        None in the forward pass. The backward pass reads the gradient once more.

    Example:

    >>> import keras_gradtools as kg
    >>> from keras import ops
    >>> v = ops.convert_to_tensor(2.0)
    >>> with kg.GradientTape() as tape:
    ...     tape.watch(v)
    ...     y = kg.clip_gradient_norm(v * v, 0.5)
    >>> float(tape.gradient(y, v))
    2.0

    Source: TensorFlow's guide "Advanced automatic differentiation", section "Custom gradients";
    Pascanu, Mikolov & Bengio, "On the difficulty of training recurrent neural networks" (2013), algorithm 1.
    """
    return _clip_norm(*_with_number(x, require_limit(max_norm, "max_norm"), "clip_gradient_norm"))


@custom_gradient
def _clip_norm(x, max_norm):
    def grad_fn(upstream):
        u = ops.cast(upstream, max_norm.dtype)
        # Without this scaling, the squares of large gradients overflow and those of small ones underflow.
        largest = ops.max(ops.abs(u), initial=0)
        unit = ops.where(largest > 1e15, 1e25, ops.where(largest < 1e-15, 1e-25, 1.0))
        unit = ops.cast(unit, u.dtype)
        squares = ops.sum(ops.square(u / unit))
        norm = ops.sqrt(ops.where(squares > 0, squares, 1))  # the derivative of the square root at 0 would be NaN
        return ops.where(norm > max_norm / unit, u / unit * (max_norm / norm), u), None

    return x, grad_fn


def clip_gradient_value(x, max_value):
    r"""Returns `x` and clips each element of its gradient $u$: $\min(\max(u, -m), m)$.

    Args:
        x: A real floating-point tensor or variable of any shape.
        max_value: The largest absolute value $m$, a positive number.

    Returns:
        A tensor with the values, shape and dtype of `x`.

    Raises:
        ValueError: If `x` is not a real floating-point tensor, or `max_value` not a positive finite number.

    Cost:
        None in the forward pass. The backward pass reads the gradient once more.

    Example:

    >>> import keras_gradtools as kg
    >>> from keras import ops
    >>> x = ops.convert_to_tensor([1.0, 2.0, -3.0])
    >>> with kg.GradientTape() as tape:
    ...     tape.watch(x)
    ...     y = ops.square(kg.clip_gradient_value(x, 4.5))
    >>> [float(g) for g in tape.gradient(y, x)]
    [2.0, 4.0, -4.5]

    Source: Mikolov, "Statistical language models based on neural networks" (2012), section 3.2.2.
    """
    return _clip_value(*_with_number(x, require_limit(max_value, "max_value"), "clip_gradient_value"))


@custom_gradient
def _clip_value(x, limit):
    def grad_fn(upstream):
        u = ops.cast(upstream, limit.dtype)
        # Not `ops.clip`: its derivative at the limit differs between backends.
        return ops.where(u > limit, limit, ops.where(u < -limit, -limit, u)), None

    return x, grad_fn


def scale_gradient(x, scale):
    r"""Returns `x` and multiplies its gradient $u$ by a factor, $s \cdot u$.

    Args:
        x: A real floating-point tensor or variable of any shape.
        scale: The factor $s$, a finite number, or a scalar tensor or `keras.Variable`, which a schedule can change. It
            has no gradient itself.

    Returns:
        A tensor with the values, shape and dtype of `x`.

    Raises:
        ValueError: If `x` is not a real floating-point tensor, or `scale` not a real scalar.

    Cost:
        None in the forward pass. The backward pass reads the gradient once more.

    Example:

    >>> import keras_gradtools as kg
    >>> from keras import ops
    >>> x = ops.convert_to_tensor(3.0)
    >>> with kg.GradientTape() as tape:
    ...     tape.watch(x)
    ...     y = ops.square(kg.scale_gradient(x, 0.5))
    >>> float(tape.gradient(y, x))
    3.0

    Source: Silver et al., "A general reinforcement learning algorithm that masters chess, shogi, and Go"
    (2018) and its successor MuZero (Schrittwieser et al. 2020, appendix G), which scale gradients in this way.
    """
    return _scale(*_with_number(x, require_scale(scale, "scale_gradient"), "scale_gradient"))


@custom_gradient
def _scale(x, scale):
    return x, lambda upstream: (scale * ops.cast(upstream, scale.dtype), None)


def reverse_gradient(x, scale=1.0):
    r"""Returns `x` and reverses its gradient $u$ to $-s \cdot u$.

    Placed between a feature extractor and a domain classifier, it makes the extractor maximize the loss that the
    classifier minimizes.

    Args:
        x: A real floating-point tensor or variable of any shape.
        scale: The factor $s$, as for `scale_gradient`.

    Returns:
        A tensor with the values, shape and dtype of `x`.

    Raises:
        ValueError: As `scale_gradient`.

    Cost:
        None in the forward pass. The backward pass reads the gradient once more.

    Example:

    >>> import keras_gradtools as kg
    >>> from keras import ops
    >>> x = ops.convert_to_tensor(3.0)
    >>> with kg.GradientTape() as tape:
    ...     tape.watch(x)
    ...     y = ops.square(kg.reverse_gradient(x, 0.5))
    >>> float(y), float(tape.gradient(y, x))
    (9.0, -3.0)

    Source: Ganin & Lempitsky, "Unsupervised domain adaptation by backpropagation" (2015), equations 11-12.
    """
    x, scale = _with_number(x, require_scale(scale, "reverse_gradient"), "reverse_gradient")
    return _scale(x, -scale)


def straight_through(fun):
    r"""Gives `fun` the gradient of the identity, $\partial y / \partial x \cdot u := u$.

    It lets gradients through functions such as step, round and sign, whose own gradient is zero.

    Args:
        fun: A function of one tensor that keeps its shape. Its result is cast to the dtype of `x`.

    Returns:
        A function of one real floating-point tensor or variable, with the values of `fun`.

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
        return forward(_checked_tensor(x, "straight_through"))

    return straight


def require_limit(limit, name):
    """Returns `limit` as a float. Raises `ValueError` unless it is a positive finite number."""
    if validation.is_number(limit) and 0 < limit < math.inf:
        return float(limit)
    raise ValueError(
        f"{name} must be a positive finite number. Received: {name}={validation.describe(limit)}. To stop a gradient "
        "altogether, use stop_gradient."
    )


def require_number(number, name):
    """Returns `number` as a float. Raises `ValueError` unless it is a finite number."""
    if validation.is_number(number) and math.isfinite(number):
        return float(number)
    raise ValueError(f"{name} must be a finite number. Received: {name}={validation.describe(number)}.")


def require_scale(scale, role):
    """Returns `scale`. Raises `ValueError` unless it is a finite number, or a real scalar tensor or variable."""
    if validation.is_number(scale) and math.isfinite(scale):
        return float(scale)
    if ops.is_tensor(scale) or validation.is_variable(scale):
        dtype = validation.dtype_of(scale)
        if len(scale.shape) == 0 and dtype != "bool" and not dtype.startswith("complex"):
            return scale
    raise ValueError(
        f"The scale of {role} must be a finite number, or a real scalar tensor or keras.Variable. Received: "
        f"{validation.describe(scale)}. For a different factor per element, write a custom_gradient."
    )


def _checked_tensor(x, role):
    hint = ""
    if isinstance(x, keras.KerasTensor):
        layer = "".join(word.capitalize() for word in role.split("_"))
        hint = f" In a functional model, use the layer keras_gradtools.layers.{layer}."
    validation.require_differentiable(x, f"The argument of {role}", hint)
    return ops.convert_to_tensor(x)


def _with_number(x, number, role):
    """`x` as a tensor, and `number` as a constant in the precision in which the gradient is computed."""
    x = _checked_tensor(x, role)
    dtype = "float64" if validation.dtype_of(x) == "float64" else "float32"
    if isinstance(number, float):
        return x, ops.convert_to_tensor(np.asarray(number, dtype), dtype=dtype)
    return x, ops.stop_gradient(ops.cast(ops.convert_to_tensor(number), dtype))
