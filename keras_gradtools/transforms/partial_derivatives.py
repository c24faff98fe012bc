"""Partial derivatives of functions of points by name, such as u_t and u_xx, in one pass."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from keras import ops

from keras_gradtools import backend, validation
from keras_gradtools.annotations import Arguments
from keras_gradtools.transforms import compiled
from keras_gradtools.transforms.first_order import jvp_named
from keras_gradtools.transforms.taped_call import (
    TapedCall,
    argument_positions,
    require_argnums,
    require_function,
    require_points,
)
from keras_gradtools.transforms.taylor import jets
from keras_gradtools.transforms.taylor.kinks import warn_of_kinks

NAME = "partial_derivatives"


def partial_derivatives(
    fun: Callable[Arguments, Any],
    derivatives: Sequence[Any] | Mapping[str, Any],
    variables: str | Sequence[str] | None = None,
    argnums: int | Sequence[int] = 0,
) -> Callable[Arguments, Any]:
    r"""Turns a function of points into chosen partial derivatives, such as $u$, $u_t$, $u_{xx}$ and $u_{xxxx}$.

    One pass computes all of them, and each shared derivative once: $u_x$ for $u_x$, $u_{xx}$ and $u_{xy}$. The examples
    must be independent, which is not checked. It is compiled and cached as for `jacobian`.

    Args:
        fun: A function or a Keras model that returns tensors of shape `(batch, ...)` in any nested structure.
        derivatives: Which derivatives, as a list, or as a dict whose keys name them. Each is a tuple of the variables
            to differentiate with respect to, by number: `()` is the value, `(0,)` the first derivative with respect to
            variable 0, `(0, 1, 1)` a third one. With `variables`, also a string of their letters: `""`, `"t"`, `"txx"`.
        variables: One letter for each variable, such as `"tx"`.
        argnums: The position of the argument that holds the points, of shape `(batch, n)`: variable k is its column k.
            Or a tuple of positions, whose columns are numbered one after the other. For `fun(t, x)`: `(0, 1)`.

    Returns:
        A function with the arguments of `fun` that returns the derivatives in a list, or in a dict with the keys of
        `derivatives`, each in the structure and shapes of the output of `fun`. They can be differentiated again.

    Raises:
        ValueError: For an unknown variable, or no derivative. When called, if an argument does not have the shape
            `(batch, n)`, or a variable does not exist.

    Cost:
        Counted in linear operations, which are most of the work in a network: one evaluation of `fun` for the value,
        for each derivative, and for each lower one that these need. Five for `"xxxx"`.

    Example:

    >>> import keras_gradtools as kg
    >>> from keras import ops
    >>> u = lambda t, x: ops.exp(-t) * x**3
    >>> equation = kg.partial_derivatives(u, {"u": "", "u_t": "t", "u_xx": "xx"}, variables="tx", argnums=(0, 1))
    >>> found = equation(ops.zeros((1, 1)), 2.0 * ops.ones((1, 1)))
    >>> {name: float(d[0, 0]) for name, d in found.items()}
    {'u': 8.0, 'u_t': -8.0, 'u_xx': 12.0}

    Source: Griewank & Walther, "Evaluating Derivatives" (2008), chapter 13.
    """
    require_function(NAME, fun)
    require_argnums(NAME, argnums)
    argnums = tuple(argnums) if isinstance(argnums, list) else argnums
    names, keys = require_derivatives(NAME, derivatives, variables)

    @functools.wraps(fun, updated=())
    def transformed(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Any:
        given: list[Any] = list(args)
        for i in argument_positions(NAME, argnums, len(given)):
            given[i] = require_points(NAME, given[i])
        body = functools.partial(_partial_derivatives, keys, argnums)
        found, _ = compiled.run(NAME, fun, body, (keys, argnums), given, kwargs)
        return found if names is None else dict(zip(names, found, strict=True))

    return transformed


def require_derivatives(name, derivatives, variables=None):
    """Returns the names, or None, and the sorted numbers of the variables of each derivative."""
    if variables is not None:
        right = isinstance(variables, (str, list, tuple)) and len(variables) > 0
        if not right or len(set(variables)) < len(variables) or not all(_is_letter(v) for v in variables):
            raise validation.refused(name, "different letters, one for each variable,", "variables", variables)
    if not isinstance(derivatives, (list, tuple, Mapping)) or not len(derivatives):
        raise validation.refused(
            name, "a list of derivatives, or a dict with a name for each,", "derivatives", derivatives, _EXAMPLE
        )
    names = list(derivatives) if isinstance(derivatives, Mapping) else None
    given = derivatives.values() if isinstance(derivatives, Mapping) else derivatives
    return names, tuple(_key(name, d, variables) for d in given)


_EXAMPLE = 'For example `{"u_t": (0,), "u_xx": (1, 1)}`, or with `variables="tx"`: `["t", "xx"]`.'


def _is_letter(v):
    return isinstance(v, str) and len(v) == 1


def _key(name, derivative, variables):
    if isinstance(derivative, str) and variables is not None and all(v in variables for v in derivative):
        return tuple(sorted(list(variables).index(v) for v in derivative))
    limit = math.inf if variables is None else len(variables)
    if isinstance(derivative, (list, tuple)) and all(validation.is_count(i, 0) and i < limit for i in derivative):
        return tuple(sorted(int(i) for i in derivative))
    expected = "a tuple of numbers of variables"
    if variables is not None:
        expected += f", or a string of the letters {''.join(variables)!r},"
    raise validation.refused(name, expected, "each derivative", derivative, _EXAMPLE)


def _partial_derivatives(keys, argnums, fun, *args, **kwargs):
    return derivatives_of(NAME, fun, args, kwargs, keys, argnums), None


def derivatives_of(name, fun, args, kwargs, keys, argnums=0):
    """The derivatives by `keys`, one after the other, each in the structure of the output of `fun`."""
    operations = backend.operations()
    call = TapedCall(name, fun, args, kwargs, argnums, operations=operations)
    widths = [x.shape[1] for x in call.flat_sources]
    _require_variables(name, keys, sum(widths))
    needed = jets.closure(keys)
    parts = backend.steps_between(call.tape, operations, call.flat_targets, call.flat_sources)
    if parts is None:
        found = {key: _nested(name, fun, args, kwargs, argnums, key) for key in set(keys) if key}
        return [found[key] if key else call.value for key in keys]
    seeds = _seeds(call.flat_sources, widths, needed)
    by_target = jets.at_targets(call, parts, seeds, needed)
    higher = [key for key in keys if len(key) > 1]
    if higher and not any(len(key) > 1 for parts in by_target for key in parts):
        warn_of_kinks(name, parts[0])
    return [jets.packed(call, by_target, key) if key else call.value for key in keys]


def _seeds(sources, widths, keys):
    """The jet of each source: the derivative of a column with respect to itself is 1."""
    found, start = [], 0
    for x, width in zip(sources, widths, strict=True):
        columns = range(start, start + width)
        parts = {key: _unit(x, key[0] - start) for key in keys if len(key) == 1 and key[0] in columns}
        found.append(jets.Jet(parts, is_uniform=True))
        start += width
    return found


def _unit(x, column):
    return ops.one_hot(ops.full((1,), column, dtype="int32"), x.shape[1], dtype=x.dtype)


def _require_variables(name, keys, count):
    for key in keys:
        if any(i >= count for i in key):
            raise ValueError(
                f"{name} expects numbers of variables below {count}, the number of columns. Received: {key}."
            )


def _nested(name, fun, args, kwargs, argnums, key):
    """One derivative by derivatives of derivatives."""
    positions = argument_positions(name, argnums, len(args))
    points = tuple(args[i] for i in positions)

    def value(*points):
        given = list(args)
        for i, x in zip(positions, points, strict=True):
            given[i] = x
        return fun(*given, **kwargs)

    def along(inner, variable):
        def derivative(*points):
            start, tangents = 0, []
            for x in points:
                inside = start <= variable < start + x.shape[1]
                tangents.append(
                    ops.broadcast_to(_unit(x, variable - start), ops.shape(x)) if inside else ops.zeros_like(x)
                )
                start += x.shape[1]
            return jvp_named(name, inner, points, tuple(tangents))[1]

        return derivative

    for variable in key:
        value = along(value, variable)
    return value(*points)
