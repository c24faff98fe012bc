"""Random programs: the tape against central differences of the same program in NumPy, in double precision."""

import hypothesis
import numpy as np
from hypothesis import strategies as st
from keras import ops

import keras_gradtools as kg
from tests.cases import tensor

SIZE = 3
MIX = np.array([[0.5, -0.3, 0.1], [0.2, 0.4, -0.6], [-0.1, 0.7, 0.3]])

# Smooth and bounded in growth: (the operation in keras.ops, in NumPy), of the last value and an earlier one.
OPERATIONS = [
    (lambda a, b: ops.sin(a), lambda a, b: np.sin(a)),
    (lambda a, b: ops.tanh(a), lambda a, b: np.tanh(a)),
    (lambda a, b: ops.sigmoid(a), lambda a, b: 1 / (1 + np.exp(-a))),
    (lambda a, b: ops.softplus(a), lambda a, b: np.logaddexp(a, 0)),
    (lambda a, b: ops.softmax(a), lambda a, b: np.exp(a) / np.exp(a).sum()),
    (lambda a, b: ops.sqrt(1 + a * a), lambda a, b: np.sqrt(1 + a * a)),
    (lambda a, b: a / (2 + b * b), lambda a, b: a / (2 + b * b)),
    (lambda a, b: a * ops.cos(b), lambda a, b: a * np.cos(b)),
    (lambda a, b: a + b, lambda a, b: a + b),
    (lambda a, b: ops.matmul(tensor(MIX), a), lambda a, b: MIX @ a),
    (lambda a, b: ops.flip(a) * 0.5, lambda a, b: a[::-1] * 0.5),
    (lambda a, b: ops.cumsum(a) * 0.5, lambda a, b: np.cumsum(a) * 0.5),
    (lambda a, b: ops.concatenate([a[1:], b[:1]]), lambda a, b: np.concatenate([a[1:], b[:1]])),
]

programs = st.lists(st.tuples(st.integers(0, len(OPERATIONS) - 1), st.integers(0, 5)), min_size=1, max_size=6)
vectors = st.lists(st.integers(-20, 20), min_size=SIZE, max_size=SIZE).map(lambda v: np.array(v) / 10)
checked = hypothesis.settings(max_examples=12, deadline=None, derandomize=True, database=None)


def run(program, x, numpy):
    values = [x]
    for operation, earlier in program:
        values.append(OPERATIONS[operation][numpy](values[-1], values[earlier % len(values)]))
    return values[-1]


def record(program, x, order=1):
    """The tape, its source, and the program's value or (order 2) the gradient of its sum."""
    x = tensor(x)
    tape = kg.GradientTape(persistent=True)
    with tape:
        tape.watch(x)
        if order == 1:
            return tape, x, run(program, x, False)
        with kg.GradientTape() as inner:
            inner.watch(x)
            y = run(program, x, False)
        return tape, x, inner.gradient(y, x)


def difference(function, x, v, h):
    """The derivative along v, by central differences of fourth order."""
    at = [function(x + k * h * v) for k in (-2, -1, 1, 2)]
    return (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * h)


def near(actual, expected, tolerance=2e-5):
    actual = ops.convert_to_numpy(actual)
    assert actual.shape == np.shape(expected)
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * (1 + np.abs(expected).max()))


@checked
@hypothesis.given(programs, vectors, vectors, vectors)
def test_derivatives_in_both_modes(program, x, u, v):
    tape, source, y = record(program, x)
    along_v = difference(lambda x: run(program, x, True), x, v, 1e-3)
    near(tape.jvp(y, source, tensor(v)), along_v)
    gradient = ops.convert_to_numpy(tape.gradient(y, source, output_gradients=tensor(u)))
    near(gradient @ v, u @ along_v)


@checked
@hypothesis.given(programs, vectors, st.integers(1, 4))
def test_jacobian(program, x, chunk_size):
    tape, source, y = record(program, x)
    columns = [difference(lambda x: run(program, x, True), x, e, 1e-3) for e in np.eye(SIZE)]
    near(tape.jacobian(y, source, chunk_size=chunk_size), np.stack(columns, axis=-1))


@checked
@hypothesis.given(programs, vectors, vectors, vectors)
def test_second_order(program, x, u, v):
    """<u, H v>, forward over reverse and reverse over reverse, against second differences in NumPy."""
    tape, source, gradient = record(program, x, order=2)

    def along(x, direction):
        return difference(lambda x: run(program, x, True).sum(), x, direction, 1e-3)

    expected = difference(lambda x: along(x, u), x, v, 1e-2)
    forward = tape.jvp(gradient, source, tensor(v), unconnected_gradients="zero")
    reverse = tape.gradient(gradient, source, tensor(u), unconnected_gradients="zero")
    near(u @ ops.convert_to_numpy(forward), expected, 1e-4)
    near(ops.convert_to_numpy(reverse) @ v, expected, 1e-4)


@checked
@hypothesis.given(programs, st.integers(0, 5), vectors)
def test_what_is_computed_in_a_pause_is_a_constant(program, paused, x):
    """One step of the program is computed while the tape pauses."""
    paused %= len(program)
    source = tensor(x)
    with kg.GradientTape() as tape:
        tape.watch(source)
        head = run(program[:paused], source, False)
        with tape.stop_recording():
            constant = run(program[:paused], source, False)
        y = ops.sum(head * constant)
    weights = run(program[:paused], x, True)
    expected = [
        difference(lambda x: (run(program[:paused], x, True) * weights).sum(), x, e, 1e-3) for e in np.eye(SIZE)
    ]
    # Where no operation was left in the pause, `constant` is the source itself.
    near(tape.gradient(y, source), np.array(expected) * (1 if paused else 2))
