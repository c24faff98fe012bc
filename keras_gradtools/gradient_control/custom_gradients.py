"""Functions with a custom gradient."""

import functools
import numbers
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_gradtools import backend, nesting, validation
from keras_gradtools.backend import recording
from keras_gradtools.tape import vectors
from keras_gradtools.validation import name_of


def custom_gradient(fun):
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
            or if an argument is symbolic or complex.

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
        tensors, arguments = _split(fun, args, kwargs)
        return _differentiated(fun, tensors, arguments, nesting.map_structure(_as_constant, kwargs))

    return differentiated


class _Argument:
    """One positional argument: its leaves, the indices of the leaves that have a gradient, and its structure."""

    def __init__(self, x):
        self.is_nested = nesting.is_nested(x)
        self._leaves = nesting.flatten(x) if self.is_nested else [x]
        self.numbers = [i for i, leaf in enumerate(self._leaves) if _is_floating(leaf)]
        self._outline = nesting.outline(x)

    def take_tensors(self):
        """Removes and returns the leaves that have a gradient, as tensors. The other leaves stay here as constants."""
        taken = [self._leaves[i] for i in self.numbers]
        self._leaves = [None if i in self.numbers else _as_constant(x) for i, x in enumerate(self._leaves)]
        return [ops.convert_to_tensor(x, dtype=keras.config.floatx() if isinstance(x, float) else None) for x in taken]

    def filled(self, tensors):
        """The argument, with the leaves that were taken replaced by the next entries of the iterator `tensors`."""
        leaves = list(self._leaves)
        for i in self.numbers:
            leaves[i] = next(tensors)
        return self._outline.pack(leaves)

    def gradients(self, fun, position, given):
        """The gradients of the leaves that have one. `given` is what `grad_fn` returned for this argument."""
        if not self.is_nested or not self.numbers:
            return [given] * len(self.numbers)
        found = self._outline.matched(given, any_sequence=True)
        if found is None:
            raise ValueError(
                f"{_role(fun, position)} must have the structure of the argument, {self._outline}. Received: "
                f"{nesting.outline(given)}. None stands for zeros."
            )
        return [found[i] for i in self.numbers]

    def has_structure_of(self, given):
        """Whether this argument is nested and `given` has its structure."""
        return self.is_nested and self._outline.matched(given, any_sequence=True) is not None


class _Result:
    """The structure of the value, including the places of None."""

    def __init__(self, value):
        self._outline = nesting.outline(value)
        self._is_none = [y is None for y in nesting.flatten(value)]

    def filled(self, values):
        given = iter(values)
        return self._outline.pack([None if is_none else next(given) for is_none in self._is_none])


def _differentiated(fun, tensors, arguments, kwargs):
    """Calls `fun` with its arguments, as a function of `tensors` whose gradient the backend takes from `grad_fn`."""
    result: Any = None

    def run(*tensors):
        nonlocal result
        given = iter(tensors)
        value, grad_fn = _checked_pair(fun, fun(*[a.filled(given) for a in arguments], **kwargs))
        values = _checked_values(fun, value)
        floating = [_is_floating(y) for y in values]
        several = isinstance(value, (tuple, list))
        result = packed = _Result(value)

        def flat_grad_fn(*upstreams):
            upstream = packed.filled([u if f else None for u, f in zip(upstreams, floating, strict=True)])
            gradients = _checked_count(fun, grad_fn(*(upstream if several else [upstream])), arguments)
            kept = []
            for i, (argument, gradient) in enumerate(zip(arguments, gradients, strict=True)):
                kept += [(i, g) for g in argument.gradients(fun, i, gradient)]
            return [_checked_gradient(fun, i, g, x) for (i, g), x in zip(kept, tensors, strict=True)]

        return values, flat_grad_fn

    recording.note_custom_gradient()
    values = backend.custom_gradient(run)(*tensors)
    return result.filled([distinct(y, tensors) for y in values])


