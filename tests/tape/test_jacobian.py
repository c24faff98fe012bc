"""`jacobian`, `batch_jacobian` and `jvp`: closed forms, chunks, empty axes, and the identities between them."""

import enum
import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from keras_gradtools import backend
from tests.cases import CASES, case_id, close, tensor

RANDOM = np.random.default_rng(2)


def record(fun, inputs):
    tape = kg.GradientTape(persistent=True)
    with tape:
        tape.watch(inputs)
        y = fun(*inputs)
    return tape, y


def model_inputs(*shape):
    return RANDOM.normal(size=shape)


class TestJacobian:
    @pytest.mark.parametrize("case", CASES, ids=case_id)
    def test_closed_form(self, case):
        inputs = [tensor(x) for x in case.inputs]
        tape, y = record(case.fun, inputs)
        close(tape.jacobian(y, inputs), list(case.jacobians))

    def test_by_variables_and_intermediates(self):
        v = keras.Variable(np.array([1.0, 2.0], "float32"))
        with kg.GradientTape() as tape:
            square = v * v
            y = ops.einsum("i,j->ij", square, v)
        # y_ij = s_i v_j with s = v^2.
        by_square = np.einsum("ik,j->ijk", np.eye(2), [1, 2])
        by_v = np.einsum("ik,i,j->ijk", np.eye(2), [2, 4], [1, 2]) + np.einsum("i,jk->ijk", [1, 4], np.eye(2))
        expected = {"square": by_square, "v": (by_v, by_v)}
        close(tape.jacobian(y, {"square": square, "v": (v, v)}), expected)

    @pytest.mark.parametrize("chunk_size", [1, 4, 6, 100])
    def test_chunk_size_changes_no_value(self, chunk_size):
        m, v = RANDOM.normal(size=(2, 3)), RANDOM.normal(size=3)
        sources = [tensor(m), tensor(v)]
        tape, y = record(lambda m, v: ops.sin(m * v), sources)
        cos = np.cos(m * v)
        expected = [
            np.einsum("ij,j,ik,jl->ijkl", cos, v, np.eye(2), np.eye(3)),
            np.einsum("ij,ij,jk->ijk", cos, m, np.eye(3)),
        ]
        close(tape.jacobian(y, sources), expected)
        close(tape.jacobian(y, sources, chunk_size=chunk_size), expected)

    @pytest.mark.parametrize(
        ("target", "source"), [((0,), (3,)), ((2,), (0,)), ((0,), (0,)), ((2, 0), (3, 1)), ((), (0, 2))], ids=str
    )
    @pytest.mark.parametrize("chunk_size", [None, 2])
    def test_empty_axes_give_an_empty_result(self, target, source, chunk_size):
        x = tensor(np.ones(source))
        tape, y = record(lambda x: ops.broadcast_to(ops.sum(x), target), [x])
        close(tape.jacobian(y, x, chunk_size=chunk_size), np.zeros(target + source))

    @pytest.mark.parametrize("mode", ["forward", "reverse"])
    @pytest.mark.parametrize("chunk_size", [None, 2])
    def test_an_empty_source_beside_another(self, mode, chunk_size):
        sources = [tensor(np.zeros((0, 3))), tensor([1.0, 2.0, 3.0])]
        tape, y = record(lambda a, b: b * b + ops.sum(a), sources)
        expected = [np.zeros((3, 0, 3)), np.diag([2.0, 4.0, 6.0])]
        close(tape.jacobian(y, sources, mode=mode, chunk_size=chunk_size), expected)
        tape, y = record(lambda a, b: b * b, sources)
        close(tape.jacobian(y, sources, mode=mode, chunk_size=chunk_size), expected)

    def test_of_a_scalar_is_the_gradient(self):
        x = tensor([1.0, 2.0])
        tape, y = record(lambda x: ops.sum(x**3), [x])
        close(tape.jacobian(y, x), [3, 12])

    @pytest.mark.parametrize("chunk_size", [None, 1])
    def test_unconnected(self, chunk_size):
        x, other, v = tensor([1.0, 2.0]), tensor(np.ones((2, 2))), keras.Variable(np.ones((1,), "float32"))
        tape, y = record(lambda x, other: ops.stack([x, x * x, other[0]]), [x, other])
        sources = [x, v, other[0]]
        by_x = np.array([np.eye(2), np.diag([2, 4]), np.zeros((2, 2))])
        close(tape.jacobian(y, sources, chunk_size=chunk_size), [by_x, None, None])
        zeros = [np.zeros((3, 2, 1)), np.zeros((3, 2, 2))]
        close(tape.jacobian(y, sources, "zero", chunk_size), [by_x, *zeros])
        close(tape.jacobian(tensor([1.0, 2.0]), sources, "none", chunk_size), [None, None, None])

    def test_in_mixed_precision_has_the_dtype_of_the_source(self):
        layer = keras.layers.Dense(2, use_bias=False, dtype="mixed_bfloat16")
        layer.build((None, 2))
        layer.kernel.assign([[1.0, 2.0], [3.0, 4.0]])
        x = tensor([[1.0, 0.5]])
        tape, y = record(layer, [x])
        by_x, by_kernel = tape.jacobian(y, [x, layer.kernel])
        assert {keras.backend.standardize_dtype(j.dtype) for j in (by_x, by_kernel)} == {"float32"}
        close(by_x, [[[[1, 3]], [[2, 4]]]])
        close(by_kernel, np.einsum("i,jk->jik", [1, 0.5], np.eye(2))[None])


