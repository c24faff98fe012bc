"""Functions with closed-form derivatives, and the two steps between NumPy and the backend.

A case gives a function in `keras.ops`, NumPy inputs, and its Jacobian by each input in NumPy, of shape
`output + input`; the gradient for cotangents u is u contracted with it. `hessian` is that by the one input.
"""

import typing

import keras
import numpy as np
from keras import ops

import keras_gradtools as kg

# The version, of which older ones lack some operations.
KERAS = tuple(map(int, keras.__version__.split(".")[:2]))
RANDOM = np.random.default_rng(0)


class Case(typing.NamedTuple):
    name: str
    fun: typing.Callable
    inputs: tuple
    jacobians: tuple
    hessian: np.ndarray | None = None


def tensor(x, dtype="float32"):
    return ops.convert_to_tensor(np.asarray(x), dtype=dtype)


def central_differences(fun, weights, eps=1e-5):
    """The gradient of `fun(weights)` by each array of `weights`, in double precision."""
    weights = [np.array(w, "float64") for w in weights]
    gradients = []
    for w in weights:
        g = np.empty_like(w)
        for index in np.ndindex(w.shape):
            kept = w[index]
            w[index] = kept + eps
            above = fun(weights)
            w[index] = kept - eps
            g[index] = (above - fun(weights)) / (2 * eps)
            w[index] = kept
        gradients.append(g)
    return gradients


def derivatives(fun, x, orders):
    """The derivatives of a function of one number, from the first order on."""
    found = []
    for _ in range(orders):
        fun = kg.grad(fun)
        found.append(fun(x))
    return found


def close(actual, desired, rtol=2e-5, atol=2e-6):
    """Asserts the same structure, shapes and values; None only where None is expected."""
    if desired is None:
        assert actual is None
    elif isinstance(actual, (list, tuple, dict)):
        assert type(actual) is type(desired) and len(actual) == len(desired)
        for key in desired if isinstance(desired, dict) else range(len(desired)):
            close(actual[key], desired[key], rtol, atol)
    else:
        assert actual is not None, "nothing is connected"
        actual, desired = ops.convert_to_numpy(actual), np.asarray(desired)
        assert actual.shape == desired.shape
        np.testing.assert_allclose(actual.astype("float64"), desired, rtol, atol)


def _elementwise(name, fun, x, first, second):
    """A function of each element alone: its derivatives stand on the diagonals."""
    n = len(x)
    hessian = np.zeros((n, n, n))
    hessian[range(n), range(n), range(n)] = second(x)
    return Case(name, fun, (x,), (np.diag(first(x) * np.ones(n)),), hessian)


