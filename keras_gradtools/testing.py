"""Checks of derivatives against central differences, for tests of layers and functions with custom gradients."""

from collections.abc import Sequence

import numpy as np

from keras_gradtools import validation
from keras_gradtools.annotations import Function, Nested
from keras_gradtools.finite_differences import GRADIENT, SAFETY, Point, Settings
from keras_gradtools.transforms.first_order import grad, jvp, require_tuple, vjp
from keras_gradtools.transforms.second_order import hvp
from keras_gradtools.transforms.taped_call import require_function

__all__ = ["check_gradients", "check_hvp", "check_jvp", "check_vjp"]

# A gradient of at most `_WHOLE` elements is checked at every element, a larger one at `_DRAWN` random elements.
_WHOLE = 32
_DRAWN = 16


def check_jvp(
    fun: Function,
    primals: Sequence[Nested],
    tangents: Sequence[Nested] | None = None,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    step: float | None = None,
    seed: int = 0,
) -> None:
    r"""Checks forward mode against central differences along one direction.

    Each element is compared: $J v \approx (f(x - 2 h v) - 8 f(x - h v) + 8 f(x + h v) - f(x + 2 h v)) / 12 h$.

    The function is evaluated in the precision of its arguments, and compared in double precision. Its assignments to
    Keras variables are discarded, so layers with dropout or a moving mean can be checked in training mode. The step is
    halved until two estimates agree. The check may fail for a function with a kink between $x - 2 h v$ and
    $x + 2 h v$. If so, choose a point further away from the kink. Call the checks eagerly, not in compiled code.

    Args:
        fun: A function of `primals` that returns tensors in any nested structure.
        primals: A tuple of the arguments: real floating-point tensors, variables, arrays or Python floats, in any
            nested structure.
        tangents: The direction $v$, a tuple with the structure and shapes of `primals`, where None stands for zeros. By
            default, a random direction.
        rtol: The tolerance relative to the derivative. By default, 1e-3 in float32, 1e-6 in float64, 0.05 in float16
            and 0.1 in bfloat16. The coarsest dtype among the arguments, the outputs and `keras.config.floatx()` counts,
            because Keras may compute in `floatx` whatever the other dtypes are.
        atol: The absolute tolerance, which is added to the relative one. By default, it is derived from the measured
            rounding error of `fun`.
        step: The step $h$. By default, it is searched for.
        seed: Seed of the random directions. No other random state is changed.

    Raises:
        AssertionError: If the derivative and the differences do not agree. The message names the worst element.
        ValueError: If an argument cannot have a gradient, or `fun` returns values that are not finite or that differ
            in a second call.

    Cost:
        One `jvp`, and 15 evaluations of `fun`, up to 33 if it varies on a small scale.

    Example:

    >>> import keras_gradtools as kg
    >>> from keras_gradtools import testing
    >>> double = kg.custom_gradient(lambda x: (2 * x, lambda upstream: 2 * upstream))
    >>> testing.check_jvp(double, (3.0,))
    >>> wrong = kg.custom_gradient(lambda x: (2 * x, lambda upstream: 5 * upstream))
    >>> testing.check_jvp(wrong, (3.0,))
    Traceback (most recent call last):
    AssertionError: check_jvp: the derivative of order 1 (forward mode) is wrong...

    Source: Griewank & Walther, "Evaluating Derivatives" (2008), section 3.1; Fornberg, "Generation of finite
    difference formulas on arbitrarily spaced grids" (1988), table 1.
    """
    point = Point(Settings.of("check_jvp", rtol, atol, step, seed), fun, primals)
    _check_forward(point, point.direction(tangents), "order 1 (forward mode)")


