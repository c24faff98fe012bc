"""jacobian and batch_jacobian: closed forms in both directions and in chunks, layers of all kinds, errors."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from keras_gradtools import backend as kernels
from keras_gradtools.tape import jacobian_plans
from tests.cases import CASES, case_id, close, tensor
from tests.compilers import with_every_compiler, with_unknown_batch

WAYS = [("auto", None), ("forward", None), ("reverse", None), ("forward", 2), ("reverse", 2)]
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype("float32")


# How an operation is vectorized depends on the direction. That rows come in chunks, or which direction is chosen, does
# not depend on the operation.
SOME_CASES = [case for case in CASES if case.name in ("rosenbrock", "softmax", "matmul", "division")]
CASES_AND_WAYS = [(case, way) for case in CASES for way in WAYS if way in (WAYS[1], WAYS[2]) or case in SOME_CASES]


@pytest.mark.parametrize(
    ("case", "mode", "chunk_size"),
    [(case, *way) for case, way in CASES_AND_WAYS],
    ids=[f"{case_id(case)}-{way[0]}-{way[1]}" for case, way in CASES_AND_WAYS],
)
def test_closed_forms(case, mode, chunk_size):
    every = tuple(range(len(case.inputs)))
    found = kg.jacobian(case.fun, argnums=every, mode=mode, chunk_size=chunk_size)(*map(tensor, case.inputs))
    close(list(found), list(case.jacobians), rtol=1e-4, atol=1e-5)


class TestStructure:
    def fun(self, p, s):
        return {"sum": p["a"] + s, "square": [p["b"] ** 2, s * p["b"]]}

    @pytest.mark.parametrize("mode, chunk_size", WAYS)
    def test_nested_arguments_and_outputs(self, mode, chunk_size):
        p = {"a": normal(3), "b": normal(2)}
        found = kg.jacobian(self.fun, argnums=(0, 1), mode=mode, chunk_size=chunk_size)(p, 2.0)
        n3, n2 = np.eye(3), np.eye(2)
        close(
            found,
            {
                "sum": ({"a": n3, "b": np.zeros((3, 2))}, np.ones(3)),
                "square": [
                    ({"a": np.zeros((2, 3)), "b": np.diag(2 * p["b"])}, np.zeros(2)),
                    ({"a": np.zeros((2, 3)), "b": 2 * n2}, p["b"]),
                ],
            },
        )

    @pytest.mark.parametrize("mode, chunk_size", WAYS)
    def test_each_entry_has_the_dtype_of_the_argument(self, mode, chunk_size):
        p = {"half": tensor([2.0, 3.0], "float16"), "single": tensor([5.0])}

        def fun(p):
            return p["half"], p["single"], ops.cast(p["half"], "float32") * p["single"]

        found = kg.jacobian(fun, mode=mode, chunk_size=chunk_size)(p)
        for row in found:
            assert {key: keras.backend.standardize_dtype(x.dtype) for key, x in row.items()} == {
                "half": "float16",
                "single": "float32",
            }
        close(found[2], {"half": 5 * np.eye(2), "single": [[2.0], [3.0]]})
        hessian = kg.hessian(fun, chunk_size=chunk_size)(p)[2]
        close(hessian["half"]["single"], np.eye(2)[:, :, None])
        assert keras.backend.standardize_dtype(hessian["half"]["half"].dtype) == "float16"

    def test_one_argument_is_not_a_tuple(self):
        close(kg.jacobian(lambda x, y: x * y, argnums=1)(tensor([1.0, 2.0]), tensor([3.0, 4.0])), np.diag([1.0, 2.0]))
        (by_x,) = kg.jacobian(lambda x: x * x, argnums=(0,))(tensor([1.0, 2.0]))
        close(by_x, np.diag([2.0, 4.0]))

    def test_keywords_and_variables(self):
        v = keras.Variable([1.0, 2.0])
        close(kg.jacobian(lambda x, power: x**power)(v, power=3), np.diag([3.0, 12.0]))

    @pytest.mark.parametrize("chunk_size", [None, 2])
    def test_an_empty_axis_gives_an_empty_result(self, chunk_size):
        found = kg.jacobian(lambda x: x * 2.0, chunk_size=chunk_size)(np.zeros((0, 3), "float32"))
        assert tuple(found.shape) == (0, 3, 0, 3)


@pytest.mark.parametrize(
    ("compile", "mode", "chunk_size"),
    [*[(lambda fun: fun, *way) for way in WAYS], (kg.jit, "forward", None), (kg.jit, "reverse", 2)],
    ids=[*[f"eager-{mode}-{chunk_size}" for mode, chunk_size in WAYS], "kg.jit-forward", "kg.jit-reverse-2"],
)
class TestAnEmptyTensorBesideOthers:
    """It has no derivative to compute, and takes none away from the others."""

    def test_among_the_arguments(self, mode, chunk_size, compile):
        fun = compile(kg.jacobian(lambda a, b: b * b, argnums=(0, 1), mode=mode, chunk_size=chunk_size))
        found = fun(tensor(np.zeros((0, 3))), tensor([1.0, 2.0, 3.0]))
        close(found, (np.zeros((3, 0, 3)), np.diag([2.0, 4.0, 6.0])))

    def test_among_the_outputs(self, mode, chunk_size, compile):
        fun = compile(kg.jacobian(lambda x: {"a": x[:0], "b": x * x}, mode=mode, chunk_size=chunk_size))
        close(fun(tensor([1.0, 2.0, 3.0])), {"a": np.zeros((0, 3)), "b": np.diag([2.0, 4.0, 6.0])})

    def test_in_both_and_connected_with_what_is_not_empty(self, mode, chunk_size, compile):
        fun = kg.jacobian(lambda p: [ops.sum(p["a"]) + p["b"] ** 2, p["a"] * p["b"]], mode=mode, chunk_size=chunk_size)
        found = compile(fun)({"a": tensor(np.zeros((0, 2))), "b": tensor([1.0, 3.0])})
        by_output = [{"a": (2, 0, 2), "b": np.diag([2.0, 6.0])}, {"a": (0, 2, 0, 2), "b": (0, 2, 2)}]
        expected = [{k: np.zeros(v) if isinstance(v, tuple) else v for k, v in row.items()} for row in by_output]
        close(found, expected)

    def test_of_each_example(self, mode, chunk_size, compile):
        x = tensor([[1.0, 2.0], [3.0, 4.0]])
        fun = compile(kg.batch_jacobian(lambda p: (p["a"], p["b"] ** 2), mode=mode, chunk_size=chunk_size))
        square = np.stack([np.diag([2.0, 4.0]), np.diag([6.0, 8.0])])
        by_empty, by_full = (
            {"a": np.zeros((2, 0, 0)), "b": np.zeros((2, 0, 2))},
            {"a": np.zeros((2, 2, 0)), "b": square},
        )
        close(fun({"a": tensor(np.zeros((2, 0))), "b": x}), (by_empty, by_full))

    def test_of_no_example(self, mode, chunk_size, compile):
        fun = compile(kg.batch_jacobian(lambda x: (x[:, :1], x**2), mode=mode, chunk_size=chunk_size))
        close(fun(tensor(np.zeros((0, 2)))), (np.zeros((0, 1, 2)), np.zeros((0, 2, 2))))


def test_the_cheaper_direction_is_chosen(monkeypatch):
    def refuse(*_):
        raise AssertionError("the other direction")

    wide, narrow = tensor(normal(5)), tensor(normal(2))
    monkeypatch.setattr(kernels, "pullback_batch", refuse, raising=False)
    close(kg.jacobian(lambda x: ops.concatenate([x, 3 * x]))(narrow), np.vstack([np.eye(2), 3 * np.eye(2)]))
    monkeypatch.undo()
    monkeypatch.setattr(kernels, "pushforward_batch", refuse, raising=False)
    close(kg.jacobian(lambda x: x[:2] * 2.0)(wide), 2 * np.eye(5)[:2])


@with_every_compiler
@pytest.mark.parametrize("mode, chunk_size", [("forward", None), ("reverse", 2)])
def test_compiled_by_others(compiler, mode, chunk_size):
    a = normal(5, 3)
    jacobian = compiler.compile(kg.jacobian(lambda x: ops.tanh(ops.matmul(a, x)), mode=mode, chunk_size=chunk_size))
    x = normal(3)
    close(jacobian(tensor(x)), (1 - np.tanh(a @ x) ** 2)[:, None] * a, rtol=1e-4, atol=1e-5)


class TestOtherTransforms:
    x = np.array([0.5, -1.0, 2.0])

    def test_jacobian_of_a_gradient(self):
        close(kg.jacobian(kg.grad(lambda x: ops.sum(x**3)))(tensor(self.x)), np.diag(6 * self.x))

    def test_gradient_of_a_jacobian(self):
        close(kg.grad(lambda x: ops.sum(kg.jacobian(lambda x: x**3)(x)))(tensor(self.x)), 6 * self.x)

    def test_jacobian_of_a_jacobian(self):
        third = kg.jacobian(kg.jacobian(lambda x: x**3))(tensor(self.x))
        expected = np.zeros((3, 3, 3))
        expected[range(3), range(3), range(3)] = 6 * self.x
        close(third, expected)

    def test_along_a_direction(self):
        v = np.array([1.0, 10.0, 100.0])
        close(kg.jvp(kg.jacobian(lambda x: x**3), (tensor(self.x),), (v,))[1], np.diag(6 * self.x * v))

    def test_tape_over_it(self):
        x = tensor(self.x)
        with kg.GradientTape() as tape:
            tape.watch(x)
            y = ops.sum(kg.jacobian(lambda x: x**3)(x))
        close(tape.gradient(y, x), 6 * self.x)

    def test_tape_over_it_by_a_variable(self):
        v = keras.Variable(3.0)
        with kg.GradientTape() as tape:
            y = ops.sum(kg.jacobian(lambda x: v * v * x)(tensor(self.x)))
        close(tape.gradient(y, v), 18.0)

    def test_a_tape_inside_it(self):
        def slope(x):
            with kg.GradientTape() as tape:
                tape.watch(x)
                y = ops.sum(x**3)
            return tape.gradient(y, x)

        close(kg.jacobian(slope)(tensor(self.x)), np.diag(6 * self.x))


def _models():
    yield "dense", (4,), [layers.Dense(3, activation="tanh"), layers.Dense(2)]
    yield "convolution", (6, 6, 2), [layers.Conv2D(3, 3, activation="tanh", padding="same"), layers.Flatten()]
    yield "strided convolution", (6, 6, 1), [layers.Conv2D(2, 3, strides=2, activation="gelu"), layers.Flatten()]
    yield "max pooling", (4, 4, 1), [layers.MaxPooling2D(2), layers.Flatten()]
    yield "average pooling", (4, 4, 1), [layers.AveragePooling2D(2), layers.Flatten(), layers.Dense(2)]
    yield "depthwise convolution", (5, 5, 2), [layers.DepthwiseConv2D(3), layers.GlobalAveragePooling2D()]
    yield "transposed convolution", (3, 3, 1), [layers.Conv2DTranspose(1, 2), layers.GlobalMaxPooling2D()]
    yield "convolution in time", (6, 2), [layers.Conv1D(3, 3, activation="tanh"), layers.Flatten()]
    yield "simple rnn", (4, 2), [layers.SimpleRNN(3)]
    yield "lstm", (4, 2), [layers.LSTM(3)]
    yield "gru", (4, 2), [layers.GRU(3)]
    yield "normalization", (4, 3), [layers.LayerNormalization(), layers.Flatten(), layers.Dense(2)]
    yield "batch normalization", (4,), [layers.Dense(3), layers.BatchNormalization(), layers.Dense(2)]


# Compiling their loops takes TensorFlow half a minute each.
LONG = ("lstm", "gru")
MODELS = [
    pytest.param(*model, id=name.replace(" ", "_"), marks=[pytest.mark.slow] if name in LONG else [])
    for name, *model in _models()
]


def attention():
    x = keras.Input((4, 3))
    return keras.Model(x, layers.Flatten()(layers.MultiHeadAttention(2, 3)(x, x)))


def built(shape, stack):
    """A model of fresh copies of these layers, with weights that leave no activation saturated."""
    copies = [layer.__class__.from_config(layer.get_config()) for layer in stack]
    model = keras.Sequential([layers.Input(shape), *copies])
    # Variances among them have to be positive.
    model.set_weights([RNG.uniform(0.2, 1, size=w.shape) for w in model.get_weights()])
    return model


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_the_dtype_is_that_of_the_argument(mode):
    x, y = tensor([1.0, 2.0], "float16"), tensor([3.0, 4.0])

    def f(x, y):
        return x, y, ops.cast(x, "float32") + y

    for row in kg.jacobian(f, (0, 1), mode=mode)(x, y):
        assert [keras.backend.standardize_dtype(block.dtype) for block in row] == ["float16", "float32"]


class TestBatchJacobian:
    @pytest.mark.parametrize("mode", ["forward", "reverse"])
    @pytest.mark.parametrize("shape, stack", MODELS)
    def test_layers(self, shape, stack, mode):
        self.check(built(shape, stack), shape, mode)

    @pytest.mark.parametrize("mode", ["forward", "reverse"])
    def test_attention(self, mode):
        self.check(attention(), (4, 3), mode)

    def check(self, model, shape, mode):
        """Each example's own Jacobian, by the products with it along both sides."""
        x = normal(3, *shape)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="TensorFlow cannot vectorize")
            found = ops.convert_to_numpy(kg.batch_jacobian(model, mode=mode)(x))
            # Of images and loops the rows take long to compile; slow tests have loops in chunks.
            if len(shape) < 3 and not isinstance(model.layers[0], layers.SimpleRNN):
                chunked = ops.convert_to_numpy(kg.batch_jacobian(model, mode=mode, chunk_size=4)(x))
                np.testing.assert_allclose(chunked, found, rtol=1e-4, atol=1e-5)
        v = normal(*x.shape)
        pushed = np.einsum("bki,bi->bk", found.reshape(3, -1, v[0].size), v.reshape(3, -1))
        is_smooth = not any(isinstance(x, (layers.MaxPooling2D, layers.GlobalMaxPooling2D)) for x in model.layers)
        # The differences are the same in both modes.
        if is_smooth and mode == "forward":
            kg.testing.check_jvp(model, (x,), (v,))
        along = ops.convert_to_numpy(kg.jvp(model, (x,), (v,))[1])
        np.testing.assert_allclose(pushed, along.reshape(3, -1), rtol=1e-3, atol=1e-4)

    def test_is_the_diagonal_of_the_full_one(self):
        model = built((4,), [layers.Dense(3, activation="tanh")])
        x = tensor(normal(5, 4))
        full = ops.convert_to_numpy(kg.jacobian(model)(x))
        close(kg.batch_jacobian(model)(x), np.einsum("bkbi->bki", full), atol=1e-5)
        close(kg.batch_jacobian(model, chunk_size=2)(x), np.einsum("bkbi->bki", full), atol=1e-5)

    def test_nested(self):
        x = {"a": normal(2, 3), "b": normal(2, 1)}
        found = kg.batch_jacobian(lambda x: (x["a"] * x["b"], 2 * x["b"]))(x)
        close(found[0]["a"], np.stack([np.eye(3) * b for b in x["b"][:, 0]]))
        close(found[0]["b"], x["a"][:, :, None])
        close(found[1], {"a": np.zeros((2, 1, 3)), "b": np.full((2, 1, 1), 2.0)})

    @pytest.mark.parametrize("mode, chunk_size", WAYS)
    def test_several_arguments(self, mode, chunk_size):
        a, b, c = normal(2, 3), normal(2, 1), normal(2, 2)
        fun = kg.batch_jacobian(lambda a, b, p: a * b, argnums=(0, -1, 1), mode=mode, chunk_size=chunk_size)
        by_a, by_p, by_b = fun(a, b, {"c": c})
        close(by_a, np.stack([np.eye(3) * x for x in b[:, 0]]))
        close(by_p, {"c": np.zeros((2, 3, 2))})
        close(by_b, a[:, :, None])

    @pytest.mark.parametrize("chunk_size", [None, 2])
    def test_chosen_inputs_of_other_arguments(self, chunk_size):
        factor, a, step = normal(2, 3), normal(2, 1), np.arange(2)

        def fun(factor, p, power):
            return (tensor(factor) * p["a"]) ** power, p["step"]

        options = {"chunk_size": chunk_size, "has_aux": True}
        found, aux = kg.batch_jacobian(fun, argnums=1, **options)(tensor(factor), {"a": a, "step": step}, power=1)
        assert found["step"] is None
        close(found["a"], factor[:, :, None])
        close(aux, step)
        found, _ = kg.batch_jacobian(fun, argnums=(0, 1), inputs="a", **options)(
            factor, {"a": a, "step": step}, power=1
        )
        assert found[0] is None and found[1]["step"] is None
        close(found[1]["a"], factor[:, :, None])

    def test_another_argument(self):
        a, b = normal(2, 3), normal(2, 1)
        close(kg.batch_jacobian(lambda a, b: a * b, argnums=1)(tensor(a), b), a[:, :, None])
        (found,) = kg.batch_jacobian(lambda a, b: a * b, argnums=[1])(tensor(a), b)
        close(found, a[:, :, None])

    def test_independence_is_that_by_the_arguments_that_are_differentiated(self):
        def fun(a, b):
            return a * ops.mean(b, axis=0)

        means = normal(4, 2)
        a, b = tensor(normal(4, 2)), tensor(means)
        expected = np.tile(np.diag(means.mean(0)), (4, 1, 1))
        close(kg.batch_jacobian(fun, check_independence=True)(a, b), expected, atol=1e-5)
        for argnums in (1, (0, 1), -1):
            with pytest.raises(ValueError, match="batch_jacobian: .*depends on the input of others"):
                kg.batch_jacobian(fun, check_independence=True, argnums=argnums)(a, b)
        with pytest.raises(ValueError, match="argnums=2"):
            kg.batch_jacobian(fun, check_independence=True, argnums=2)(a, b)

    def test_other_arguments_are_passed_on(self):
        found = kg.batch_jacobian(lambda x, factor, power: factor * x**power)(tensor([[2.0]]), tensor(5.0), power=2)
        close(found, [[[20.0]]])

    @with_every_compiler
    @pytest.mark.parametrize("chunk_size", [None, 2])
    def test_compiled_by_others(self, compiler, chunk_size):
        model = built((4,), [layers.Dense(3, activation="tanh")])
        x = tensor(normal(5, 4))
        close(
            compiler.compile(kg.batch_jacobian(model, chunk_size=chunk_size))(x),
            ops.convert_to_numpy(kg.batch_jacobian(model, mode="forward")(x)),
            atol=1e-5,
        )


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: kg.jacobian(3), "jacobian takes a function"),
        (
            lambda: kg.jacobian(ops.tanh, mode="backward"),
            "jacobian expects 'auto', 'forward' or 'reverse' as `mode`.*'backward'",
        ),
        (
            lambda: kg.jacobian(ops.tanh, chunk_size=0),
            "jacobian expects a positive integer, or None, as `chunk_size`.*0",
        ),
        (
            lambda: kg.batch_jacobian(ops.tanh, chunk_size=True),
            "batch_jacobian expects a positive integer, or None, as `chunk_size`.*True",
        ),
        (lambda: kg.jacobian(ops.tanh)(np.arange(3)), "Argument 0 under `jacobian` must be real and floating.*int"),
        (lambda: kg.jacobian(ops.tanh, argnums=2)(1.0), "argnums=2"),
        (lambda: kg.jacobian(lambda x: "y")(1.0), "returns must be a tensor.*'y'"),
        (lambda: kg.batch_jacobian(lambda x: x)(normal(3)), r"batch_jacobian needs a target of shape \(batch.*\(3,\)"),
        (lambda: kg.batch_jacobian(lambda x: x[:2])(normal(3, 2)), r"same batch size.*\(2, 2\).*\(3, 2\)"),
        (
            lambda: kg.jacobian(lambda x: ops.real(x))(np.ones(2, "complex64")),
            "real and floating-point.*complex64",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call()


def test_a_plan_counts_elements_of_one_example():
    wide, narrow = tensor(normal(7, 5)), tensor(normal(7, 2))
    assert jacobian_plans.Plan([wide], [narrow], "auto", batch_axes=1).counts == [2]
    assert jacobian_plans.Plan([wide], [narrow], "reverse", batch_axes=1).counts == [5]
    assert jacobian_plans.Plan([narrow], [wide], "auto").counts == [14]


ROWS = np.array([[1.0, 2.0], [3.0, 5.0]], "float32")


class TestUnknownBatch:
    @pytest.mark.parametrize("chunk_size", [None, 1])
    @pytest.mark.parametrize("mode", ["auto", "forward", "reverse"])
    def test_batch_jacobian(self, mode, chunk_size):
        jacobian = with_unknown_batch(kg.batch_jacobian(lambda x: x**3, mode=mode, chunk_size=chunk_size), (2,))
        close(jacobian(tensor(ROWS)), np.stack([np.diag(3 * x**2) for x in ROWS]), rtol=1e-5)

    @pytest.mark.parametrize("count", [0, 2])
    def test_fewer_rows_than_a_chunk(self, count):
        jacobian = with_unknown_batch(kg.jacobian(lambda x: x**2, mode="reverse", chunk_size=9), (2,))
        expected = np.einsum("bi,bc,ij->bicj", 2 * ROWS[:count], np.eye(count), np.eye(2))
        close(jacobian(tensor(ROWS[:count])), expected)

    def test_tape_and_full_jacobian(self):
        def both(x):
            with kg.GradientTape() as tape:
                tape.watch(x)
                y = x**2
            return tape.batch_jacobian(y, x), kg.jacobian(lambda x: ops.sum(x**2, axis=0))(x)

        by_example, full = with_unknown_batch(both, (2,))(tensor(ROWS))
        close(by_example, np.stack([np.diag(2 * x) for x in ROWS]))
        close(full, np.einsum("ki,bi->kbi", np.eye(2), 2 * ROWS))

    def test_in_fit_with_a_last_batch_that_is_smaller(self):
        class Penalized(keras.Model):
            def __init__(self):
                super().__init__()
                self.dense = layers.Dense(1)

            def call(self, x):
                return self.dense(x)

            def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
                return ops.mean(kg.batch_jacobian(lambda x: self.dense(x) ** 2)(ops.convert_to_tensor(x)) ** 2)

        model = Penalized()
        model.compile("sgd")
        x = np.random.default_rng(0).normal(size=(10, 2)).astype("float32")
        history = model.fit(x, x[:, :1], batch_size=4, epochs=2, verbose=0)
        assert np.isfinite(history.history["loss"]).all()
