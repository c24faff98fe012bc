"""First derivatives of functions: gradients, and products with the Jacobian from the left and the right."""

import functools
import types
import weakref

from keras_gradtools import nesting, validation
from keras_gradtools.transforms.taped_call import TapedCall, require_function, require_scalar


def grad(fun, argnums=0, has_aux=False):
    r"""Turns a scalar function into its gradient, $\nabla f(x) = \partial f / \partial x$.

    What `fun` assigns to Keras variables is dropped, and the variables that it reads are constants: give the
    weights as arguments, or use a `GradientTape`, to differentiate by them.

    It is called as `keras.ops.grad` of Keras 3.16 is, which sums an output that is no scalar, where this is an error,
    and has no second derivative on torch. docs/limits.md has all differences.

    Args:
        fun: a function that returns one scalar tensor; with `has_aux` a pair of it and anything else.
        argnums: the position of the argument to differentiate by, or a tuple of positions. These arguments are
            real floating-point tensors, variables, arrays or Python floats, in any nesting. Beside these, it may have
            None, integers, booleans, strings and functions, which reach `fun` as they are.
        has_aux: whether `fun` returns a pair `(value, aux)`.

    Returns:
        A function with the arguments of `fun` that returns the gradient, in the structure and the shapes of the
        argument (a tuple of them for a tuple of positions), zeros where nothing is connected, and None for what can
        have no gradient; with `has_aux`, `(gradient, aux)`.

    Raises:
        ValueError: when called, if `fun` does not return a scalar, a position does not exist, or an argument has
            no gradient.

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
    validation.require_flag("grad", "has_aux", has_aux)

    @functools.wraps(fun, updated=())
    def gradient(*args, **kwargs):
        call, gradients = _gradient("grad", fun, args, kwargs, argnums, has_aux)
        return (gradients, call.aux) if has_aux else gradients

    _differentiated_by[gradient] = argnums, has_aux
    return gradient


def value_and_grad(fun, argnums=0, has_aux=False):
    r"""Turns a scalar function into one that returns its value and its gradient, $(f(x), \nabla f(x))$.

    Args:
        fun: as for `grad`.
        argnums: as for `grad`.
        has_aux: as for `grad`.

    Returns:
        A function with the arguments of `fun` that returns `(value, gradient)`; with `has_aux`,
        `((value, aux), gradient)`.

    Raises:
        ValueError: as `grad`.

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
    validation.require_flag("value_and_grad", "has_aux", has_aux)

    @functools.wraps(fun, updated=())
    def value_and_gradient(*args, **kwargs):
        call, gradients = _gradient("value_and_grad", fun, args, kwargs, argnums, has_aux)
        return ((call.value, call.aux) if has_aux else call.value), gradients

    return value_and_gradient


def _gradient(name, fun, args, kwargs, argnums, has_aux):
    call = TapedCall(name, fun, args, kwargs, argnums, has_aux)
    require_scalar(name, call.target)
    return call, call.pull(is_last=True)


def vjp(fun, *primals, has_aux=False):
    r"""Evaluates a function, and prepares the product with its transposed Jacobian, $u \mapsto J^\top u$.

    Args:
        fun: a function of `primals` that returns tensors, in any nesting.
        *primals: real floating-point tensors, variables, arrays or Python floats, in any nesting.
        has_aux: whether `fun` returns a pair `(out, aux)`.

    Returns:
        `(out, pullback)`, and `aux` as a third if `has_aux`. `pullback(cotangent)` takes the structure and
        shapes of `out`, None for None and integers, and returns a tuple with one entry for each of `primals`. It can be
        called again, and keeps the evaluation in memory until it is dropped.

    Raises:
        ValueError: if a primal has no gradient, or a cotangent not the structure and shape of `out`.

    Cost:
        One evaluation of `fun` here, and about two in each pullback.

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
        return call.pull(cotangent)

    return (call.value, pullback, call.aux) if has_aux else (call.value, pullback)


def jvp(fun, primals, tangents, has_aux=False):
    r"""Evaluates a function and its derivative along a direction, $(f(x), J v)$.

    Args:
        fun: a function of `primals` that returns tensors, in any nesting.
        primals: a tuple of the arguments: real floating-point tensors, variables, arrays or Python floats, in
            any nesting; beside these, what `grad` takes.
        tangents: the direction $v$, a tuple in the structure and shapes of `primals`; None stands for zeros, and
            is the tangent of what has no derivative.
        has_aux: whether `fun` returns a pair `(out, aux)`.

    Returns:
        `(out, tangent_out)`, and `aux` as a third if `has_aux`. `tangent_out` has the structure and shapes of
        `out`, zeros where nothing is connected, None for None and integers.

    Raises:
        ValueError: if a primal has no gradient, or a tangent not the structure and shape of its primal.

    Cost:
        About three evaluations of `fun` where the framework has a forward mode that works (JAX), about five
        where it takes two pullbacks.

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
    tangents = require_tuple("jvp", "tangents", tangents)
    call = TapedCall("jvp", fun, primals, argnums=tuple(range(len(primals))), has_aux=has_aux)
    pushed = call.push(tangents)
    return (call.value, pushed, call.aux) if has_aux else (call.value, pushed)


def linearize(fun, *primals, has_aux=False):
    r"""Evaluates a function and prepares its derivative along many directions, $v \mapsto J v$.

    The work that does not depend on the direction is done once.

    Args:
        fun: a function of `primals` that returns tensors, in any nesting.
        *primals: real floating-point tensors, variables, arrays or Python floats, in any nesting.
        has_aux: whether `fun` returns a pair `(out, aux)`.

    Returns:
        `(out, pushforward)`, and `aux` as a third if `has_aux`. `pushforward(*tangents)` takes a tangent for each of
        `primals`, in its structure and shapes (None stands for zeros), and returns the structure of `out`. It keeps
        the evaluation in memory until it is dropped.

    Raises:
        ValueError: if a primal has no gradient, or a tangent not the structure and shape of its primal.

    Cost:
        Here one evaluation of `fun`, and of its linearization, which JAX compiles. In each pushforward about one
        evaluation on JAX, two elsewhere. Of a gradient, `linearize(grad(fun), x)`, it is the cheapest way to many
        Hessian-vector products at one point.

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
    push = call.linearize(_is_gradient(fun, len(primals), has_aux) and not call.record.has_custom_gradient)

    def pushforward(*tangents):
        return push(tangents)

    return (call.value, pushforward, call.aux) if has_aux else (call.value, pushforward)


def require_tuple(name, role, given):
    """Returns `given` as a tuple, and raises `ValueError` if it is neither that nor a list."""
    if isinstance(given, (tuple, list)):
        return tuple(given)
    what = validation.describe(given) if hasattr(given, "dtype") or not nesting.is_nested(given) else type(given)
    raise ValueError(
        f"The {role} of `{name}` must be a tuple with one entry for each argument of the function. Received: {what}. "
        f"For a function of one argument, write `({role[:-1]},)`."
    )


def _is_gradient(fun, count, has_aux):
    """Whether `fun` is the gradient, by all of its arguments, that `grad` has made: its Jacobian is symmetric."""
    made = _differentiated_by.get(fun) if type(fun) is types.FunctionType else None
    if made is None or made[1] != has_aux:
        return False
    by = made[0]
    return by in (0, -1) and count == 1 or isinstance(by, (tuple, list)) and tuple(by) == tuple(range(count))


# Beside the functions and not on them: `functools.wraps` would hand an attribute on to what is no gradient.
_differentiated_by: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