def check_vjp(
    fun: Function,
    primals: Sequence[Nested],
    *,
    rtol: float | None = None,
    atol: float | None = None,
    step: float | None = None,
    seed: int = 0,
) -> None:
    r"""Checks reverse mode against central differences, $\langle J^\top u, v \rangle = \langle u, J v \rangle$.

    This is checked for random $u$ and $v$, and then with unit vectors for $v$, so that a failure names the element of
    the argument. If the arguments have at most 32 elements together, all unit vectors are checked. Otherwise, 16 random
    unit vectors are checked. If the random $v$ failed, a bisection finds one more.

    Args:
        fun: As for `check_jvp`.
        primals: As for `check_jvp`.
        rtol: As for `check_jvp`.
        atol: As for `check_jvp`.
        step: As for `check_jvp`.
        seed: As for `check_jvp`, and of the random cotangent $u$ and the random unit vectors.

    Raises:
        AssertionError, ValueError: As for `check_jvp`.

    Cost:
        One `vjp`, 15 evaluations of `fun`, and 6 for each element that is checked. Up to 33 and 24 if `fun` varies on a
        small scale.

    Example:

    >>> import keras_gradtools as kg
    >>> from keras import ops
    >>> from keras_gradtools import testing
    >>> wrong = kg.custom_gradient(lambda x: (2 * x, lambda upstream: upstream * ops.array([2.0, 5.0])))
    >>> try:
    ...     testing.check_vjp(lambda p: wrong(p["w"]), ({"w": ops.ones(2)},))
    ... except AssertionError as error:
    ...     print(str(error).splitlines()[1])
    Worst: argument 0['w'], element (1,)

    Source: Griewank & Walther, "Evaluating Derivatives" (2008), section 3.2.
    """
    point = Point(Settings.of("check_vjp", rtol, atol, step, seed), fun, primals)
    _check_reverse(point, point.cotangent(), "order 1 (reverse mode)")


def check_gradients(
    fun: Function,
    args: Sequence[Nested],
    order: int = 2,
    modes: Sequence[str] = ("forward", "reverse"),
    *,
    rtol: float | None = None,
    atol: float | None = None,
    step: float | None = None,
    seed: int = 0,
) -> None:
    r"""Checks the derivatives of a function up to a given order, in all combinations of forward and reverse mode.

    Order 1 runs `check_jvp` and `check_vjp`. Order 2 also applies them to the functions $x \mapsto J(x) v$ and
    $x \mapsto J(x)^\top u$, with $u$ and $v$ held fixed. Order 3 repeats this with the derivatives of these functions.

    Args:
        fun: As for `check_jvp`.
        args: As `primals` for `check_jvp`.
        order: The highest order, 1, 2 or 3.
        modes: The modes to check and to combine, a tuple of `"forward"`, `"reverse"` or both.
        rtol: As for `check_jvp`.
        atol: As for `check_jvp`.
        step: As for `check_jvp`.
        seed: As for `check_vjp`.

    Raises:
        AssertionError: As for `check_jvp`. The message names the order and the modes.
        ValueError: As for `check_jvp`, or for an unknown order or mode.

    Cost:
        With both modes, `check_jvp` and `check_vjp` run once for order 1, three times for order 2 and seven times for
        order 3. An evaluation for order 2 is a `jvp` or `vjp`, which costs three to five evaluations of `fun`.

    Example:

    >>> from keras_gradtools import testing
    >>> testing.check_gradients(lambda x, y: x * x * x * y, (2.0, 3.0), order=3)

    Source: As for `check_jvp`. The recursion is that of `jax.test_util.check_grads`.
    """
    settings = Settings.of("check_gradients", rtol, atol, step, seed)
    if not validation.is_one_of(order, (1, 2, 3)):
        advice = "For a higher order, pass the derivative as the function."
        raise validation.refused("check_gradients", "1, 2 or 3", "order", order, advice)
    if not isinstance(modes, (tuple, list)) or not modes or not all(m in ("forward", "reverse") for m in modes):
        expected, advice = "a tuple of 'forward', 'reverse' or both", "For one mode, write `('reverse',)`."
        raise validation.refused("check_gradients", expected, "modes", modes, advice)
    require_function("check_gradients", fun)
    _check_orders(settings, fun, args, order, tuple(modes), (), "output")


