"""First derivatives of functions: gradients, vector-Jacobian and Jacobian-vector products."""

import functools
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from keras_gradtools import nesting, validation
from keras_gradtools.annotations import Arguments, Function, Nested
from keras_gradtools.transforms.taped_call import TapedCall, require_argnums, require_function, require_scalar


def grad(
    fun: Callable[Arguments, Any], argnums: int | Sequence[int] = 0, has_aux: bool = False
) -> Callable[Arguments, Any]:
    r"""Turns a scalar function into its gradient, $\nabla f(x) = \partial f / \partial x$.

    The variables that `fun` reads are constants. To differentiate with respect to weights, pass them as arguments or
    use a `GradientTape`. Assignments to Keras variables inside `fun` are discarded.

    The signature is that of `keras.ops.grad` in Keras 3.16. That function sums an output that is not a scalar, where
    this one raises an error, and has no second derivative on torch. docs/from/keras_ops.md lists all differences.

    Args:
        fun: A function that returns one scalar tensor, or with `has_aux` a pair of a scalar tensor and anything else.
        argnums: The position of the argument to differentiate with respect to, or a tuple of positions. These
            arguments are real floating-point tensors, variables, arrays or Python floats, in any nested structure.
            The structure may also contain None, integers, booleans, strings and functions, which are passed to `fun`
            unchanged.
        has_aux: Whether `fun` returns a pair `(value, aux)`.

    Returns:
        A function with the arguments of `fun` that returns the gradient, in the structure and shapes of the argument
        (a tuple of gradients for a tuple of positions). Unconnected leaves get zeros, and leaves that cannot have a
        gradient get None. With `has_aux` it returns `(gradient, aux)`.

    Raises:
        ValueError: When called, if `fun` does not return a scalar, a position does not exist, or an argument has no
            leaf that can have a gradient.

    Cost:
        About three evaluations of `fun`.

    Example:

    >>> import keras_gradtools as kg
    >>> cube = lambda x: x * x * x
    >>> float(kg.grad(cube)(2.0)), float(kg.grad(kg.grad(cube))(2.0))
    (12.0, 12.0)

    Source: Griewank & Walther, "Evaluating Derivatives" (2008), section 3.2.
    """
    require_function("grad", fun)
    require_argnums("grad", argnums)
    validation.require_flag("grad", "has_aux", has_aux)
    return gradient_named("grad", fun, argnums, has_aux)


def gradient_named(name, fun, argnums=0, has_aux=False):
    """`grad`, with errors that say `name`: that of a transform which takes the gradient first."""

    @functools.wraps(fun, updated=())
    def gradient(*args, **kwargs):
        call, gradients = _gradient(name, fun, args, kwargs, argnums, has_aux)
        return (gradients, call.aux) if has_aux else gradients

    _differentiated_by[gradient] = argnums, has_aux
    return gradient


def value_and_grad(
    fun: Callable[Arguments, Any], argnums: int | Sequence[int] = 0, has_aux: bool = False
) -> Callable[Arguments, tuple[Any, Any]]:
    r"""Turns a scalar function into one that returns its value and its gradient, $(f(x), \nabla f(x))$.

    Args:
        fun: As for `grad`.
        argnums: As for `grad`.
        has_aux: As for `grad`.

    Returns:
        A function with the arguments of `fun` that returns `(value, gradient)`, or `((value, aux), gradient)` with
        `has_aux`.

    Raises:
        ValueError: As `grad`.

    Cost:
        About three evaluations of `fun`.

    Example:

    >>> import keras_gradtools as kg
    >>> value, (by_x, by_y) = kg.value_and_grad(lambda x, y: x * x * y, argnums=(0, 1))(3.0, 5.0)
    >>> float(value), float(by_x), float(by_y)
    (45.0, 30.0, 9.0)

    Source: Griewank & Walther, "Evaluating Derivatives" (2008), section 3.2.
    """
    require_function("value_and_grad", fun)
    require_argnums("value_and_grad", argnums)
    validation.require_flag("value_and_grad", "has_aux", has_aux)

    @functools.wraps(fun, updated=())
    def value_and_gradient(*args, **kwargs):
        call, gradients = _gradient("value_and_grad", fun, args, kwargs, argnums, has_aux)
        return ((call.value, call.aux) if has_aux else call.value), gradients

    return value_and_gradient


def _gradient(name, fun, args, kwargs, argnums, has_aux):
    call = TapedCall(name, fun, args, kwargs, argnums, has_aux)
    require_scalar(name, call.target)
    return call, call.vjp(is_last=True)


def vjp(fun: Function, *primals: Nested, has_aux: bool = False) -> tuple[Any, ...]:
    r"""Evaluates a function and returns its vector-Jacobian product as a function, $u \mapsto J^\top u$.

    Args:
        fun: A function of `primals` that returns tensors in any nested structure.
        *primals: Real floating-point tensors, variables, arrays or Python floats, in any nested structure.
        has_aux: Whether `fun` returns a pair `(out, aux)`.

    Returns:
        `(out, pullback)`, or `(out, pullback, aux)` with `has_aux`. `pullback(cotangent)` takes a cotangent in the
        structure and shapes of `out`, with None for entries of `out` that are not floating-point, and returns a tuple
        with one entry per primal. It can be called any number of times, and keeps the recorded evaluation in memory
        as long as it exists.

    Raises:
        ValueError: If a primal cannot have a gradient, or a cotangent does not have the structure and shapes of `out`.

    Cost:
        One evaluation of `fun`, and about two more for each call of `pullback`.

    Example:

    >>> import keras_gradtools as kg
    >>> out, pullback = kg.vjp(lambda x, y: (x * y, x + y), 2.0, 3.0)
    >>> [float(g) for g in pullback((1.0, 10.0))]
    [13.0, 12.0]

    Source: Griewank & Walther, "Evaluating Derivatives" (2008), section 3.2.
    """
    require_function("vjp", fun)
    validation.require_flag("vjp", "has_aux", has_aux)
    call = TapedCall("vjp", fun, primals, argnums=tuple(range(len(primals))), has_aux=has_aux)

    def pullback(cotangent):
        return call.vjp(cotangent)

    return (call.value, pullback, call.aux) if has_aux else (call.value, pullback)