class TestBatchJacobian:
    @pytest.mark.parametrize("chunk_size", [None, 1, 4, 50])
    def test_closed_form(self, chunk_size):
        a, x = RANDOM.normal(size=(3, 2, 3)), RANDOM.normal(size=(4, 3))
        source = tensor(x)
        tape, y = record(lambda x: ops.einsum("ijk,bk,bj->bij", tensor(a), x, x[:, :2]), [source])
        expected = np.einsum("ijk,bj->bijk", a, x[:, :2])
        expected[..., :2] += np.einsum("ijk,bk->bij", a, x)[..., None] * np.eye(2)
        close(tape.batch_jacobian(y, source, chunk_size=chunk_size), expected)

    def test_is_the_diagonal_of_the_jacobian_for_a_convolutional_model(self):
        model = keras.Sequential(
            [
                keras.layers.Conv2D(2, 3, activation="tanh", data_format="channels_last"),
                keras.layers.AveragePooling2D(2, data_format="channels_last"),
                keras.layers.Flatten(),
                keras.layers.Dense(3),
            ]
        )
        x = tensor(model_inputs(2, 6, 6, 1))
        tape, y = record(model, [x])
        full = ops.convert_to_numpy(tape.jacobian(y, x))
        assert np.abs(full[0, :, 1]).max() == np.abs(full[1, :, 0]).max() == 0 < np.abs(full).max()
        close(tape.batch_jacobian(y, x), np.stack([full[b, :, b] for b in range(2)]))
        close(tape.batch_jacobian(y, x, chunk_size=2), np.stack([full[b, :, b] for b in range(2)]))
        v = model_inputs(2, 6, 6, 1)
        close(tape.jvp(y, x, tensor(v)), np.einsum("bkcijl,cijl->bk", full, v), rtol=1e-4, atol=1e-5)

    def test_channels_last_convolution_is_its_kernel(self):
        layer = keras.layers.Conv1D(2, 2, use_bias=False, data_format="channels_last")
        layer.build((None, 3, 1))
        kernel = np.array([[[1.0, 2.0]], [[3.0, 4.0]]])
        layer.kernel.assign(kernel)
        x = tensor(model_inputs(2, 3, 1))
        tape, y = record(layer, [x])
        expected = np.zeros((2, 2, 2, 3, 1))
        for i in range(2):
            expected[:, i, :, i : i + 2, 0] = kernel[:, 0].T
        close(tape.batch_jacobian(y, x), expected)

    def test_by_a_variable_and_by_an_intermediate(self):
        v = keras.Variable(np.array([[1.0, 2.0], [3.0, 4.0]], "float32"))
        with kg.GradientTape(persistent=True) as tape:
            square = v * v
            y = ops.sum(square * v, axis=1, keepdims=True)
        close(tape.batch_jacobian(y, v), [[[3, 12]], [[27, 48]]])
        close(tape.batch_jacobian(y, square), [[[1, 2]], [[3, 4]]])

    @pytest.mark.parametrize(("target", "source"), [((0, 2), (0, 3)), ((2, 0), (2, 3)), ((2, 3), (2, 0))], ids=str)
    def test_empty_axes_give_an_empty_result(self, target, source):
        x = tensor(np.ones(source))
        tape, y = record(lambda x: ops.broadcast_to(ops.sum(x, axis=1, keepdims=True), target), [x])
        close(tape.batch_jacobian(y, x), np.zeros(target + source[1:]))

    def test_unconnected(self):
        x, other = tensor(np.ones((2, 3))), tensor(np.ones((2, 4)))
        tape, y = record(lambda x, other: x * x, [x, other])
        for choice in ("none", "zero"):
            close(tape.batch_jacobian(y, other, unconnected_gradients=choice), np.zeros((2, 3, 4)))
        close(tape.batch_jacobian(y, [other]), [np.zeros((2, 3, 4))])

    @pytest.mark.parametrize("mode", ["forward", "reverse"])
    @pytest.mark.parametrize("chunk_size", [None, 2])
    def test_several_sources(self, chunk_size, mode):
        a, b = RANDOM.normal(size=(2, 3)), RANDOM.normal(size=(2, 1))
        v = keras.Variable(b.astype("float32"))
        x, other = tensor(a), tensor(np.ones((2, 4)))
        with kg.GradientTape(persistent=True) as tape:
            tape.watch([x, other])
            y = x * x * v
        options = {"chunk_size": chunk_size, "mode": mode}
        squared = a * a
        expected = {"x": 2 * np.stack([np.diag(row) for row in a * b]), "v": squared[:, :, None]}
        close(tape.batch_jacobian(y, {"x": x, "v": v}, **options), expected)
        found = tape.batch_jacobian(y, (x, [v, other], x), **options)
        close(found, (expected["x"], [expected["v"], np.zeros((2, 3, 4))], expected["x"]))
        with pytest.raises(ValueError, match="same batch size"):
            tape.batch_jacobian(y, [x, tensor(np.ones((3, 1)))])

    def test_independence_of_several_sources(self):
        a, b = tensor(RANDOM.normal(size=(4, 2))), tensor(RANDOM.normal(size=(4, 2)))
        tape, y = record(lambda a, b: a * ops.mean(b, axis=0), [a, b])
        close(tape.batch_jacobian(y, [a], check_independence=True)[0], tape.batch_jacobian(y, a))
        with pytest.raises(ValueError, match="depends? on"):
            tape.batch_jacobian(y, {"a": a, "b": b}, check_independence=True)


