"""Differential operators on fields: the Laplacian and the divergence at each example."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Concatenate

from keras import ops

from keras_gradtools import backend, validation
from keras_gradtools.annotations import Arguments, Tensor
from keras_gradtools.transforms.first_order import jvp_named
from keras_gradtools.transforms.taped_call import TapedCall, require_function


def laplacian(
    fun: Callable[Concatenate[Tensor, Arguments], Any], axes: Sequence[int] | None = None
) -> Callable[Concatenate[Tensor, Arguments], Tensor]:
    r"""Turns a function of points into its Laplacian, $\sum_i \partial^2 f_{b k} / \partial x_{b i}^2$.

    For physics-informed networks. Only the second derivatives in the sum are computed, one axis at a time, and no
    Hessian is formed. The examples must be independent, which is not checked.

    Args:
        fun: A function or a Keras model of `(x, ...)`, with `x` of shape `(batch, n)`, that returns one tensor of shape
            `(batch, ...)`.
        axes: The indices of the inputs to sum over, as a list. Negative indices count from the end. By default all n
            inputs. `[0]` gives $\partial^2 f / \partial x_0^2$.

    Returns:
        A function with the arguments of `fun` that returns the Laplacian with respect to the first, in the shape of the
        output of `fun`. It can be differentiated again.

    Raises:
        ValueError: When called, if `x` does not have the shape `(batch, n)`, n is not known, or an axis does not exist.

    Cost:
        On JAX (forward over forward), about four evaluations of `fun` per axis, for any number of outputs. On the other
        backends (reverse over reverse), one gradient per output and one more per output and axis, of about three
        evaluations each.

    Example:

    >>> import keras_gradtools as kg
    >>> from keras import ops
    >>> x = ops.convert_to_tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> f = lambda x: x[:, :1] ** 3 + x[:, :1] * x[:, 1:] ** 2  # its Laplacian: 6 x + 2 x
    >>> [[float(v) for v in row] for row in kg.laplacian(f)(x)], [float(v) for v in kg.laplacian(f, axes=[1])(x)[:, 0]]
    ([[8.0], [24.0]], [2.0, 6.0])

    Source: Griewank & Walther, "Evaluating Derivatives" (2008), section 10.2, on second derivatives along directions.
    """
    require_function("laplacian", fun)
    _require_axes_at_first("laplacian", axes)

    @functools.wraps(fun, updated=())
    def transformed(x: Tensor, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Tensor:
        x = _points("laplacian", x)
        chosen = require_axes("laplacian", axes, x.shape[1])

        def value(x):
            return fun(x, *args, **kwargs)

        if backend.HESSIAN_MODE == "forward":
            found = [_second_derivative_forward(value, x, axis) for axis in chosen]
            _require_output(found[0])
            return sum(found)
        return _laplacian_reverse(value, x, chosen)

    return transformed


def divergence(
    fun: Callable[Concatenate[Tensor, Arguments], Any], axes: Sequence[int] | None = None
) -> Callable[Concatenate[Tensor, Arguments], Tensor]:
    r"""Turns a vector field into its divergence, $\nabla \cdot f_b = \sum_k \partial f_{b k} / \partial x_{b i_k}$.

    The examples must be independent, which is not checked.

    Args:
        fun: A function or a Keras model of `(x, ...)`, with `x` of shape `(batch, n)`, that returns a tensor of shape
            `(batch, m)`.
        axes: The index of the input $i_k$ for each of the m outputs, as a list. Negative indices count from the end. By
            default all n inputs in order.

    Returns:
        A function with the arguments of `fun` that returns the divergence with respect to the first, of shape
        `(batch, 1)`. It can be differentiated again.

    Raises:
        ValueError: When called, if a shape does not match, or there is not one axis per output.

    Cost:
        For each output a `jvp` of about two evaluations of `fun` on JAX, or a gradient of about three on the other
        backends.

    Example:

    >>> import keras_gradtools as kg
    >>> from keras import ops
    >>> x = ops.convert_to_tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> [float(v) for v in kg.divergence(lambda x: ops.stack([x[:, 0] ** 2, x[:, 0] * x[:, 1]], axis=1))(x)[:, 0]]
    [3.0, 9.0]

    Source: Griewank & Walther, "Evaluating Derivatives" (2008), sections 3.1 and 3.2.
    """
    require_function("divergence", fun)
    _require_axes_at_first("divergence", axes)

    @functools.wraps(fun, updated=())
    def transformed(x: Tensor, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Tensor:
        x = _points("divergence", x)
        chosen = require_axes("divergence", axes, x.shape[1])

        def value(x):
            return fun(x, *args, **kwargs)

        if backend.HESSIAN_MODE == "forward":
            columns = []
            for k, axis in enumerate(chosen):
                y, derivative = jvp_named("divergence", value, (x,), (_unit(x, axis),))
                _require_field(y, chosen)
                columns.append(derivative[:, k])
        else:
            call = TapedCall("divergence", value, (x,))
            _require_field(call.target, chosen)
            columns = [call.vjp(_unit(call.target, k))[:, axis] for k, axis in enumerate(chosen)]
        return sum(columns)[:, None]

    return transformed


def _require_axes_at_first(name, axes):
    if axes is not None:
        require_axes(name, axes, advice=f"`{name}` returns a function of the arguments: `{name}(fun)(x)`.")


def require_axes(name, axes, size=None, advice=""):
    """Returns `axes` as a list. Raises `ValueError` if an axis is repeated or does not exist.

    With `size`, the number of axes, None means all axes, and the returned indices are not negative.
    """
    given = range(size) if axes is None and size is not None else axes
    right = isinstance(given, (list, tuple, range)) and len(given) > 0
    low, high = (-math.inf, math.inf) if size is None else (-size, size)
    if right and all(validation.is_count(i, low) and i < high for i in given):
        found = [int(i) if size is None else int(i) % size for i in given]
        if len(set(found)) == len(found):
            return found
    below = "" if size is None else f" below {size}"
    raise validation.refused(name, f"a list of distinct axis indices{below}, or None for all,", "axes", axes, advice)


def _points(name, x):
    x = validation.as_tensor(x, f"{name} expects an input of shape (batch, n)")
    if len(x.shape) != 2 or not x.shape[1]:
        raise ValueError(
            f"{name} expects an input of shape (batch, n), with n known and not 0. Received: {validation.describe(x)}."
        )
    return x


def _require_output(y):
    if not ops.is_tensor(y) or not len(y.shape) or None in tuple(y.shape)[1:]:
        raise ValueError(f"laplacian expects one output, of shape (batch, ...). Received: {validation.describe(y)}.")


def _require_field(y, axes):
    shape = tuple(getattr(y, "shape", ()))
    if len(shape) != 2 or shape[1] != len(axes):
        raise ValueError(
            f"divergence expects outputs of shape (batch, {len(axes)}), one for each axis. Received: shape {shape}."
        )


def _unit(like, element):
    """Zeros in the shape of `like`, with a one at the element number `element` of each example."""
    shape = tuple(like.shape)[1:]
    one = ops.reshape(ops.one_hot(element, math.prod(shape), dtype=like.dtype), (1, *shape))
    return ops.broadcast_to(one, ops.shape(like))


def _second_derivative_forward(value, x, axis):
    unit = _unit(x, axis)

    def first(x):
        return jvp_named("laplacian", value, (x,), (unit,))[1]

    return jvp_named("laplacian", first, (x,), (unit,))[1]


def _laplacian_reverse(value, x, axes):
    """The gradient of each output element, then the gradient of that gradient's entry for each axis."""

    def gradients(x):
        call = TapedCall("laplacian", value, (x,))
        _require_output(call.target)
        shapes.append(call.target.shape)
        return [call.vjp(_unit(call.target, k)) for k in range(math.prod(call.target.shape[1:]))]

    shapes: list[Any] = []
    outer = TapedCall("laplacian", gradients, (x,))
    columns = []
    for gradient in outer.target:
        along = [backend.pullback(outer.tape, [gradient], outer.flat_sources, [_unit(x, axis)])[0] for axis in axes]
        found = [second[:, axis] for second, axis in zip(along, axes, strict=True) if second is not None]
        columns.append(sum(found) if found else ops.zeros_like(x[:, 0]))
    if not columns:
        return ops.zeros((ops.shape(x)[0], *shapes[-1][1:]), dtype=x.dtype)
    return ops.reshape(ops.stack(columns, axis=1), (-1, *shapes[-1][1:]))