def jvp(fun: Function, primals: Sequence[Nested], tangents: Sequence[Nested], has_aux: bool = False) -> tuple[Any, ...]:
    r"""Evaluates a function and its derivative along a direction, $(f(x), J v)$.

    Args:
        fun: A function of `primals` that returns tensors in any nested structure.
        primals: A tuple of the arguments: real floating-point tensors, variables, arrays or Python floats, in any
            nested structure. Other leaves are allowed as for `grad`.
        tangents: The direction $v$, a tuple in the structure and shapes of `primals`. None stands for zeros. Leaves
            without a derivative must have None.
        has_aux: Whether `fun` returns a pair `(out, aux)`.

    Returns:
        `(out, tangent_out)`, or `(out, tangent_out, aux)` with `has_aux`. `tangent_out` has the structure and shapes
        of `out`, with zeros for unconnected outputs and None for outputs that are not floating-point.

    Raises:
        ValueError: If a primal cannot have a gradient, or a tangent does not have the structure and shape of its
            primal.

    Cost:
        About three evaluations of `fun` on JAX, which has a complete forward mode. About five on the other backends,
        where forward mode is two reverse-mode passes.

    Example:

    >>> import keras_gradtools as kg
    >>> out, tangent = kg.jvp(lambda x, y: x * y, (2.0, 3.0), (1.0, 10.0))
    >>> float(out), float(tangent)
    (6.0, 23.0)

    Source: Griewank & Walther, "Evaluating Derivatives" (2008), section 3.1.
    """
    require_function("jvp", fun)
    validation.require_flag("jvp", "has_aux", has_aux)
    primals = require_tuple("jvp", "primals", primals)
    return jvp_named("jvp", fun, primals, require_tuple("jvp", "tangents", tangents), has_aux)


def jvp_named(name, fun, primals, tangents, has_aux=False):
    """`jvp`, with errors that say `name`: that of a transform which takes directional derivatives."""
    call = TapedCall(name, fun, primals, argnums=tuple(range(len(primals))), has_aux=has_aux)
    derivative = call.jvp(tangents)
    return (call.value, derivative, call.aux) if has_aux else (call.value, derivative)


def linearize(fun: Function, *primals: Nested, has_aux: bool = False) -> tuple[Any, ...]:
    r"""Evaluates a function and returns its derivative at that point as a linear function, $v \mapsto J v$.

    The work that does not depend on the direction is done once.

    Args:
        fun: A function of `primals` that returns tensors in any nested structure.
        *primals: Real floating-point tensors, variables, arrays or Python floats, in any nested structure.
        has_aux: Whether `fun` returns a pair `(out, aux)`.

    Returns:
        `(out, pushforward)`, or `(out, pushforward, aux)` with `has_aux`. `pushforward(*tangents)` takes one tangent
        per primal, in the structure and shapes of that primal (None stands for zeros), and returns the derivative in
        the structure of `out`. It keeps the recorded evaluation in memory as long as it exists.

    Raises:
        ValueError: If a primal cannot have a gradient, or a tangent does not have the structure and shape of its
            primal.

    Cost:
        One evaluation of `fun` and one of its linearization, which JAX compiles. Each call of `pushforward` costs about
        one evaluation on JAX and two on the other backends. `linearize(grad(fun), x)` is the cheapest way to compute
        many Hessian-vector products at one point.

    Example:

    >>> import keras_gradtools as kg
    >>> out, pushforward = kg.linearize(lambda x, y: x * y, 2.0, 3.0)
    >>> float(out), float(pushforward(1.0, 10.0)), float(pushforward(1.0, None))
    (6.0, 23.0, 3.0)

    Source: Griewank & Walther, "Evaluating Derivatives" (2008), section 3.1.
    """
    require_function("linearize", fun)
    validation.require_flag("linearize", "has_aux", has_aux)
    call = TapedCall("linearize", fun, primals, argnums=tuple(range(len(primals))), has_aux=has_aux)
    linear = call.linearize(_is_gradient(fun, len(primals), has_aux) and not call.tape.has_custom_gradient)

    def pushforward(*tangents):
        return linear(tangents)

    return (call.value, pushforward, call.aux) if has_aux else (call.value, pushforward)


def require_tuple(name, role, given):
    """Returns the tuple or list `given` as a tuple, and raises `ValueError` for anything else."""
    if isinstance(given, (tuple, list)):
        return tuple(given)
    what = validation.describe(given) if hasattr(given, "dtype") or not nesting.is_nested(given) else type(given)
    raise ValueError(
        f"The {role} of `{name}` must be a tuple with one entry for each argument of the function. Received: {what}. "
        f"For a function of one argument, write `({role[:-1]},)`."
    )


def _is_gradient(fun, count, has_aux):
    """Whether `grad` made `fun`, with respect to all of its arguments. Its Jacobian is then a symmetric Hessian."""
    made = _differentiated_by.get(fun) if type(fun) is types.FunctionType else None
    if made is None or made[1] != has_aux:
        return False
    by = made[0]
    return by in (0, -1) and count == 1 or isinstance(by, (tuple, list)) and tuple(by) == tuple(range(count))


# Not an attribute of the functions: `functools.wraps` would copy it to functions that are not gradients.
_differentiated_by: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