class TestArgumentsOfTensorFlow:
    """Those of `tf.GradientTape`, whatever the backend."""

    a = np.arange(1.0, 7.0).reshape(2, 3)

    @pytest.fixture
    def recorded(self):
        x = tensor(self.a)
        return *record(lambda x: x * x, [x]), x

    @pytest.mark.parametrize("method", ["jacobian", "batch_jacobian"])
    def test_rows_at_once(self, recorded, method, monkeypatch):
        tape, y, x = recorded
        whole = ops.convert_to_numpy(getattr(tape, method)(y, x))
        count, rows = (3 if method == "batch_jacobian" else 6), []

        def seen(tape, targets, sources, cotangents, pullback_batch=backend.pullback_batch):
            rows.append(cotangents[0].shape[0])
            return pullback_batch(tape, targets, sources, cotangents)

        monkeypatch.setattr(backend, "pullback_batch", seen, raising=False)
        # TensorFlow would use the program of an earlier tape.
        monkeypatch.setattr(backend, "kept", lambda tape, target, sources, key, compute: compute(tape), raising=False)
        for arguments, options, expected in [
            ((), {}, [count]),
            ((), {"experimental_use_pfor": True}, [count]),
            ((), {"experimental_use_pfor": False}, [1] * count),
            ((), {"experimental_use_pfor": False, "parallel_iterations": 2}, [1] * count),
            ((), {"experimental_use_pfor": False, "chunk_size": 2}, [1] * count),
            ((), {"parallel_iterations": 3}, [3] * (count // 3)),
            (("none", 3), {}, [3] * (count // 3)),
            (("none", 3, True), {"chunk_size": 3}, [3] * (count // 3)),
            (("none", None, False), {}, [1] * count),
        ]:
            rows.clear()
            close(getattr(tape, method)(y, x, *arguments, **options), whole)
            assert rows == expected, (arguments, options)

    @pytest.mark.parametrize("method", ["jacobian", "batch_jacobian"])
    @pytest.mark.parametrize(
        "options, message",
        [
            ({"experimental_use_pfor": "no"}, "expects True or False as `experimental_use_pfor`"),
            ({"parallel_iterations": 0}, "a positive integer, or None, as `parallel_iterations`"),
            ({"parallel_iterations": 2, "chunk_size": 3}, "parallel_iterations.*chunk_size.*2 and 3"),
        ],
    )
    def test_errors(self, recorded, method, options, message):
        tape, y, x = recorded
        with pytest.raises(ValueError, match=message):
            getattr(tape, method)(y, x, **options)

    def test_one_row_needs_no_vectorizing(self):
        """Which could not be done here, and would be said."""
        layer = keras.layers.MaxPooling2D(2) if keras.backend.backend() == "torch" else keras.layers.GRU(2)
        x = tensor(RANDOM.normal(size=(2, 4, 4, 1) if keras.backend.backend() == "torch" else (2, 3, 2)))
        tape, y = record(lambda x: ops.reshape(layer(x), (2, -1)), [x])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = tape.batch_jacobian(y, x, experimental_use_pfor=False)
        for k in range(2):
            close(found[:, k], tape.gradient(y, x, ops.stack([ops.one_hot(k, y.shape[1], dtype=y.dtype)] * 2)))

    def test_unconnected_gradients_is_an_enum_there(self, recorded):
        class UnconnectedGradients(enum.Enum):
            NONE, ZERO, OTHER = "none", "zero", "other"

        tape, y, x = recorded
        other = tensor([1.0, 2.0])
        for method in ("gradient", "jacobian"):
            assert getattr(tape, method)(y, other, unconnected_gradients=UnconnectedGradients.NONE) is None
            found = getattr(tape, method)(y, other, unconnected_gradients=UnconnectedGradients.ZERO)
            assert not np.any(ops.convert_to_numpy(found))
        close(tape.jvp(y, other, other, unconnected_gradients=UnconnectedGradients.ZERO), np.zeros((2, 3)))
        with pytest.raises(ValueError, match="expects 'none' or 'zero' .*'other'"):
            tape.gradient(y, x, unconnected_gradients=UnconnectedGradients.OTHER)


class TestJvp:
    @pytest.mark.parametrize("case", CASES, ids=case_id)
    def test_closed_form(self, case):
        inputs = [tensor(x) for x in case.inputs]
        tangents = [RANDOM.normal(size=np.shape(x)) for x in case.inputs]
        tape, y = record(case.fun, inputs)
        expected = sum(np.tensordot(j, v, v.ndim) for j, v in zip(case.jacobians, tangents, strict=True))
        close(tape.jvp(y, inputs, [tensor(v) for v in tangents]), expected)

    def test_has_the_structure_of_the_target(self):
        x, v = tensor(3.0), keras.Variable(2.0)
        tape, (a, b, c) = record(lambda x: (x * x * v, v * v, x + 1), [x])
        target, sources = {"a": a, "rest": (b, [c])}, {"x": x, "v": v}
        pushed = tape.jvp(target, sources, {"x": tensor(1.0), "v": tensor(10.0)})
        close(pushed, {"a": 12 + 90, "rest": (40, [1])})
        close(tape.jvp(target, sources, {"x": None, "v": 10.0}), {"a": 90, "rest": (40, [0])})
        close(tape.jvp(a, x, 1), 12)

    def test_a_repeated_source_adds_up(self):
        x = tensor(3.0)
        tape, y = record(lambda x: x * x, [x])
        close(tape.jvp(y, [x, x], [tensor(1.0), tensor(10.0)]), 66)

    def test_by_an_intermediate_tensor(self):
        x = tensor(3.0)
        with kg.GradientTape() as tape:
            tape.watch(x)
            square = x * x
            y = square * x
        close(tape.jvp(y, square, tensor(2.0)), 6)

    def test_by_an_intermediate_tensor_and_its_origin(self):
        """The tangent of an intermediate comes on top of what its origin gives it."""
        x = tensor(3.0)
        with kg.GradientTape() as tape:
            tape.watch(x)
            square = x * x
            y = square * x
        close(tape.jvp([y, square], [square, x], [tensor(2.0), tensor(1.0)]), [6 + 27, 2 + 6])

    def test_the_target_can_be_the_source(self):
        x, v = tensor([1.0, 2.0]), keras.Variable(np.ones(2, "float32"))
        tape, _ = record(lambda x: x * v, [x])
        close(tape.jvp([x, v], [x, v], [tensor([3.0, 4.0]), tensor([5.0, 6.0])]), [[3, 4], [5, 6]])

    def test_unconnected(self):
        x, other = tensor([1.0, 2.0]), tensor([[3.0]])
        tape, (y, z) = record(lambda x, other: (x * x, other * 2), [x, other])
        v = tensor([1.0, 10.0])
        close(tape.jvp([y, z], x, v), [[2, 40], None])
        close(tape.jvp([y, z], x, v, unconnected_gradients="zero"), [[2, 40], [[0]]])
        close(tape.jvp(z, tensor([1.0, 2.0]), v), None)

    def test_a_variable_in_mixed_precision(self):
        layer = keras.layers.Dense(2, use_bias=False, dtype="mixed_bfloat16")
        layer.build((None, 2))
        x = tensor([[1.0, 0.5]])
        tape, y = record(layer, [x])
        v = tensor([[1.0, 2.0], [4.0, 8.0]])
        pushed = tape.jvp(y, layer.kernel, v)
        assert keras.backend.standardize_dtype(pushed.dtype) == "bfloat16"
        close(ops.cast(pushed, "float32"), [[3, 6]])


@pytest.mark.parametrize("order", [1, 2])
def test_forward_and_reverse_mode_agree(order):
    """<u, J v> = <J' u, v>, for a model and for its input gradient, by inputs and weights at once."""
    model = keras.Sequential([keras.layers.Dense(4, activation="tanh"), keras.layers.Dense(3, activation="softplus")])
    x = tensor(model_inputs(5, 3))
    model(x)
    with kg.GradientTape(persistent=True) as tape:
        tape.watch(x)
        with kg.GradientTape() as inner:
            inner.watch(x)
            y = model(x)
        if order == 2:
            y = inner.gradient(y, x)
    sources = [x, *model.trainable_variables]
    tangents = [tensor(model_inputs(*s.shape)) for s in sources]
    u = tensor(model_inputs(*y.shape))
    pushed = tape.jvp(y, sources, tangents)
    pulled = tape.gradient(y, sources, output_gradients=u, unconnected_gradients="zero")
    forward, reverse = ops.sum(u * pushed), sum(ops.sum(g * v) for g, v in zip(pulled, tangents, strict=True))
    assert abs(ops.convert_to_numpy(forward)) > 0.1
    close(forward, ops.convert_to_numpy(reverse), rtol=1e-4, atol=1e-4)


SINGULAR = {
    # By a mask in the gradient of the operation itself: what it is at equal numbers, or at zero.
    "std": (lambda x: ops.std(x, axis=1), [[2.0, 2.0, 2.0], [1.0, 2.0, 3.0]]),
    "std_of_one": (lambda x: ops.std(x, axis=1), [[2.0], [3.0]]),
    "norm": (lambda x: ops.norm(x, axis=1), [[0.0, 0.0], [3.0, 4.0]]),
    "norm_3": (lambda x: ops.norm(x, ord=3, axis=1), [[0.0, 0.0], [3.0, 4.0]]),
    "power": (lambda x: ops.power(x, ops.convert_to_tensor([2.0, 0.0, 1.0])), [[0.0, 0.0, 0.0]]),
    "logsumexp": (lambda x: ops.logsumexp(ops.where(x > 0, x, -np.inf), axis=1), [[-1.0, -2.0], [1.0, 2.0]]),
    # By a function in front of it.
    "sqrt_of_relu": (lambda x: ops.sqrt(ops.relu(x)), [[-1.0, 0.0, 4.0]]),
    "sqrt_of_padding": (lambda x: ops.sqrt(ops.pad(x, ((0, 0), (1, 1)))), [[1.0, 4.0]]),
    "masked_std": (lambda x: ops.std(ops.where(x > 0, x, 1.0), axis=1), [[-1.0, -2.0], [1.0, 3.0]]),
}


@pytest.mark.parametrize("case", SINGULAR, ids=str)
def test_a_derivative_is_finite_forward_where_it_is_backward(case, backend):
    """One convention: what the rows of the Jacobian are by pullbacks, the push gives as well."""
    if backend != "torch":
        pytest.skip("JAX and TensorFlow multiply the zero of a mask with infinity in forward mode: see docs/limits.md")
    fun, x = SINGULAR[case]
    x = tensor(x)
    with kg.GradientTape(persistent=True) as tape:
        tape.watch(x)
        y = fun(x)
    rows = ops.convert_to_numpy(tape.jacobian(y, x))
    v = RANDOM.normal(size=tuple(x.shape)).astype("float32")
    finite = np.isfinite(rows).all(axis=tuple(range(y.ndim, rows.ndim)))
    expected = np.einsum("...ij,ij->...", np.where(np.isfinite(rows), rows, 0.0), v)
    assert finite.any()
    for pushed in (tape.jvp(y, x, v), kg.jvp(fun, (x,), (v,))[1], kg.linearize(fun, x)[1](v)):
        close(ops.convert_to_numpy(pushed)[finite], expected[finite])
    columns = ops.convert_to_numpy(tape.jacobian(y, x, mode="forward"))
    close(columns[finite], rows[finite])


def test_chunk_sizes_of_numpy():
    x = tensor([1.0, 2.0, 3.0])
    with kg.GradientTape() as tape:
        tape.watch(x)
        y = x * x
    close(tape.jacobian(y, x, chunk_size=np.int64(2)), np.diag([2.0, 4.0, 6.0]))