def check_hvp(
    fun: Function,
    primals: Sequence[Nested],
    tangents: Sequence[Nested] | None = None,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    step: float | None = None,
    seed: int = 0,
) -> None:
    r"""Checks a Hessian-vector product against central differences of the gradient, and the symmetry of the Hessian.

    Each element of $H v \approx \partial \nabla f(x + t v) / \partial t$ is compared, and
    $\langle u, H v \rangle = \langle v, H u \rangle$ for a random $u$.

    Args:
        fun: A function of `primals` that returns one scalar tensor.
        primals: As for `check_jvp`.
        tangents: As for `check_jvp`.
        rtol: As for `check_jvp`.
        atol: As for `check_jvp`.
        step: As for `check_jvp`.
        seed: As for `check_jvp`, and of the random vector $u$.

    Raises:
        AssertionError: As for `check_jvp`, or if the Hessian is not symmetric.
        ValueError: As for `check_jvp`, or if `fun` does not return a scalar.

    Cost:
        Two calls of `hvp`, and 15 gradients, up to 33 if `fun` varies on a small scale.

    Example:

    >>> from keras_gradtools import testing
    >>> testing.check_hvp(lambda x, y: x * x * y, (2.0, 3.0))

    Source: Pearlmutter, "Fast exact multiplication by the Hessian" (1994), equation 1.
    """
    settings = Settings.of("check_hvp", rtol, atol, step, seed)
    require_function("check_hvp", fun)
    primals = require_tuple("check_hvp", "primals", primals)
    point = Point(settings, grad(fun, argnums=tuple(range(len(primals)))), primals, GRADIENT)
    v, u = point.direction(tangents), point.direction()
    hessian_v, hessian_u = (
        point.outputs.vector(hvp(fun, point.inputs.pack(point.start), point.inputs.pack_direction(w))) for w in (v, u)
    )
    differences, noise = point.slope(v)
    point.require_close("order 2 (hvp)", hessian_v, differences, noise, point.outputs.name)
    left, right = u * hessian_v, v * hessian_u
    point.require_close(
        "order 2 (hvp, symmetry)",
        np.array([left.sum()]),
        np.array([right.sum()]),
        SAFETY * point.epsilon * (np.abs(left).sum() + np.abs(right).sum()),
        lambda _: "<u, H v>, which is not <v, H u> for random u and v",
        np.linalg.norm(left),
        "the other way round",
    )


def _check_orders(settings, fun, args, order, modes, under, returns):
    point = Point(settings, fun, args, returns)
    v, u = point.direction(), point.cotangent()
    tangents, cotangents = point.inputs.pack_direction(v), point.outputs.pack_direction(u)
    checks = {
        "forward": lambda what: _check_forward(point, v, what),
        "reverse": lambda what: _check_reverse(point, u, what),
    }
    derivatives = {
        "forward": (lambda *primals: jvp(fun, primals, tangents)[1], returns),
        "reverse": (lambda *primals: vjp(fun, *primals)[1](cotangents), GRADIENT),
    }
    for mode in modes:
        chain = (f"{mode} mode", *under)
        checks[mode](f"order {len(chain)} ({' of '.join(chain)})")
        if len(chain) < order:
            derivative, kind = derivatives[mode]
            _check_orders(settings, derivative, args, order, modes, chain, kind)


def _check_forward(point, v, what):
    _, derivative = jvp(point.fun, point.inputs.pack(point.start), point.inputs.pack_direction(v))
    point.require_close(what, point.outputs.vector(derivative), *point.slope(v), point.outputs.name)


def _check_reverse(point, u, what):
    _, pullback = vjp(point.fun, *point.inputs.pack(point.start))
    gradient = point.inputs.vector(pullback(point.outputs.pack_direction(u)))

    def compared(v):
        slope, noise = point.slope(v)
        with np.errstate(all="ignore"):
            return gradient @ v, u @ slope, np.linalg.norm(u * noise), np.linalg.norm(u * slope)

    def require_close(vectors, name):
        ours, differences, noise, scale = np.transpose([compared(v) for v in vectors])
        point.require_close(what, ours, differences, noise, name, scale)

    def off(v):
        ours, differences, *_ = compared(v)
        return np.nan_to_num(abs(ours - differences), nan=np.inf)

    size, v, failure = gradient.size, point.direction(), None
    chosen = range(size) if size <= _WHOLE else sorted(point.settings.random.choice(size, _DRAWN, replace=False))
    try:
        require_close([v], lambda _: "the whole gradient, along a random direction")
    except AssertionError as error:
        failure = error
        if size > _WHOLE:
            chosen = [*chosen, _suspect(off, v)]
    # The elements come first, because their message is more specific.
    require_close((np.eye(1, size, i)[0] for i in chosen), lambda k: point.inputs.name(chosen[k]))
    if failure:
        raise failure


def _suspect(off, v):
    """Finds a wrong element by bisection of the direction `v`, each time keeping the half with the larger error."""
    first, last = 0, v.size
    while last - first > 1:
        middle = (first + last) // 2
        left, right = np.zeros_like(v), np.zeros_like(v)
        left[first:middle], right[middle:last] = v[first:middle], v[middle:last]
        first, last = (first, middle) if off(left) >= off(right) else (middle, last)
    return first


def __dir__() -> list[str]:
    return __all__
