"""Compiled functions, tapes and mixed precision on Keras models, which are afterwards what they were before."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from tests.cases import close, tensor
from tests.transforms.models import (
    BATCH,
    Setting,
    assert_concrete,
    assign,
    built,
    contract,
    dense,
    everything_model,
    example,
    fresh,
    key,
    near,
    normalization_model,
    normalization_reference,
    numpy,
    state,
    unchanged,
)


def train_step(model):
    """Gradient descent by hand, on a model in training mode."""

    def step(x, y):
        with kg.GradientTape() as tape:
            loss = ops.mean((model(x, training=True) - y) ** 2) + sum(model.losses)
        gradients = tape.gradient(loss, model.trainable_variables)
        for v, g in zip(model.trainable_variables, gradients, strict=True):
            v.assign(v - 0.1 * g)
        return loss

    return step


class TestJit:
    def test_a_train_step_is_the_eager_one(self):
        model = fresh("everything")
        first = state(model)
        x, y = tensor(example(model)), tensor(np.ones((BATCH, 2)))
        runs = []
        for step in (train_step(model), kg.jit(train_step(model))):
            assign(model, first)
            losses = numpy([step(x, y) for _ in range(3)])
            assert_concrete(model)
            runs.append((losses, state(model)))
        (eager_losses, eager), (losses, compiled) = runs
        near(losses, eager_losses, 1e-5)
        near(compiled, [v.astype("float64") for v in eager], 1e-5)
        for v, a, b in zip(model.variables, compiled, first, strict=True):
            assert not np.array_equal(a, b), f"{v.path} stood still"

    def test_a_tape_inside_sees_the_regularizers(self):
        """0.1 |w|^2: 0.2 w."""
        layer = layers.Dense(1, use_bias=False, kernel_regularizer=keras.regularizers.L2(0.1))
        model = keras.Sequential([layers.Input((2,)), layer])
        layer.kernel.assign([[1.0], [2.0]])

        def gradient(x):
            with kg.GradientTape() as tape:
                y = ops.sum(model(x)) + sum(model.losses)
            return tape.gradient(y, layer.kernel)

        for compiled in (gradient, kg.jit(gradient)):
            close(compiled(tensor([[3.0, 5.0]])), [[3.2], [5.4]])

    def test_statistics_are_written_back_once_a_call(self):
        """m <- 0.9 m + 0.1 mean, of the batch of that call."""
        model = built(normalization_model())
        values = {key(v): v for v in model.weights}
        forward = kg.jit(lambda x: model(x, training=True))
        for seed in range(3):
            x = example(model, seed)
            before = {k: numpy(v.value).astype("float64") for k, v in values.items()}
            h = np.tanh(dense(before, "hidden", x))
            near(forward(tensor(x)), normalization_reference(before, x, True, 1.0)[0][0], 1e-5)
            near(values["norm/moving_mean"].value, 0.9 * before["norm/moving_mean"] + 0.1 * h.mean(0), 1e-5)
            near(values["norm/moving_variance"].value, 0.9 * before["norm/moving_variance"] + 0.1 * h.var(0), 1e-5)

    def test_the_model_is_alive_afterwards(self, tmp_path):
        model = built(everything_model())
        x, y = example(model), np.ones((BATCH, 2), "float32")
        step = kg.jit(train_step(model))
        for _ in range(2):
            step(tensor(x), tensor(y))
        s = Setting("everything", model=model)
        near(model(x), s.numpy_outputs(s.point)[0])
        near(model.predict(x, verbose=0), s.numpy_outputs(s.point)[0])
        near(kg.grad(s.loss)(s.weights, s.x), s.numpy_gradient()[: len(s.weights)])
        model.save(tmp_path / "model.keras")
        again = keras.saving.load_model(tmp_path / "model.keras")
        near(again.predict(x, verbose=0), s.numpy_outputs(s.point)[0])
        model.compile("sgd", "mse")
        model.fit(x, y, epochs=1, verbose=0)
        s = Setting("everything", model=model)
        near(model.predict(x, verbose=0), s.numpy_outputs(s.point)[0])
        # The program of the step goes on from where `fit` has left.
        before = state(model)
        loss = step(tensor(x), tensor(y))
        after = state(model)
        assign(model, before)
        near(loss, numpy(train_step(model)(tensor(x), tensor(y))), 1e-5)
        near(after, [v.astype("float64") for v in state(model)], 1e-5)

    @pytest.mark.parametrize(
        "compose",
        [
            lambda f: kg.jit(kg.grad(f, argnums=(0, 1))),
            lambda f: kg.grad(kg.jit(f), argnums=(0, 1)),
            lambda f: kg.jit(kg.grad(kg.jit(f), argnums=(0, 1))),
        ],
        ids=["jit of grad", "grad of jit", "jit of grad of jit"],
    )
    def test_both_orders(self, compose):
        s = Setting("everything", True)
        composed = compose(s.loss)
        weights, x = s.weights, tensor(s.x)
        for factor in (1.0, 0.5):
            s.weights = [factor * w for w in weights]
            with unchanged(s.model):
                near(composed(s.weights, x), s.numpy_gradient())

    def test_batch_jacobian_inside(self):
        s = Setting("normalization")
        expected = np.stack([s.numpy_jacobians()[0][6][b][:, b] for b in range(BATCH)])
        compiled = kg.jit(lambda w, x: kg.batch_jacobian(lambda x: s.outputs(w, x))(x))
        with unchanged(s.model):
            near(compiled(s.weights, tensor(s.x)), expected)

    @pytest.mark.parametrize("compiled_first", [True, False], ids=["compiled first", "transform first"])
    def test_of_a_model_drops_its_state_in_a_transform_only(self, compiled_first):
        """One compiled forward pass, called by itself and inside a transform."""
        model = built(normalization_model())
        s = Setting("normalization", True, model=model)
        forward = kg.jit(lambda x: model(x, training=True))
        mean = model.get_layer("norm").moving_mean

        def call():
            before, h = (
                numpy(mean.value),
                np.tanh(dense({key(v): numpy(v.value) for v in model.weights}, "hidden", s.x)),
            )
            forward(tensor(s.x))
            near(mean.value, (0.9 * before + 0.1 * h.mean(0)).astype("float64"), 1e-5)

        if compiled_first:
            call()
        with unchanged(model):
            near(kg.grad(lambda x: s.score(forward(x)))(s.x), s.numpy_gradient()[6])
        call()

    @pytest.mark.parametrize("compiled_first", [True, False], ids=["compiled first", "functional first"])
    def test_inside_a_functionalized_model(self, compiled_first):
        """The weights that are given go through what a layer compiles of itself."""
        layer = CompilesItself()
        model = keras.Sequential([layers.Input((1,)), layer])
        fun, weights = kg.functionalize(model)
        layer.kernel.assign([[5.0]])
        x = np.array([[2.0]], "float32")
        if compiled_first:
            close(model(x), [[20.0]])
        with unchanged(model):
            close(fun([tensor([[3.0]])], x), [[12.0]])
            close(kg.grad(lambda w: ops.sum(fun(w, x)))([tensor([[3.0]])]), [np.array([[4.0]])])
        close(model(x), [[20.0]])


class CompilesItself(layers.Layer):
    def build(self, shape):
        self.kernel = self.add_weight(shape=(1, 1), name="kernel")
        self.compiled = kg.jit(lambda x: 2 * ops.matmul(x, self.kernel))

    def call(self, x):
        return self.compiled(x)

    def compute_output_shape(self, shape):
        return shape


class TestTapes:
    def test_tape_over_transform(self):
        """The gradient of half the squared norm of the gradient, H g."""
        s = Setting("normalization", True)
        gradient = s.numpy_gradient()
        expected = s.numpy_hvp([*gradient[:6], 0 * gradient[6]])[:6]
        with unchanged(s.model):
            with kg.GradientTape() as tape:
                g = kg.grad(s.loss)([v.value for v in s.model.trainable_variables], s.x)
                energy = sum(ops.sum(x * x) for x in g) / 2
            near(tape.gradient(energy, s.model.trainable_variables), expected, 3e-4)

    def test_tape_over_the_functional_form(self):
        s = Setting("dense")
        with unchanged(s.model):
            with kg.GradientTape() as tape:
                y = s.loss([v.value for v in s.model.trainable_variables], s.x)
            near(tape.gradient(y, s.model.trainable_variables), s.numpy_gradient()[:4])

    def test_tape_over_a_transform_of_the_model(self):
        """A penalty on the gradient by the inputs, whose weights the transform only reads."""
        s = Setting("nested", True)
        gradient = s.numpy_gradient()
        expected = s.numpy_hvp([*(0 * g for g in gradient[:-1]), gradient[-1]])[:-1]
        with unchanged(s.model):
            with kg.GradientTape() as tape:
                g = kg.grad(lambda x: s.score(s.model(x, training=True)))(s.x)
                energy = ops.sum(g * g) / 2
            near(tape.gradient(energy, s.model.trainable_variables), expected, 3e-4)

    def test_transform_over_tape(self):
        s = Setting("everything", True)

        def energy(weights):
            with kg.GradientTape() as tape:
                tape.watch(weights)
                y = s.loss(weights, s.x)
            return sum(ops.sum(g * g) for g in tape.gradient(y, weights)) / 2

        gradient = s.numpy_gradient()
        expected = s.numpy_hvp([*gradient[:-1], 0 * gradient[-1]])[:-1]
        with unchanged(s.model):
            near(kg.grad(energy)(s.weights), expected, 3e-4)

    def test_the_variables_stand_for_the_weights_that_were_given(self):
        s = Setting("dense")
        s.weights = [0.5 * w for w in s.weights]
        with unchanged(s.model):
            with kg.GradientTape() as tape:
                y = s.loss(s.weights, s.x)
            near(tape.gradient(y, s.model.trainable_variables), s.numpy_gradient()[:4])


@pytest.mark.parametrize("training", [False, True])
def test_mixed_precision(training):
    """Half precision inside; the weights and what is by them in single precision."""

    def make(policy):
        keras.config.set_dtype_policy(policy)
        try:
            return built([*normalization_model()[:-1], layers.Dense(2, name="out", dtype="float32")])
        finally:
            keras.config.set_dtype_policy("float32")

    single, mixed = make("float32"), make("mixed_float16")
    s, m = (Setting("normalization", training, model=model) for model in (single, mixed))
    expected = s.numpy_gradient()
    direction = s.direction()[0]
    with unchanged(mixed):
        found = kg.grad(m.loss, argnums=(0, 1))(m.weights, tensor(m.x))
        compiled = kg.jit(kg.grad(m.loss))(m.weights, tensor(m.x))
        _, pushed = kg.jvp(m.outputs, (m.weights, tensor(m.x)), direction)
        (product,) = kg.hvp(lambda w: m.loss(w, m.x), (m.weights,), direction[:1])
    for g in [*found[0], found[1], *compiled, pushed, *product]:
        assert keras.backend.standardize_dtype(g.dtype) == "float32"
    near(found, expected, 1e-2)
    near(compiled, expected[:6], 1e-2)
    near(pushed, contract(s.numpy_jacobians(), keras.tree.flatten(direction))[0], 1e-2)
    near(product, s.numpy_hvp([*direction[0], 0 * expected[6]])[:6], 2e-2)
    # In half precision, or the test would say nothing.
    hidden = kg.functionalize(mixed.get_layer("hidden"))
    assert keras.backend.standardize_dtype(hidden[0](hidden[1], m.x).dtype) == "float16"


@pytest.mark.parametrize("compiled", [False, True])
def test_an_error_inside_leaves_the_model_alone(compiled):
    s = Setting("everything", True)

    def broken(w, x):
        s.loss(w, x)
        raise KeyError("mine")

    transform = kg.jit(kg.grad(broken)) if compiled else kg.grad(broken)
    with unchanged(s.model), pytest.raises(KeyError, match="mine"):
        transform(s.weights, tensor(s.x))
    with unchanged(s.model), pytest.raises(KeyError, match="mine"):
        kg.jacobian(broken)(s.weights, tensor(s.x))


class Asks(layers.Layer):
    """x^2 if the sum of x, or what `value` takes from it, is positive, else 5 x."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def call(self, x):
        return x * x if self.value(ops.sum(x)) > 0 else 5 * x

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, x.dtype)


