"""Taylor mode: the higher derivatives of a function along a curve, in one pass."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_gradtools import backend, validation
from keras_gradtools.annotations import Function, Nested
from keras_gradtools.tape import vectors
from keras_gradtools.transforms import auxiliary, compiled
from keras_gradtools.transforms.first_order import jvp_named, require_tuple
from keras_gradtools.transforms.taped_call import TapedCall, differentiable_argument, require_function
from keras_gradtools.transforms.taylor import jets
from keras_gradtools.transforms.taylor.kinks import warn_of_kinks

NAME = "jet"


def jet(fun: Function, primals: Sequence[Nested], series: Sequence[Sequence[Nested] | None]) -> tuple[Any, ...]:
    r"""Evaluates a function and its first K derivatives along a curve.

    For a curve $x(t)$ through $x(0) = x$, given by its derivatives $x^{(1)}, \dots, x^{(K)}$ at 0, it returns

    $$f(x), \quad \left(\frac{d}{dt} f(x(t)), \dots, \frac{d^K}{dt^K} f(x(t))\right)_{t=0}.$$

    These are derivatives, not Taylor coefficients, which are divided by $k!$. One pass computes all of them. It is
    compiled and cached as for `jacobian`, so define `fun` once if you call this eagerly in a loop.

    Args:
        fun: A function of `primals` that returns tensors in any nested structure.
        primals: A tuple of the arguments, as for `jvp`.
        series: A tuple with one list for each argument: its first K derivatives along the curve, each in the structure
            and shapes of the argument. None stands for zeros, in place of a list, a derivative or a leaf. Leaves
            without a derivative must have None. `([v, None, None],)` is a straight line: the result then holds the
            directional derivatives $\partial_v f$, $\partial_v^2 f$ and $\partial_v^3 f$.

    Returns:
        `(out, (d1, ..., dK))`. Each derivative has the structure and shapes of `out`, with zeros for unconnected
        outputs and None for outputs that are not floating-point. They can be differentiated again.

    Raises:
        ValueError: If a primal cannot have a gradient, the lists do not have the same length of at least 1, or an entry
            does not have the structure and shape of its primal.

    Cost:
        Counted in operations: a linear one runs K + 1 times. A product of two becomes about $K^2 / 2$ products. An
        elementwise function becomes at most one term for each partition of 1, ..., K: 18 for K = 5, 138 for K = 10. All
        other operations, and a function whose operations are not visible, are differentiated by nested `jvp`,
        at a cost that is exponential in K.

    Example:

    >>> import keras_gradtools as kg
    >>> x, x1, x2 = 2.0, 3.0, 4.0
    >>> out, (d1, d2) = kg.jet(lambda x: x * x * x, (x,), ([x1, x2],))
    >>> float(out), float(d1), float(d2)  # x^3, 3 x^2 x1, 6 x x1^2 + 3 x^2 x2
    (8.0, 36.0, 156.0)

    Source: Griewank & Walther, "Evaluating Derivatives" (2008), chapter 13; Bettencourt et al., "Taylor-mode automatic
    differentiation for higher-order derivatives in JAX" (2019).
    """
    require_function(NAME, fun)
    primals = require_tuple(NAME, "primals", primals)
    series, order = _require_series(series, len(primals))
    tensors, rest = compiled.run(NAME, fun, _body, order, (primals, series), {})
    return auxiliary.put_together(tensors, rest)


_EXAMPLE = "For a function of one argument up to second order, write `([x1, x2],)`."


def _require_series(series, count):
    """Returns the series with a tuple, or None, for each argument, and the order."""
    if not isinstance(series, (list, tuple)) or len(series) != count:
        raise _refused(f"a tuple with one list of derivatives for each argument, {count} in all,", series)
    for terms in series:
        if terms is not None and not isinstance(terms, (list, tuple)):
            raise _refused("a list of derivatives, or None, for each argument", terms)
    lengths = {len(terms) for terms in series if terms is not None}
    if len(lengths) != 1 or 0 in lengths:
        given = tuple(None if terms is None else len(terms) for terms in series)
        raise ValueError(
            f"{NAME} expects lists of the same length, at least 1, in `series`. Received: lists of length {given}. "
            "Put None in place of a derivative that is zero."
        )
    return tuple(None if terms is None else tuple(terms) for terms in series), lengths.pop()


def _refused(expected, given):
    what = f"{type(given).__name__} of length {len(given)}" if isinstance(given, (list, tuple)) else None
    return ValueError(
        f"{NAME} expects {expected} as `series`. Received: {what or validation.describe(given)}. {_EXAMPLE}"
    )


def _body(fun, primals, series):
    return auxiliary.take_apart(_derivatives(fun, primals, series))


def _derivatives(fun, primals, series):
    operations = backend.operations()
    call = TapedCall(NAME, fun, primals, argnums=tuple(range(len(primals))), operations=operations)
    terms = _terms(call.sources, series)
    parts = backend.steps_between(call.tape, operations, call.flat_targets, call.flat_sources)
    if parts is None:
        return _nested(fun, primals, terms)
    # All derivatives are with respect to one variable, the parameter of the curve.
    keys = [(0,) * k for k in range(1, len(terms) + 1)]
    seeds = [
        jets.Jet({key: x for key, x in zip(keys, by_order, strict=True) if x is not None})
        for by_order in zip(*terms, strict=True)
    ]
    by_target = jets.at_targets(call, parts, seeds, keys)
    if len(keys) > 1 and not any(key in found for found in by_target for key in keys[1:]):
        warn_of_kinks(NAME, parts[0])
    return call.value, tuple(jets.packed(call, by_target, key) for key in keys)


def _terms(sources, series):
    """For each order, a flat list of the derivatives of all sources, with None for zero."""
    orders = max(len(terms) for terms in series if terms is not None)
    found = []
    for k in range(orders):
        given = tuple(None if terms is None else terms[k] for terms in series)
        found.append(vectors.like(given, sources, f"`series` at order {k + 1}", "`primals`", lambda x: None))
    return found


def _nested(fun, primals, terms):
    """Derivatives of derivatives with respect to the parameter of the curve."""
    primals = tuple(differentiable_argument(NAME, i, x) for i, x in enumerate(primals))
    curves = list(zip(vectors.differentiable(primals), zip(*terms, strict=True), strict=True))

    def along(t):
        return fun(*vectors.replaced(primals, [_point(x, by_order, t) for x, by_order in curves])), ()

    def differentiated(fun):
        def derivative(t):
            out, tangent, lower = jvp_named(NAME, fun, (t,), (ops.ones_like(t),), has_aux=True)
            return tangent, (*lower, out)

        return derivative

    for _ in terms:
        along = differentiated(along)
    last, (value, *lower) = along(ops.zeros((), dtype=keras.config.floatx()))
    return value, (*lower, last)


def _point(x, by_order, t):
    """The polynomial $x + x_1 t + x_2 t^2 / 2 + ...$, by Horner's rule."""
    t, total = ops.cast(t, x.dtype), None
    for k in range(len(by_order), 0, -1):
        term = by_order[k - 1]
        total = term if total is None else total if term is None else total + term
        total = None if total is None else total * (t / k)
    return x if total is None else x + total
