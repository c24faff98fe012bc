"""Derivatives of elementwise functions, up to any order."""

from keras import ops

from keras_gradtools.backend.steps import ELEMENTWISE


def derivatives(step, order):
    """The first `order` derivatives of an elementwise step at its recorded input, as a list of tensors."""
    if len(step.slopes) >= order:
        return step.slopes[:order]
    (x,), (y,) = step.primals, step.results
    if step.function is not None:
        return CLOSED_FORMS[step.function](x, y, order)
    found, fun = [], step.call
    for _ in range(order):
        fun = _derivative(step, fun)
        found.append(fun(x)[0])
    return found


def remember(steps, order):
    """Computes the first derivatives of all elementwise steps once, for a loop over passes through the same steps."""
    for step in steps:
        if step.kind == ELEMENTWISE:
            step.slopes = derivatives(step, 1 if step.is_piecewise_linear else order)


def _derivative(step, fun):
    return lambda x: step.slope(fun, x)


def _exp(x, y, order):
    return [y] * order


def _cycle(*functions):
    def found(x, y, order):
        distinct = [f(x, y) for f in functions[:order]]
        return [distinct[i % len(functions)] for i in range(order)]

    return found


def _tanh(x, y, order):
    if order <= 2:
        slope = 1 - y * y
        return [slope, -2 * y * slope][:order]
    # Polynomials in y: the derivative of p(y) is p'(y) (1 - y^2).
    return _by_polynomials(y, order, [1.0, 0.0, -1.0])


def _sigmoid(x, y, order):
    if order <= 2:
        slope = y * (1 - y)
        return [slope, slope * (1 - 2 * y)][:order]
    return _by_polynomials(y, order, [0.0, 1.0, -1.0])


def _by_polynomials(y, order, slope):
    """The derivatives of a function y with y' = slope(y). Polynomials are lists of coefficients, lowest power first."""
    polynomial, found = slope, []
    for _ in range(order):
        found.append(_value(polynomial, y))
        polynomial = _product([k * c for k, c in enumerate(polynomial)][1:], slope)
    return found


def _value(polynomial, y):
    total = polynomial[-1]
    for c in reversed(polynomial[:-1]):
        total = total * y + c if c else total * y
    return total


def _product(p, q):
    found = [0.0] * (len(p) + len(q) - 1)
    for i, a in enumerate(p):
        for j, b in enumerate(q):
            found[i + j] += a * b
    return found


def _square(x, y, order):
    return [2 * x, ops.full_like(x, 2), *(ops.zeros_like(x) for _ in range(order - 2))][:order]


CLOSED_FORMS = {
    "cos": _cycle(lambda x, y: -ops.sin(x), lambda x, y: -y, lambda x, y: ops.sin(x), lambda x, y: y),
    "cosh": _cycle(lambda x, y: ops.sinh(x), lambda x, y: y),
    "exp": _exp,
    "sigmoid": _sigmoid,
    "sin": _cycle(lambda x, y: ops.cos(x), lambda x, y: -y, lambda x, y: -ops.cos(x), lambda x, y: y),
    "sinh": _cycle(lambda x, y: ops.cosh(x), lambda x, y: y),
    "square": _square,
    "tanh": _tanh,
}