VALUES = {"comparison": lambda s: s, "int": int, "float": float, "numpy": ops.convert_to_numpy}


def asking(shape, value):
    layer = Asks(VALUES[value])
    if shape == "sequential":
        return keras.Sequential([layers.Input((2,)), layer])
    inputs = layers.Input((2,))
    functional = keras.Model(inputs, layer(inputs))
    if shape == "functional":
        return functional
    return {"layer": layer, "nested": keras.Sequential([layers.Input((2,)), functional])}[shape]


class TestModelsThatDependOnValues:
    """Keras puts an error of its own in place of the framework's, on JAX one of another class."""

    X = np.array([[1.0, 2.0], [3.0, -1.0]], "float32")

    def eagerly(self, name, run, backend):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = run(), run()
        said = [str(w.message) for w in caught if "runs" in str(w.message) and "eagerly" in str(w.message)]
        if backend != "torch":
            (said,) = said
            assert said.startswith(f"`{name}` runs") and "depends on the values of tensors" in said
            # The framework's error, and not the one with which Keras says where it was.
            assert "Exception encountered" not in said and "_error_repr" not in said
        return found

    @pytest.mark.parametrize("value", VALUES)
    @pytest.mark.parametrize("shape", ["sequential", "functional", "nested", "layer"])
    def test_batch_jacobian(self, shape, value, backend):
        """diag(2 x)."""
        model = asking(shape, value)
        for found in self.eagerly("batch_jacobian", lambda: kg.batch_jacobian(model)(tensor(self.X)), backend):
            close(found, [np.diag(2 * x) for x in self.X])
        close(kg.batch_jacobian(model)(tensor(-np.abs(self.X))), [5 * np.eye(2)] * 2)

    @pytest.mark.parametrize("shape", ["sequential", "functional"])
    def test_hessian(self, shape, backend):
        """Of a sum of squares, 2 I."""
        model = asking(shape, "comparison")

        def energy(x):
            return ops.sum(model(x))

        for found in self.eagerly("hessian", lambda: kg.hessian(energy)(tensor(self.X)), backend):
            close(ops.reshape(found, (4, 4)), 2 * np.eye(4))

    def test_a_curvature_operator(self, backend):
        """With x -> sum(w x)^2, where w = 1: the Hessian by w of the mean of (sum(w x)^2) is the mean of 2 x x^T."""
        dense = layers.Dense(1, use_bias=False, kernel_initializer="ones")
        model = keras.Sequential([layers.Input((2,)), dense, Asks(VALUES["comparison"])])

        def loss(y_true, y_pred):
            return y_pred[:, 0]

        def product():
            return kg.curvature.Hessian(model, loss, (self.X, self.X)) @ np.array([1.0, 2.0], "float32")

        for found in self.eagerly("Hessian", product, backend):
            close(found, 2 * self.X.T @ self.X / len(self.X) @ [1.0, 2.0])

    @pytest.mark.parametrize("shape", ["sequential", "functional", "nested", "layer"])
    def test_jit_says_what_to_do(self, shape, backend):
        model = asking(shape, "comparison")
        compiled = kg.jit(lambda x: model(x))
        if backend == "torch":  # where it runs eagerly
            close(compiled(tensor(self.X)), self.X**2)
            return
        for _ in range(2):
            with pytest.raises(TypeError, match=r"`kg\.jit` cannot compile .*`keras\.ops\.where`") as caught:
                compiled(tensor(self.X))
            assert "Exception encountered" not in str(caught.value) and "_error_repr" not in str(caught.value)

    @pytest.mark.parametrize("error", [KeyError, RuntimeError, AttributeError])
    def test_an_error_of_the_layer_itself_is_raised(self, error):
        class Fails(layers.Layer):
            def call(self, x):
                raise error("mine")

            def compute_output_spec(self, x):
                return keras.KerasTensor(x.shape, x.dtype)

        model = keras.Sequential([layers.Input((2,)), Fails()])
        for transform in (kg.batch_jacobian, kg.jit):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                with pytest.raises(error, match="mine"):
                    transform(model)(tensor(self.X))
