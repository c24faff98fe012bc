"""Compiled functions on torch: what a program computes, reads and changes is exactly what the eager function does."""

import gc
import threading
import weakref

import keras
import pytest
from keras import layers, ops

import keras_gradtools as kg
from tests.cases import close

if keras.backend.backend() != "torch":
    pytest.skip("these are about torch", allow_module_level=True)

import torch  # noqa: E402

from tests.backend.torch.compiled.replays import assert_equal_to_eager, counted, several  # noqa: E402

X = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.25, -0.75]])


def perceptron(*more):
    return keras.Sequential([layers.Input((3,)), layers.Dense(8, activation="tanh"), *more, layers.Dense(2)])


def total(model, **options):
    return lambda x: ops.sum(model(x, **options) ** 2)


def convolutional():
    parts = [layers.Input((6, 6, 1)), layers.Conv2D(3, 3, activation="silu"), layers.MaxPooling2D(2), layers.Flatten()]
    return keras.Sequential([*parts, layers.Dense(2)])


def recurrent():
    return keras.Sequential([layers.Input((4, 3)), layers.GRU(3), layers.LayerNormalization(), layers.Dense(1)])


def attentive():
    x = keras.Input((4, 6))
    y = layers.MultiHeadAttention(2, 3)(x, x)
    return keras.Model(x, layers.Dense(1)(layers.LayerNormalization()(x + y)))


def product(loss):
    return lambda x: kg.hvp(loss, (x,), (ops.ones_like(x),))[0]