def _rosenbrock():
    x, y = point = np.array([-0.5, 0.8])
    return Case(
        "rosenbrock",
        lambda p: (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2,
        (point,),
        (np.array([-400 * x * (y - x**2) - 2 * (1 - x), 200 * (y - x**2)]),),
        np.array([[1200 * x**2 - 400 * y + 2, -400 * x], [-400 * x, 200.0]]),
    )


def _quadratic_form():
    a, x = RANDOM.normal(size=(3, 3)), RANDOM.normal(size=3)
    return [
        Case(
            "quadratic form by vector",
            lambda x: ops.sum(x * ops.matmul(tensor(a), x)),
            (x,),
            ((a + a.T) @ x,),
            a + a.T,
        ),
        Case(
            "quadratic form by both",
            lambda x, a: ops.sum(x * ops.matmul(a, x)),
            (x, a),
            ((a + a.T) @ x, np.outer(x, x)),
        ),
    ]


def _exponential_family():
    x = RANDOM.normal(size=4)
    p = np.exp(x) / np.exp(x).sum()
    fisher = np.diag(p) - np.outer(p, p)
    return [
        Case("logsumexp", lambda x: ops.logsumexp(x), (x,), (p,), fisher),
        Case("softmax", lambda x: ops.softmax(x), (x,), (fisher,)),
        Case("log_softmax", lambda x: ops.log_softmax(x), (x,), (np.eye(4) - p,)),
    ]


def _linear_algebra():
    a, b = RANDOM.normal(size=(2, 3)), RANDOM.normal(size=(3, 2))
    m = RANDOM.normal(size=(3, 3)) + 3 * np.eye(3)
    inverse = np.linalg.inv(m)
    x = RANDOM.normal(size=3)
    norm = np.linalg.norm(x)
    return [
        Case(
            "matmul",
            lambda a, b: ops.matmul(a, b),
            (a, b),
            (np.einsum("ik,lj->ijkl", np.eye(2), b), np.einsum("ik,jl->ijkl", a, np.eye(2))),
        ),
        Case(
            "inverse",
            lambda m: ops.inv(m),
            (m,),
            (-np.einsum("ik,lj->ijkl", inverse, inverse),),
        ),
        Case("determinant", lambda m: ops.det(m), (m,), (np.linalg.det(m) * inverse.T,)),
        Case(
            "norm",
            lambda x: ops.norm(x),
            (x,),
            (x / norm,),
            (np.eye(3) - np.outer(x, x) / norm**2) / norm,
        ),
        Case(
            "einsum",
            lambda x, y: ops.einsum("i,j->ij", x, y),
            (x, x + 1),
            (np.einsum("ik,j->ijk", np.eye(3), x + 1), np.einsum("i,jk->ijk", x, np.eye(3))),
        ),
    ]


def _movement():
    x, n = np.array([0.3, -1.2, 2.0]), np.eye(3)
    m = RANDOM.normal(size=(2, 3))
    return [
        Case("gather", lambda x: ops.take(x, [2, 0, 2]), (x,), (n[[2, 0, 2]],)),
        Case("index", lambda x: x[1:], (x,), (n[1:],)),
        Case("sort", lambda x: ops.sort(x), (x,), (n[np.argsort(x)],)),
        Case("flip", lambda x: ops.flip(x), (x,), (n[::-1],)),
        Case("pad", lambda x: ops.pad(x, [[1, 0]]), (x,), (np.eye(4)[:, 1:],)),
        Case("transpose", ops.transpose, (m,), (np.einsum("ik,jl->jikl", np.eye(2), n),)),
        Case(
            "concatenate",
            lambda x, y: ops.concatenate([y, x]),
            (x, x * 2),
            (np.concatenate([0 * n, n]), np.concatenate([n, 0 * n])),
        ),
        Case("broadcast", lambda x: ops.broadcast_to(x, (2, 3)), (x,), (np.stack([n, n]),)),
    ]


def _reductions():
    x = np.array([0.7, -1.3, 2.0, 0.4])
    n = len(x)
    product = np.prod(x)
    return [
        Case("max", ops.max, (x,), (np.eye(n)[2],)),
        Case("mean", ops.mean, (x,), (np.ones(n) / n,)),
        Case("variance", ops.var, (x,), (2 * (x - x.mean()) / n,), 2 / n * (np.eye(n) - 1 / n)),
        Case("cumsum", ops.cumsum, (x,), (np.tril(np.ones((n, n))),)),
        Case("prod", ops.prod, (x,), (product / x,), product / np.outer(x, x) * (1 - np.eye(n))),
        Case(
            "division",
            lambda x, y: x / y,
            (x, x + 3),
            (np.diag(1 / (x + 3)), np.diag(-x / (x + 3) ** 2)),
        ),
    ]


def _elementwise_functions():
    x, y = np.array([0.7, -1.3, 2.0]), np.array([0.4, 1.5, 3.0])
    sigmoid = 1 / (1 + np.exp(-x))
    slope = sigmoid * (1 - sigmoid)
    return [
        _elementwise("exp", ops.exp, x, np.exp, np.exp),
        _elementwise("log", ops.log, y, lambda y: 1 / y, lambda y: -1 / y**2),
        _elementwise("sqrt", ops.sqrt, y, lambda y: 0.5 / y**0.5, lambda y: -0.25 / y**1.5),
        _elementwise("sin", ops.sin, x, np.cos, lambda x: -np.sin(x)),
        _elementwise("power", lambda x: x**3, x, lambda x: 3 * x**2, lambda x: 6 * x),
        _elementwise("softplus", ops.softplus, x, lambda x: sigmoid, lambda x: slope),
        _elementwise("sigmoid", ops.sigmoid, x, lambda x: slope, lambda x: slope * (1 - 2 * sigmoid)),
        _elementwise("abs", ops.abs, x, np.sign, lambda x: 0 * x),
        _elementwise("relu", ops.relu, x, lambda x: x > 0, lambda x: 0 * x),
        _elementwise("clip", lambda x: ops.clip(x, -1, 1), x, lambda x: abs(x) < 1, lambda x: 0 * x),
        _elementwise(
            "where",
            lambda x: ops.where(x > 0, x**2, -3 * x),
            x,
            lambda x: np.where(x > 0, 2 * x, -3),
            lambda x: np.where(x > 0, 2.0, 0.0),
        ),
    ]


CASES = [
    _rosenbrock(),
    *_quadratic_form(),
    *_exponential_family(),
    *_linear_algebra(),
    *_movement(),
    *_reductions(),
    *_elementwise_functions(),
]
CASES_WITH_HESSIAN = [case for case in CASES if case.hessian is not None]


def case_id(case):
    return case.name.replace(" ", "_")
