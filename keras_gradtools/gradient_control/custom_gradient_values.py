"""Checks, flattens and repacks the arguments, values and gradients of a function with a custom gradient."""

import itertools
import numbers

import keras
import numpy as np
from keras import ops

from keras_gradtools import nesting, validation
from keras_gradtools.tape import vectors
from keras_gradtools.validation import name_of


class Argument:
    """One positional argument: its structure, its leaves, and which of them have a gradient."""

    def __init__(self, x):
        self.is_nested = nesting.is_nested(x)
        self._outline, self._leaves = nesting.split(x)
        self._have_gradients = [is_floating(leaf) for leaf in self._leaves]

    def take_tensors(self):
        """Removes and returns the leaves that have a gradient, as tensors. The other leaves stay here as constants."""
        taken = list(itertools.compress(self._leaves, self._have_gradients))
        self._leaves = [None if is_floating(x) else _as_constant(x) for x in self._leaves]
        return [ops.convert_to_tensor(x, dtype=keras.config.floatx() if isinstance(x, float) else None) for x in taken]

    def filled(self, tensors):
        """The argument, with the leaves that were taken replaced by the next entries of the iterator `tensors`."""
        pairs = zip(self._leaves, self._have_gradients, strict=True)
        return self._outline.pack([next(tensors) if is_taken else x for x, is_taken in pairs])

    def gradients(self, given, role):
        """The gradients of the leaves that have one. `given` is what `grad_fn` returned for this argument."""
        if not any(self._have_gradients):
            return []
        found = self._outline.matched(given, any_sequence=True) if self.is_nested else [given]
        if found is None:
            raise ValueError(
                f"{role} must have the structure of the argument, {self._outline}. Received: "
                f"{nesting.outline(given)}. None stands for zeros."
            )
        return itertools.compress(found, self._have_gradients)

    def has_structure_of(self, given):
        """Whether this argument is nested and `given` has its structure."""
        return self.is_nested and self._outline.matched(given, any_sequence=True) is not None


def split(fun, args, kwargs):
    """The tensors that have a gradient, the positional arguments without them, and `kwargs` as constants."""
    if any(isinstance(x, keras.KerasTensor) for x in nesting.flatten((args, kwargs))):
        raise ValueError(
            f"The function {name_of(fun)!r} with a custom gradient takes tensors with values. Received: a symbolic "
            "KerasTensor. In a functional model, give the function without its decorator to the layer "
            "keras_gradtools.layers.CustomGradient, and call that."
        )
    for i, x in enumerate(args):
        for leaf in nesting.flatten(x):
            if is_array(leaf) and validation.dtype_of(leaf).startswith("complex"):
                raise ValueError(
                    f"The arguments of {name_of(fun)!r}, which has a custom gradient, must be real. Received: argument "
                    f"{i}, {validation.describe(leaf)}. Pass the real and the imaginary part."
                )
    arguments = [Argument(x) for x in args]
    tensors = [tensor for argument in arguments for tensor in argument.take_tensors()]
    if not tensors:
        raise ValueError(
            f"The function {name_of(fun)!r} with a custom gradient needs at least one positional argument that can "
            "have a gradient: a floating-point tensor, variable, array or a Python float. Received: "
            f"{', '.join(map(validation.describe, args)) or 'no positional arguments'}."
        )
    return tensors, arguments, nesting.map_structure(_as_constant, kwargs)


def _as_constant(x):
    # A framework treats a tensor that is not one of its inputs as a constant, or refuses it (JAX). This makes it one.
    return ops.stop_gradient(x) if ops.is_tensor(x) and is_floating(x) else x


def is_array(x):
    """Whether `x` is a tensor, variable or NumPy array."""
    return ops.is_tensor(x) or isinstance(x, (keras.Variable, np.ndarray, np.generic))


def is_floating(x):
    """Whether `x` has a gradient."""
    return isinstance(x, float) or is_array(x) and "float" in validation.dtype_of(x)


def checked_pair(fun, pair):
    """Returns `pair`, the result of `fun`. Raises `ValueError` unless it is a pair of a value and a function."""
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


def checked_values(fun, leaves):
    """The leaves of the value that are not None, as tensors. Raises `ValueError` unless they are real."""
    values = [y for y in leaves if y is not None] or leaves
    for i, y in enumerate(values):
        if is_array(y) or isinstance(y, numbers.Real):
            values[i] = ops.convert_to_tensor(y)
        if not ops.is_tensor(values[i]) or validation.dtype_of(values[i]).startswith("complex"):
            raise ValueError(
                f"The value of {name_of(fun)!r}, which has a custom gradient, must be a real tensor or a nested "
                f"structure of real tensors. Received: {validation.describe(y)}. Return other values from another "
                "function."
            )
    return values


def flat_gradients(fun, gradients, arguments, tensors):
    """What `grad_fn` returned for the arguments, as one tensor for each of `tensors`."""
    flat = []
    for i, gradient in enumerate(_one_for_each(fun, gradients, arguments)):
        role = f"The gradient that the grad_fn of {name_of(fun)!r} returns for argument {i}"
        flat += [(g, role) for g in arguments[i].gradients(gradient, role)]
    return [_checked_gradient(g, x, role) for (g, role), x in zip(flat, tensors, strict=True)]


def _one_for_each(fun, gradients, arguments):
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


def _checked_gradient(gradient, x, role):
    """The gradient of the tensor `x`, in its dtype and shape. None stands for zeros."""
    if gradient is None:
        return ops.zeros_like(x)
    if not (is_array(gradient) or isinstance(gradient, numbers.Real)):
        raise ValueError(
            f"{role} must be a tensor or None. Received: {validation.describe(gradient)}. Return one gradient for "
            "each positional argument."
        )
    gradient = vectors.real_tensor(gradient, x.dtype, role)
    validation.require_shape(gradient, x.shape, role, "the argument")
    return gradient
