"""`GradientTape.gradient`: values, structures, cotangents, sources of every kind, dtypes."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from tests.cases import CASES, case_id, close, tensor


def variable(x):
    return keras.Variable(np.asarray(x, "float32"))


def contract(cotangent, jacobian):
    return np.tensordot(cotangent, jacobian, np.ndim(cotangent))


@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize("kind", ["tensors", "variables"])
def test_closed_form(case, kind):
    inputs = [tensor(x) if kind == "tensors" else variable(x) for x in case.inputs]
    with kg.GradientTape(persistent=True) as tape:
        if kind == "tensors":
            tape.watch(inputs)
        y = case.fun(*inputs)
    u = np.random.default_rng(1).normal(size=tuple(y.shape))
    expected = [contract(np.ones(tuple(y.shape)), jacobian) for jacobian in case.jacobians]
    close(tape.gradient(y, inputs), expected)
    expected = [contract(u, jacobian) for jacobian in case.jacobians]
    close(tape.gradient(y, inputs, output_gradients=tensor(u)), expected)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (lambda a, b: a, [6, None]),
        (lambda a, b: [a, b], [8, 5]),
        (lambda a, b: {"b": (b,), "a": [a]}, [8, 5]),
        (lambda a, b: (a, a, [b]), [14, 5]),
        (lambda a, b: [], [None, None]),
    ],
)
def test_targets_in_any_nesting_are_summed(target, expected):
    x, y = tensor(3.0), tensor(2.0)
    with kg.GradientTape() as tape:
        tape.watch([x, y])
        a, b = x * x, 2 * x + 5 * y
    close(tape.gradient(target(a, b), [x, y]), expected)


@pytest.mark.parametrize(
    "nest",
    [
        lambda x, v, other: x,
        lambda x, v, other: [x, v, other],
        lambda x, v, other: (x, [v, {"other": other}], v),
        lambda x, v, other: {"v": v, "x": (x, x)},
        lambda x, v, other: [],
    ],
)
def test_the_gradient_has_the_structure_of_the_sources(nest):
    x, v, other = tensor(3.0), variable(5.0), tensor(7.0)
    with kg.GradientTape() as tape:
        tape.watch([x, other])
        y = x * x * v
    gradient = tape.gradient(y, nest(x, v, other))
    keras.tree.assert_same_structure(gradient, nest(x, v, other))
    close(keras.tree.flatten(gradient), keras.tree.flatten(nest(30.0, 9.0, None)))


def test_output_gradients_follow_the_structure_of_the_target():
    x = tensor([1.0, 2.0])
    with kg.GradientTape(persistent=True) as tape:
        tape.watch(x)
        y, z = x * x, 3 * x
    u, v = tensor([10.0, 100.0]), tensor([1.0, 2.0])
    close(tape.gradient({"y": y, "z": [z]}, x, {"y": u, "z": [v]}), [23, 406])
    close(tape.gradient([y, z], x, [None, v]), [5, 10])
    close(tape.gradient(y, x, np.array([10, 100])), [20, 400])


@pytest.mark.parametrize("upstream", [False, True], ids=["alone", "with upstream"])
def test_an_intermediate_tensor_can_be_a_source(upstream):
    x = tensor([2.0, 3.0])
    with kg.GradientTape() as tape:
        tape.watch(x)
        hidden = x * x
        y = ops.sum(hidden * hidden * x)
    by_hidden = [2 * 4 * 2, 2 * 9 * 3]
    if upstream:
        # By x the whole derivative, 5 x^4, as if no other source had been asked for.
        close(tape.gradient(y, [hidden, x, hidden]), [by_hidden, [80, 405], by_hidden])
    else:
        close(tape.gradient(y, hidden), by_hidden)


def test_two_intermediates_in_a_row():
    x = tensor(2.0)
    with kg.GradientTape() as tape:
        tape.watch(x)
        first = x * x
        second = first * first
        y = second * x
    close(tape.gradient(y, [second, first, x]), [2, 16, 80])


def test_several_outputs_of_one_operation():
    x = tensor([1.0, 2.0, 3.0, 4.0])
    with kg.GradientTape() as tape:
        tape.watch(x)
        a, b = ops.split(x, 2)
        y = ops.sum(a * b * b)
    close(tape.gradient(y, [a, b, x]), [[9, 16], [6, 16], [9, 16, 6, 16]])


@pytest.mark.parametrize("kind", ["tensor", "variable"])
def test_a_repeated_source_gets_the_same_gradient_each_time(kind):
    x = tensor(3.0) if kind == "tensor" else variable(3.0)
    with kg.GradientTape() as tape:
        tape.watch(x)
        y = x * x
    close(tape.gradient(y, [x, (x, x)]), [6, (6, 6)])


@pytest.mark.parametrize("kind", ["tensor", "variable"])
def test_the_target_can_be_the_source(kind):
    x = tensor([3.0, 4.0]) if kind == "tensor" else variable([3.0, 4.0])
    with kg.GradientTape(persistent=True) as tape:
        tape.watch(x)
        y = x * x
    close(tape.gradient(x, x), [1, 1])
    close(tape.gradient(x, x, tensor([2.0, 5.0])), [2, 5])
    close(tape.gradient([x, y], [x, y]), [[7, 9], [1, 1]])


def test_an_intermediate_target_can_be_the_source():
    x = tensor(3.0)
    with kg.GradientTape() as tape:
        tape.watch(x)
        y = x * x
        z = y * 2
    close(tape.gradient([y, z], [y, x]), [3, 18])


class TestUnconnected:
    def record(self):
        x, unused, v = tensor([1.0, 2.0]), tensor([[1.0, 2.0]]), variable(np.ones((3, 2)))
        with kg.GradientTape() as tape:
            tape.watch([x, unused])
            _ = v * 1.0  # read, but leading nowhere
            y = x * x
        return tape, y, [unused, v, variable(np.ones(4)), x]

    def test_none(self):
        tape, y, sources = self.record()
        close(tape.gradient(y, sources), [None, None, None, [2, 4]])

    def test_zero(self):
        tape, y, sources = self.record()
        expected = [np.zeros((1, 2)), np.zeros((3, 2)), np.zeros(4), [2, 4]]
        close(tape.gradient(y, sources, unconnected_gradients="zero"), expected)

    def test_a_target_that_is_a_constant(self):
        tape, _, sources = self.record()
        close(tape.gradient(tensor(1.0), sources), [None] * 4)

    def test_an_integer_on_the_way(self):
        x = tensor([1.5, 2.5])
        with kg.GradientTape() as tape:
            tape.watch(x)
            y = ops.cast(ops.cast(x, "int32"), "float32") * 2.0
        assert tape.gradient(y, x) is None


def test_the_gradient_of_an_embedding_is_dense():
    layer = keras.layers.Embedding(4, 2)
    layer.build()
    with kg.GradientTape() as tape:
        y = layer(ops.convert_to_tensor([1, 3, 1]))
    gradient = tape.gradient(y, layer.embeddings, tensor([[1.0, 2.0], [3.0, 4.0], [10.0, 20.0]]))
    # To TensorFlow its sparse gradients are tensors too; but they have no rows to take.
    close(gradient[1], [11, 22])
    close(gradient, [[0, 0], [11, 22], [0, 0], [3, 4]])


def test_a_persistent_tape_answers_any_number_of_times():
    x = tensor(3.0)
    with kg.GradientTape(persistent=True) as tape:
        tape.watch(x)
        y = x * x
        z = y * y
    for _ in range(2):
        close(tape.gradient(z, x), 108)
        close(tape.gradient(y, x), 6)
        close(tape.gradient(z, y), 18)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_gives_gradients_in_the_dtype_of_the_variable(policy):
    layer = keras.layers.Dense(2, dtype=policy)
    layer.build((None, 3))
    # Values that half precision holds exactly.
    layer.kernel.assign([[1.0, 2.0], [0.5, -1.0], [0.25, 4.0]])
    x = tensor([[1.0, 2.0, 4.0], [-1.0, 0.5, 2.0]])
    with kg.GradientTape() as tape:
        tape.watch(x)
        y = layer(x)
        loss = ops.sum(ops.cast(y, "float32"))
    assert keras.backend.standardize_dtype(y.dtype) == layer.compute_dtype
    gradients = tape.gradient(loss, [x, layer.kernel, layer.bias])
    close(gradients, [[[3, -0.5, 4.25]] * 2, [[0, 0], [2.5, 2.5], [6, 6]], [2, 2]])
    assert {keras.backend.standardize_dtype(g.dtype) for g in gradients} == {"float32"}


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float32", pytest.param("float64", marks=pytest.mark.float64)]
)
def test_the_gradient_has_the_dtype_of_its_source(dtype):
    x, y = tensor([0.5, 2.0], dtype), tensor([1.0, 4.0], "float32")
    with kg.GradientTape() as tape:
        tape.watch([x, y])
        z = ops.cast(x * x, "float32") * y
    gradients = tape.gradient(z, [x, y])
    close([ops.cast(g, "float32") for g in gradients], [[1, 16], [0.25, 4]])
    assert [keras.backend.standardize_dtype(g.dtype) for g in gradients] == [dtype, "float32"]
