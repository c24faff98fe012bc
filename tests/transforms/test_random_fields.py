"""Random programs of points through forward passes, against nested derivatives."""

import functools

import hypothesis
import keras
import numpy as np
import pytest
from hypothesis import strategies as st
from keras import ops

import keras_gradtools as kg
from tests.cases import tensor

BATCH, SIZE = 4, 3
MIX = np.array([[0.5, -0.3, 0.1], [0.2, 0.4, -0.6], [-0.1, 0.7, 0.3]])


def standardized(a):
    """What LayerNormalization does."""
    centred = a - ops.mean(a, axis=1, keepdims=True)
    return centred / ops.sqrt(0.5 + ops.mean(centred**2, axis=1, keepdims=True))


# Of the last value and an earlier one, all of shape (batch, 3). Smooth where they are evaluated, and bounded in growth.
OPERATIONS = [
    lambda a, b: ops.sin(a),
    lambda a, b: ops.tanh(a),
    lambda a, b: ops.sigmoid(a) * ops.cosh(ops.sin(b)),
    lambda a, b: ops.softplus(a),
    lambda a, b: ops.softmax(a),
    lambda a, b: ops.log(2 + a * a),
    lambda a, b: a / (2 + b * b),
    lambda a, b: ops.divide(1.0, ops.add(2.0, ops.square(a))),
    lambda a, b: ops.power(2.0, ops.sin(a)) - ops.power(ops.cosh(ops.tanh(b)), -2),
    lambda a, b: a * ops.cos(b),
    lambda a, b: ops.subtract(1.0, a) + b,
    lambda a, b: ops.matmul(a, tensor(MIX)),
    lambda a, b: ops.concatenate([a[:, 1:], b[:, :1]], axis=1),
    lambda a, b: ops.einsum("bi,bj->bij", ops.sin(a), b)[:, 1],
    lambda a, b: ops.sum(a, axis=1, keepdims=True) * ops.tanh(b),
    lambda a, b: ops.transpose(ops.flip(ops.transpose(a * b), axis=0)) / 2,
    lambda a, b: ops.where(ops.sin(a) > 5, b, a),
    lambda a, b: standardized(a),
]
programs = st.lists(st.tuples(st.integers(0, len(OPERATIONS) - 1), st.integers(0, 5)), min_size=1, max_size=6)
points = st.integers(0, 10_000).map(lambda seed: np.random.default_rng(seed).normal(size=(BATCH, SIZE)))
KEYS = [(0,), (2, 0), (1, 1), (0, 1, 2), (2, 2, 2)]


def checked(count):
    return hypothesis.settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


def run(program, x):
    values = [x]
    for operation, earlier in program:
        values.append(OPERATIONS[operation](values[-1], values[earlier % len(values)]))
    return values[-1]


def along(fun, direction):
    return lambda x: kg.jvp(fun, (x,), (ops.broadcast_to(direction, ops.shape(x)),))[1]


def check(program, x):
    fun = functools.partial(run, program)
    units = [tensor(e) for e in np.eye(SIZE)]
    direction = tensor(np.random.default_rng(0).normal(size=SIZE))

    def nested(x):
        found = []
        for key in [*KEYS, *((i, i) for i in range(SIZE))]:
            found.append(functools.reduce(along, [units[i] for i in key], fun)(x))
        line = [functools.reduce(along, [direction] * k, fun)(x) for k in (1, 2, 3)]
        return found[: len(KEYS)], sum(found[len(KEYS) :]), line

    x = tensor(x)
    by_key, laplacian, line = kg.jit(nested)(x)
    for found, expected in zip(kg.partial_derivatives(fun, KEYS)(x), by_key, strict=True):
        near(found, expected)
    tangent = ops.broadcast_to(direction, ops.shape(x))
    for found, expected in zip(kg.jet(fun, (x,), ([tangent, None, None],))[1], line, strict=True):
        near(found, expected)
    near(kg.laplacian(fun)(x), laplacian)
    options = {"samples": SIZE, "directions": "coordinates", "seed": 0, "return_standard_error": True}
    near(kg.laplacian(fun, **options)(x)[0], laplacian)


def near(found, expected):
    found, expected = (ops.convert_to_numpy(ops.stop_gradient(v)) for v in (found, expected))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * (1 + np.abs(expected).max()))


@checked(5)
@hypothesis.given(programs, points)
def test_programs(program, x):
    check(program, x)


# TensorFlow takes long to trace the nested third derivatives of a program.
@pytest.mark.slow
@checked(60 if keras.config.backend() == "tensorflow" else 300)
@hypothesis.given(programs, points)
def test_many_programs(program, x):
    check(program, x)