MODELS = {
    "perceptron": (perceptron, (5, 3)),
    "convolutional": (convolutional, (2, 6, 6, 1)),
    "recurrent": (recurrent, (2, 4, 3)),
    "attentive": (attentive, (2, 4, 6)),
}
TRANSFORMS = {
    "value": lambda model: lambda x: model(x),
    "grad": lambda model: kg.grad(total(model)),
    "hvp": lambda model: product(total(model)),
    "batch_jacobian": lambda model: kg.batch_jacobian(model),
    "penalty": lambda model: kg.grad(lambda x: ops.sum(kg.grad(total(model))(x) ** 2)),
    "linearize": lambda model: lambda x: kg.linearize(kg.grad(total(model)), x)[1](x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("model", MODELS)
def test_equal_to_eager(model, transform):
    make, shape = MODELS[model]
    assert_equal_to_eager(lambda: TRANSFORMS[transform](make()), several(*shape, count=4))


class TestWhatIsRead:
    def test_an_argument_that_is_also_captured(self):
        c = torch.tensor([1.0, 2.0, 3.0])
        fun, runs = counted(lambda x: x * c)
        compiled = kg.jit(fun)
        for _ in range(3):
            close(compiled(c), [1.0, 4.0, 9.0])
        close(compiled(c + 1), [2.0, 6.0, 12.0])
        assert len(runs) == 2

    def test_an_argument_that_is_also_the_value_of_a_variable(self):
        v = keras.Variable([1.0, 2.0])
        fun, runs = counted(lambda x: x * v)
        compiled = kg.jit(fun)
        for _ in range(3):
            close(compiled(v.value), [1.0, 4.0])
        close(compiled(v.value + 1), [2.0, 6.0])

    def test_the_same_argument_twice(self):
        compiled = kg.jit(lambda x, y: x - y)
        for _ in range(3):
            close(compiled(X, X), 0 * X)
        close(compiled(X, 2 * X), -X)

    def test_a_captured_tensor_that_is_changed_in_place(self):
        c = torch.tensor([1.0, 2.0, 3.0])
        compiled = kg.jit(lambda x: x * c)
        for _ in range(3):
            close(compiled(X), X * c)
        c.add_(1.0)
        close(compiled(X), X * c)

    def test_variables_and_which_of_them_are_trainable(self):
        v = keras.Variable([1.0, 2.0, 3.0])
        compiled = kg.jit(lambda x: x * v)
        for value in (1.0, 2.0, 3.0, 4.0):
            v.assign([value] * 3)
            close(compiled(X).detach(), value * X)
        v.trainable = False
        assert not compiled(X).requires_grad

    def test_layouts_of_the_arguments(self):
        compiled = kg.jit(lambda x: x.reshape(-1) if x.is_contiguous() else x.sum())
        for _ in range(3):
            close(compiled(X), X.reshape(-1))
            close(compiled(X.T), X.sum())

    def test_numpy_arrays_are_inputs(self):
        fun, runs = counted(lambda x: 2 * x)
        compiled = kg.jit(fun)
        for n in range(4):
            close(compiled(X.numpy() + n), 2 * (X + n))
        assert len(runs) == 2

    def test_grad_mode(self):
        v = keras.Variable([1.0, 2.0, 3.0])
        compiled = kg.jit(lambda x: x * v)
        for _ in range(3):
            assert compiled(X).requires_grad
            with torch.no_grad():
                assert not compiled(X).requires_grad

    def test_a_layer_that_the_call_builds(self):
        layer = layers.Dense(2)
        fun, runs = counted(lambda x: layer(x))
        compiled = kg.jit(fun)
        for _ in range(4):
            close(compiled(X).detach(), ops.convert_to_numpy(layer(X).detach()))
        assert len(runs) == 3
        layer.set_weights([2 * w for w in layer.get_weights()])
        close(compiled(X).detach(), ops.convert_to_numpy(layer(X).detach()))

    def test_constants_in_memory_that_an_overwritten_tensor_had(self):
        def fun(x):
            for n in range(20):
                y = x * 1.0
                y.add_(x)
                del y
                x = x * float(torch.tensor(1.0 + n) / 8)
            return x

        assert_equal_to_eager(lambda: fun, several(2))


class TestWhatIsChanged:
    def test_variables(self):
        def make():
            v = keras.Variable([1.0, 2.0, 3.0])

            def fun(x):
                before = v + 0.0
                v.assign(x[0])
                v.assign_add(before)
                return v * before, v + 0.0

            return fun

        assert_equal_to_eager(make, several(2, 3))

    def test_a_variable_that_is_only_assigned(self):
        v = keras.Variable([1.0, 2.0, 3.0])
        fun, runs = counted(lambda x: v.assign(2 * x[0]))
        compiled = kg.jit(fun)
        for n in range(4):
            close(compiled(X + n), 2 * (X[0] + n))
            close(v.value.detach(), 2 * (X[0] + n))
        assert len(runs) == 2

    def test_the_argument(self):
        compiled = kg.jit(lambda x: x.mul_(2.0).sum())
        for _ in range(4):
            x = X.clone()
            close(compiled(x), 2 * X.sum())
            close(x, 2 * X)

    def test_an_intermediate_tensor_through_a_view(self):
        def fun(x):
            y = x * 1.0
            y[0].add_(x[1])
            y.t()[1:].mul_(3.0)
            return y

        assert_equal_to_eager(lambda: fun, several(2, 3))

    def test_constants_are_new_at_each_call(self):
        def fun(x):
            counts = torch.tensor([1.0, 2.0, 3.0])
            counts.add_(x[0])
            return counts, torch.zeros(2)

        compiled = kg.jit(fun)
        for _ in range(4):
            counts, zeros = compiled(X)
            close(counts, [1.5, 1.0, 5.0])
            close(zeros, [0.0, 0.0])
            counts.add_(7.0)
            zeros.add_(7.0)

    def test_the_steps_of_an_optimizer(self):
        def make():
            model = perceptron(layers.BatchNormalization(), layers.Dropout(0.3, seed=1))
            optimizer = keras.optimizers.AdamW(0.05, weight_decay=0.01, clipnorm=0.1, use_ema=True, ema_momentum=0.5)
            weights = model.trainable_variables

            def step(x):
                with kg.GradientTape() as tape:
                    loss = total(model, training=True)(x)
                gradients = tape.gradient(loss, weights)
                with torch.no_grad():
                    optimizer.apply(gradients, weights)
                return [loss, *[v + 0.0 for v in model.variables]]

            return step

        assert_equal_to_eager(make, several(5, 3, count=8), runs=3)

    def test_grad_of_variables(self):
        """`backward()` adds to `grad`. Only a function that resets it can be repeated."""
        v = keras.Variable([1.0, 2.0, 3.0])

        def fun(x):
            v.value.grad = None
            ops.sum(v**2 * x).backward()
            return v.value.grad * 1.0

        fun, runs = counted(fun)
        compiled = kg.jit(fun)
        for n in range(6):
            close(compiled(X + n), 2 * ops.convert_to_numpy(v) * (X + n).sum(0).numpy())
            close(v.value.grad, 2 * ops.convert_to_numpy(v) * (X + n).sum(0).numpy())
        assert len(runs) == 3

    @pytest.mark.filterwarnings("ignore:`kg.jit` runs")
    def test_grad_that_is_reset_elsewhere(self):
        v = keras.Variable([1.0, 2.0, 3.0])
        compiled = kg.jit(lambda x: ops.sum(v * x).backward())
        for n in range(6):
            v.value.grad = None
            for count in range(1 + n % 2):
                compiled(X)
                close(v.value.grad, (count + 1) * X.sum(0))


class TestResults:
    def test_structure_and_identity(self):
        compiled = kg.jit(lambda x: {"same": x, "again": (x, x[:1]), "constants": [3, None, "a"]})
        for _ in range(4):
            found = compiled(X)
            assert found["same"] is X and found["again"][0] is X and found["constants"] == [3, None, "a"]
            assert found["again"][1].data_ptr() == X.data_ptr()

    def test_the_value_of_a_variable(self):
        v = keras.Variable([1.0, 2.0])
        compiled = kg.jit(lambda x: v.value)
        for _ in range(4):
            assert compiled(X) is v.value


class TestBools:
    """Python may read bools: there is a program for each path."""

    def test_a_branch(self):
        def make():
            return lambda x: x * 2 if ops.sum(x) > 0 else -x

        assert_equal_to_eager(make, several(2, 3, count=3) + [(X,), (-X,)] * 3, runs=4)

    def test_what_came_before_is_undone(self):
        def make():
            v = keras.Variable(0.0)

            def fun(x):
                v.assign_add(1.0)
                noise = torch.rand(2)
                if ops.sum(x) > 0:
                    v.assign_add(10.0)
                    noise = noise + torch.rand(2)
                return v + 0.0, noise

            return fun

        assert_equal_to_eager(make, [(X,), (X,), (-X,), (-X,), (X,), (-X,), (X,), (-X,)], runs=4)

    def test_a_singular_matrix(self):
        def make():
            return lambda a: kg.grad(lambda a: ops.det(a))(a)

        regular, singular = torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([[1.0, 2.0], [2.0, 4.0]])
        assert_equal_to_eager(make, [(regular,), (regular,), (singular,), (singular,), (regular,), (singular,)], runs=4)


class TestWhere:
    def test_inside_another_compiled_function(self):
        inner, inner_runs = counted(lambda x: x * x)
        outer, outer_runs = counted(lambda x: kg.jit(inner)(x) + 1)
        compiled = kg.jit(outer)
        for n in range(4):
            close(compiled(X + n), (X + n) ** 2 + 1)
        assert len(inner_runs) == len(outer_runs) == 2

    def test_under_a_tape(self):
        v = keras.Variable([1.0, 2.0, 3.0])
        compiled = kg.jit(lambda x: ops.sum(x**2 * v))
        for _ in range(4):
            with kg.GradientTape() as tape:
                tape.watch(X)
                y = compiled(X)
            by_x, by_v = tape.gradient(y, [X, v])
            close(by_x, 2 * X * torch.tensor([1.0, 2.0, 3.0]))
            close(by_v, (X**2).sum(0))

    def test_under_vmap_and_autocast(self):
        compiled = kg.jit(lambda x: x @ x.mT)
        for _ in range(4):
            close(compiled(X), X @ X.T)
            close(torch.vmap(compiled)(X[None]), (X @ X.T)[None])
            with torch.autocast("cpu", torch.bfloat16):
                assert compiled(X).dtype == torch.bfloat16

    def test_on_several_threads(self):
        compiled = kg.jit(lambda x: ops.sum(kg.grad(lambda x: ops.sum(x**3))(x)))
        found = {}

        def run(n):
            found[n] = [float(compiled(torch.full((3,), float(n)))) for _ in range(20)]

        threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {n: [9.0 * n**2] * 20 for n in range(4)}


def test_intermediate_tensors_are_freed():
    references = []

    def fun(x):
        for _ in range(20):
            x = ops.sin(x)
            references.append(weakref.ref(x))
        return ops.sum(x)

    compiled = kg.jit(fun)
    for _ in range(3):
        compiled(torch.ones(1000))
    assert len(references) == 40 and not any(reference() is not None for reference in references)


def test_functions_and_models_are_let_go():
    def use():
        model = perceptron()
        compiled = kg.jit(lambda x: model(x))
        for _ in range(3):
            compiled(X)
        return weakref.ref(model)

    reference = use()
    keras.backend.clear_session()
    gc.collect()
    assert reference() is None


def test_one_hot_without_reading_values():
    def fun(x):
        return torch.nn.functional.one_hot(x, 4), ops.one_hot(x, 4, axis=0), ops.one_hot(x - 1, 4)

    assert_equal_to_eager(lambda: fun, [(torch.randint(0, 4, (5,)),) for _ in range(4)])


def test_errors_for_values():
    compiled = kg.jit(lambda a: torch.linalg.inv(a) @ a)
    for _ in range(3):
        close(compiled(torch.diag(torch.tensor([1.0, 2.0]))), [[1.0, 0.0], [0.0, 1.0]])
    with pytest.raises(RuntimeError, match="singular"):
        compiled(torch.zeros(2, 2))


def test_masks_of_arguments_and_results():
    model = keras.Sequential([layers.Input((4,)), layers.Embedding(5, 3, mask_zero=True)])
    tail = layers.LSTM(2)
    tokens = torch.tensor([[1, 2, 0, 0], [3, 0, 0, 0]])
    expected = tail(model(tokens)).detach()
    embedded, pooled = kg.jit(lambda x: model(x)), kg.jit(lambda x: tail(x))
    for _ in range(4):
        close(tail(embedded(tokens)).detach(), expected)
        close(pooled(model(tokens)).detach(), expected)
    assert (tail(model(tokens) * 1.0).detach() - expected).abs().max() > 1e-3


def test_a_torch_module():
    def make():
        module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        model = keras.Sequential([layers.Input((3,)), layers.TorchModuleWrapper(module)])

        def fun(x):
            return kg.grad(lambda x: ops.sum(model(x) ** 2))(x)

        return fun

    assert_equal_to_eager(make, several(2, 3))