def _split(fun, args, kwargs):
    """The tensors that have a gradient, and the positional arguments with these taken out."""
    leaves = nesting.flatten((args, kwargs))
    if any(isinstance(x, keras.KerasTensor) for x in leaves):
        raise ValueError(
            f"The function {name_of(fun)!r} with a custom gradient takes tensors with values. Received: a symbolic "
            "KerasTensor. In a functional model, use the layer keras_gradtools.layers.CustomGradient."
        )
    for i, x in enumerate(args):
        for leaf in nesting.flatten(x):
            if _is_array(leaf) and validation.dtype_of(leaf).startswith("complex"):
                raise ValueError(
                    f"The arguments of {name_of(fun)!r}, which has a custom gradient, must be real. Received: argument "
                    f"{i}, {validation.describe(leaf)}. Pass the real and the imaginary part."
                )
    arguments = [_Argument(x) for x in args]
    tensors = [tensor for argument in arguments for tensor in argument.take_tensors()]
    if not tensors:
        raise ValueError(
            f"The function {name_of(fun)!r} with a custom gradient needs at least one positional argument that can "
            "have a gradient: a floating-point tensor, variable, array or a Python float. Received: "
            f"{', '.join(map(validation.describe, args)) or 'no positional arguments'}."
        )
    return tensors, arguments


def _as_constant(x):
    # A framework treats a tensor that is not one of its inputs as a constant, or refuses it (JAX). This makes it one.
    return ops.stop_gradient(x) if ops.is_tensor(x) and _is_floating(x) else x


def _is_array(x):
    return ops.is_tensor(x) or isinstance(x, (keras.Variable, np.ndarray, np.generic))


def _is_floating(x):
    return isinstance(x, float) or _is_array(x) and "float" in validation.dtype_of(x)


def distinct(y, given):
    """Returns `y`, copied if it is one of `given`: JAX may return an argument itself, which a tape would confuse."""
    return ops.copy(y) if any(y is x for x in given) else y


def _checked_pair(fun, pair):
    if isinstance(pair, (tuple, list)) and len(pair) == 2 and callable(pair[1]):
        return pair
    if isinstance(pair, (tuple, list)):
        received = f"a {type(pair).__name__} of {', '.join(map(validation.describe, pair)) or 'nothing'}"
    else:
        received = validation.describe(pair)
    raise ValueError(
        f"The function {name_of(fun)!r} with a custom gradient must return a pair: its value, and the function that "
        f"computes its gradient. Received: {received}. End it with `return value, grad_fn`."
    )


def _checked_values(fun, value):
    """The tensors in a value, which may also contain None."""
    leaves = nesting.flatten(value)
    given = [y for y in leaves if y is not None]
    return [_checked_value(fun, y) for y in given or leaves]


def _checked_value(fun, y):
    if _is_array(y) or isinstance(y, numbers.Real):
        y = ops.convert_to_tensor(y)
        if not validation.dtype_of(y).startswith("complex"):
            return y
    raise ValueError(
        f"The value of {name_of(fun)!r}, which has a custom gradient, must be a real tensor or a nested structure of "
        f"real tensors. Received: {validation.describe(y)}. Return other values from another function."
    )


def _checked_count(fun, gradients, arguments):
    count = len(arguments)
    several = isinstance(gradients, (tuple, list))
    if count == 1 and (not several or arguments[0].has_structure_of(gradients)):
        return [gradients]
    if several and len(gradients) == count:
        return gradients
    received = f"a {type(gradients).__name__} of {len(gradients)}" if several else validation.describe(gradients)
    raise ValueError(
        f"The grad_fn of {name_of(fun)!r} must return {count} gradient{'s' if count > 1 else ''}, one for each "
        f"positional argument{', in its structure' if any(a.is_nested for a in arguments) else ''}. Received: "
        f"{received}. Return None for an argument without a gradient."
    )


def _role(fun, position):
    return f"The gradient that the grad_fn of {name_of(fun)!r} returns for argument {position}"


def _checked_gradient(fun, position, gradient, x):
    if gradient is None:
        return ops.zeros_like(x)
    role = _role(fun, position)
    if not (_is_array(gradient) or isinstance(gradient, numbers.Real)):
        raise ValueError(
            f"{role} must be a tensor or None. Received: {validation.describe(gradient)}. Return one gradient for "
            "each positional argument."
        )
    gradient = vectors.real_tensor(gradient, x.dtype, role)
    validation.require_shape(gradient, x.shape, role, "the argument")
    return gradient
