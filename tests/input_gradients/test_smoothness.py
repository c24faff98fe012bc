"""What speaks against the exact penalty: kinks, found by measuring them, and missing second derivatives."""

import functools

import keras
import numpy as np
import pytest
from keras import activations, layers, ops

import keras_gradtools as kg
from keras_gradtools.input_gradients.smoothness import has_kink, reasons_against_exact
from keras_gradtools.keras_state.layer_calls import array_of
from keras_gradtools.models import InputGradientRegularized
from tests.cases import tensor
from tests.input_gradients.reference import Reference, assert_equal_to, numpy

RNG = np.random.default_rng(0)
N, D, K = 4, 3, 2
X = RNG.uniform(-1, 1, (N, D))
KERNEL = RNG.uniform(0.5, 1.5, (D, K))

SMOOTH_OF_KERAS = """
    celu elu exponential gelu linear log_sigmoid log_softmax mish sigmoid silu softmax softplus softsign sparse_plus
    squareplus tanh tanh_shrink
"""
KINKED_OF_KERAS = """
    hard_shrink hard_sigmoid hard_silu hard_tanh leaky_relu relu relu6 selu soft_shrink sparse_sigmoid
"""
SMOOTH = {name: getattr(activations, name) for name in SMOOTH_OF_KERAS.split()}
SMOOTH |= {
    "gelu of tanh": functools.partial(activations.gelu, approximate=True),
    "celu, alpha 0.5": functools.partial(activations.celu, alpha=0.5),
    # It cannot be called on one column.
    "glu": activations.glu,
    "none": activations.get(None),
    "sine": ops.sin,
    "square": ops.square,
    # Its slope goes on, and only that of the slope jumps.
    "squared relu": lambda x: ops.relu(x) ** 2,
    "constant": lambda x: 0 * x + 3,
    "tiny": lambda x: 1e-20 * ops.tanh(x),
    "huge": lambda x: 1e20 * ops.tanh(x),
    "far from zero": lambda x: 1000 + ops.tanh(x),
    "slope of 0.1": lambda x: 0.1 * x,
    "normalized": lambda x: x - ops.mean(x, axis=-1, keepdims=True),
}
KINKED = {name: getattr(activations, name) for name in KINKED_OF_KERAS.split()}
KINKED |= {
    "elu, alpha 0.5": functools.partial(activations.elu, alpha=0.5),
    "threshold": lambda x: activations.threshold(x, 0.3, 0.0),
    "relu, bounded": functools.partial(activations.relu, max_value=4.3),
    "absolute": ops.abs,
    "clip": lambda x: ops.clip(x, -0.77, 5.1),
    "maximum": lambda x: ops.maximum(x, 0.3 * x),
    "sign": ops.sign,
    "tiny": lambda x: 1e-20 * ops.relu(x),
    "huge": lambda x: 1e20 * ops.relu(x),
    "far from zero": lambda x: 1000 + ops.relu(x),
    **{f"relu from {at}": functools.partial(lambda x, at: ops.relu(x - at), at=at) for at in (-5.2, 0.0101, 1 / 64)},
}


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_activations(name):
    assert not has_kink(SMOOTH[name])


@pytest.mark.parametrize("name", KINKED)
def test_activations_with_kinks(name):
    assert has_kink(KINKED[name])


def test_what_cannot_be_called_is_taken_for_smooth():
    def failing(x):
        raise RuntimeError

    assert not has_kink(failing) and not has_kink(lambda x: "relu") and not has_kink(lambda x: ops.sum(x))


@pytest.mark.parametrize("kinked", [True, False])
def test_a_kink_is_seen_inside_a_compiled_function(kinked):
    # Not one that was judged before, and is remembered.
    def activation(x):
        return ops.relu(x) if kinked else ops.tanh(x)

    judged = []
    kg.jit(lambda x: (judged.append(has_kink(activation)), x * x)[1])(tensor(2.0))
    assert judged and set(judged) == {kinked}


def test_judging_has_no_random_effect():
    keras.utils.set_random_seed(1)
    before = np.random.get_state()[1].copy()
    reasons_against_exact(sequential(layers.Dense(K), OwnTanh()))
    np.testing.assert_array_equal(before, np.random.get_state()[1])


class OwnTanh(layers.Layer):
    def call(self, x):
        return ops.tanh(x)


class OwnActivation(layers.Layer):
    def __init__(self, activation):
        super().__init__()
        self.inner_activation = activation

    def call(self, x):
        return self.inner_activation(x)


def sequential(*parts, shape=(D,)):
    return keras.Sequential([keras.Input(shape), *parts])


def functional(fun, shape=(D,)):
    x = keras.Input(shape)
    return keras.Model(x, layers.Dense(1)(fun(x)))


IMAGE = (4, 4, 2)
WITH_KINKS = {
    "dense relu": (lambda: sequential(layers.Dense(3, "relu", name="d")), "'d' uses 'relu', which has kinks"),
    "activation": (lambda: sequential(layers.Activation("relu6", name="a")), "'a' uses 'relu6'"),
    "relu": (lambda: sequential(layers.ReLU(name="r")), "'r' is 'ReLU'"),
    "leaky": (lambda: sequential(layers.LeakyReLU(name="r")), "'r' is 'LeakyReLU'"),
    "elu": (lambda: sequential(layers.ELU(alpha=0.5, name="r")), "'r' is 'ELU'"),
    "prelu": (lambda: sequential(layers.PReLU(name="r")), "'r' is 'PReLU'"),
    "pooling": (lambda: sequential(layers.MaxPooling2D(2, name="m"), shape=IMAGE), "'m' is 'MaxPooling2D'"),
    "global": (lambda: sequential(layers.GlobalMaxPooling2D(name="m"), shape=IMAGE), "'m' is 'GlobalMaxPooling2D'"),
    "convolution": (
        lambda: sequential(layers.Conv2D(2, 2, activation="elu"), layers.ReLU(name="r"), shape=IMAGE),
        "'r'",
    ),
    "distributed": (
        lambda: sequential(layers.TimeDistributed(layers.Dense(2, "relu", name="d")), shape=(3, D)),
        "'d' uses 'relu'",
    ),
    "lstm": (lambda: sequential(layers.LSTM(2, activation="relu"), shape=(3, D)), "uses 'relu'"),
    "gates": (lambda: sequential(layers.GRU(2, recurrent_activation="hard_sigmoid"), shape=(3, D)), "'hard_sigmoid'"),
    "bidirectional": (
        lambda: sequential(layers.Bidirectional(layers.SimpleRNN(2, activation="relu")), shape=(3, D)),
        "uses 'relu'",
    ),
    "maximum": (lambda: functional(lambda x: layers.Maximum(name="m")([x, 2 * x])), "'m' is 'Maximum'"),
    "minimum": (lambda: functional(lambda x: layers.Minimum(name="m")([x, 2 * x])), "'m' is 'Minimum'"),
    "nested": (lambda: sequential(sequential(layers.Dense(3, "relu", name="d"))), "'d' uses 'relu'"),
    "own layer": (lambda: sequential(OwnActivation(activations.relu)), "uses 'relu'"),
    "own function": (lambda: sequential(layers.Dense(2, lambda x: ops.abs(x), name="d")), "'d' uses '<lambda>'"),
    "several": (
        lambda: sequential(*(layers.Dense(2, "relu", name=n) for n in "abc")),
        "'a' uses 'relu', which has kinks",
    ),
    "half": (lambda: sequential(layers.ReLU(dtype="mixed_bfloat16", name="r")), "'r' is 'ReLU'"),
}
WITHOUT_KINKS = {
    "dense": lambda: sequential(layers.Dense(3, "gelu"), layers.Dense(3)),
    "softmax": lambda: sequential(layers.Dense(3, "softmax"), layers.Softmax()),
    "elu": lambda: sequential(layers.ELU()),
    "elu in float16": lambda: sequential(layers.ELU(dtype="mixed_float16")),
    "elu in bfloat16": lambda: sequential(layers.ELU(dtype="mixed_bfloat16")),
    "leaky, of slope 1": lambda: sequential(layers.LeakyReLU(negative_slope=1.0)),
    "average": lambda: sequential(layers.AveragePooling2D(2), layers.GlobalAveragePooling2D(), shape=IMAGE),
    "normalized": lambda: sequential(
        layers.Conv2D(2, 2, activation="silu"), layers.BatchNormalization(), layers.Dropout(0.5), shape=IMAGE
    ),
    "lstm": lambda: sequential(layers.LSTM(2), shape=(3, D)),
    "operations": lambda: functional(lambda x: ops.tanh(x) * ops.sigmoid(x) + ops.exp(x)),
    "own layer": lambda: sequential(layers.Dense(2), OwnTanh()),
    "own layer, functional": lambda: functional(OwnTanh()),
    "lambda": lambda: sequential(layers.Lambda(ops.tanh)),
    "ours": lambda: sequential(layers.Dense(2), kg.layers.ScaleGradient(0.5)),
}
OPERATIONS = {
    "relu": ops.relu,
    "relu6": ops.relu6,
    "leaky_relu": ops.leaky_relu,
    "selu": ops.selu,
    "elu": lambda x: ops.elu(x, alpha=0.5),
    "abs": abs,
    "maximum": lambda x: ops.maximum(x, 0.0),
    "minimum": lambda x: ops.minimum(x, 0.0),
    "clip": lambda x: ops.clip(x, 0, 1),
    "max": lambda x: ops.max(x, axis=-1, keepdims=True),
    "min": lambda x: ops.min(x, axis=-1, keepdims=True),
    "hard_sigmoid": ops.hard_sigmoid,
    "hard_silu": ops.hard_silu,
    "hard_tanh": ops.hard_tanh,
    "hard_shrink": ops.hard_shrink,
    "soft_shrink": ops.soft_shrink,
    "sparse_sigmoid": ops.sparse_sigmoid,
    "sparsemax": ops.sparsemax,
    "threshold": lambda x: ops.threshold(x, 0.1, 0.0),
    "activation": lambda x: activations.relu(x, negative_slope=0.1),
    "max_pool": lambda x: ops.squeeze(ops.max_pool(x[..., None], 2, data_format="channels_last"), -1),
}


@pytest.mark.parametrize("name", WITH_KINKS)
def test_models_with_kinks(name):
    model, text = WITH_KINKS[name]
    (reason,) = reasons_against_exact(model())
    assert text in reason and "which has kinks" in reason
    assert ("(and 2 more)" in reason) == (name == "several")


@pytest.mark.parametrize("name", WITHOUT_KINKS)
def test_models_without_kinks(name):
    assert reasons_against_exact(WITHOUT_KINKS[name]()) == ()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_of_a_functional_model(name, nested):
    model = functional(OPERATIONS[name])
    (reason,) = reasons_against_exact(sequential(model) if nested else model)
    assert "which has kinks" in reason


def test_a_function_is_not_looked_into():
    assert reasons_against_exact(lambda x: ops.relu(x)) == ()


# --- layers without a second derivative ---

MESSAGE = "no second derivative"


def cube_without_second_derivative(message=None):
    """x^3 / 3, whose derivative x^2 cannot be differentiated: by what the framework says, or by `message`."""
    name = keras.config.backend()
    if name == "tensorflow":
        import tensorflow as tf

        @tf.custom_gradient
        def slope(x):
            def fails(upstream):
                raise NotImplementedError(MESSAGE if message is None else message)

            return x * x, fails

        return tf.custom_gradient(lambda x: (x * x * x / 3, lambda upstream: upstream * slope(x)))
    if name == "torch":
        import torch

        class Cube(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x * x * x / 3

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(ctx, upstream):
                return upstream * ctx.saved_tensors[0] ** 2

        class Slope(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x * x

            @staticmethod
            def backward(ctx, upstream):
                raise NotImplementedError(message)

        class CubeOfSlope(Cube):
            @staticmethod
            def backward(ctx, upstream):
                return upstream * Slope.apply(ctx.saved_tensors[0])

        return Cube.apply if message is None else CubeOfSlope.apply
    import jax

    def square(x):
        return jax.pure_callback(lambda x: np.square(np.asarray(x)), jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    slope = jax.custom_jvp(square)

    @slope.defjvp
    def fails(primals, tangents):
        raise NotImplementedError(message)

    if message is None:
        slope = square
    cube = jax.custom_vjp(lambda x: x * x * x / 3)
    cube.defvjp(lambda x: (x * x * x / 3, x), lambda x, upstream: (upstream * slope(x),))
    return cube


REASONS = {
    "tensorflow": MESSAGE,
    "jax": "Pure callbacks do not support JVP",
    "torch": "second derivative through a torch.autograd.Function",
}


class Cube(layers.Layer):
    def __init__(self, message=None, **kwargs):
        super().__init__(**kwargs)
        self.fun = cube_without_second_derivative(message)

    def call(self, x):
        return self.fun(x)

    def compute_output_shape(self, shape):
        return shape


def cubes(message=None, kind="sequential"):
    dense = layers.Dense(K, use_bias=False)
    if kind == "sequential":
        model = sequential(dense, Cube(message))
    elif kind == "nested":
        model = sequential(sequential(dense, Cube(message)), layers.Rescaling(1.0))
    else:
        x = keras.Input((D,))
        model = keras.Model(x, (layers.Lambda if kind == "lambda" else lambda f: f)(Cube(message))(dense(x)))
    dense.set_weights([KERNEL])
    return model


@pytest.mark.parametrize("kind", ["sequential", "functional", "nested", "lambda"])
def test_a_missing_second_derivative_is_found(kind, backend):
    (reason,) = reasons_against_exact(cubes(kind=kind))
    assert reason.startswith("its second derivative failed: ") and REASONS[backend] in reason


def test_an_error_without_words():
    (reason,) = reasons_against_exact(cubes(message=""))
    assert reason.startswith("its second derivative failed: ") and reason.split(": ")[1]


def test_several_reasons():
    reasons = reasons_against_exact(sequential(layers.Dense(K, "relu"), Cube()))
    assert len(reasons) == 2 and "kinks" in reasons[0] and "second derivative" in reasons[1]


def test_finding_out_leaves_the_model_alone():
    model = sequential(layers.BatchNormalization(), layers.Dropout(0.5, seed=1), layers.Dense(K), Cube())
    before = [numpy(v.value) for v in model.variables]
    assert reasons_against_exact(model)
    for old, new in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(old, numpy(new.value))


def cubed(weights, xs):
    return ((xs[0] @ weights[0]) ** 3 / 3).sum(axis=1, keepdims=True)


def total(y, y_pred):
    return ops.sum(y_pred, axis=-1)


class TestTraining:
    """Finite differences with a layer that has no second derivative."""

    reference = Reference(cubed, [KERNEL], [X], step_size=0.2)
    options = {"target": total, "step_size": 0.2}

    def step(self, model, **options):
        def value_and_gradient(x):
            with kg.GradientTape() as tape:
                value = kg.regularization.input_gradient_penalty(model, x, **self.options, **options)
            return value, tape.gradient(value, model.trainable_variables)

        return value_and_gradient

    def assert_right(self, found):
        value, gradients = numpy(found[0]), [numpy(g) for g in found[1]]
        assert_equal_to(self.reference, (value, gradients), rtol=1e-3, value_rtol=1e-4)

    @pytest.mark.parametrize("method", ["finite_difference", "auto"])
    def test_value_and_gradient(self, method):
        self.assert_right(self.step(cubes(), method=method)(tensor(X)))

    @pytest.mark.parametrize("method", ["finite_difference", "auto"])
    def test_compiled(self, method):
        self.assert_right(kg.jit(self.step(cubes(), method=method))(tensor(X)))

    def test_exact_says_why_not(self, backend):
        if backend == "torch":
            pytest.skip("torch itself is silent about `once_differentiable` where the cotangent is a constant")
        with pytest.raises(Exception, match=REASONS[backend]):
            self.step(cubes(), method="exact")(tensor(X))

    @pytest.mark.parametrize(
        "options",
        [{"run_eagerly": True}, {"jit_compile": False}, {"jit_compile": True}],
        ids=str,
    )
    def test_fit(self, options, backend):
        model = cubes()
        wrapped = InputGradientRegularized(model, 0.5, **self.options)
        wrapped.compile(keras.optimizers.SGD(0.01), lambda y, y_pred: 0 * y_pred, **options)
        assert wrapped.method == "finite_difference"
        history = wrapped.fit(X.astype("float32"), np.zeros((N, K), "float32"), batch_size=N, verbose=0).history
        np.testing.assert_allclose(history["input_gradient_penalty"][0], self.reference([KERNEL]), rtol=1e-4)
        (gradient,) = self.reference.gradient()
        np.testing.assert_allclose((KERNEL - model.get_weights()[0]) / 0.005, gradient, rtol=2e-3, atol=2e-3)

    def test_the_summary_says_why(self, backend):
        lines = []
        InputGradientRegularized(cubes(), 0.5).summary(print_fn=lambda line, **kwargs: lines.append(line))
        (line,) = [line for line in lines if "Input-gradient penalty" in line]
        assert "finite_difference" in line and REASONS[backend] in line


class Seeing(layers.Layer):
    """The square, and whether it was ever given numbers."""

    given: list = []

    def call(self, x):
        self.given.append(array_of(x) is not None)
        return ops.square(x)


def test_second_derivatives_are_tried_without_computing_them_where_that_can_be(backend):
    Seeing.given.clear()
    model = keras.Sequential([keras.Input((D,)), Seeing(), layers.Dense(1)])
    Seeing.given.clear()
    assert reasons_against_exact(model) == ()
    assert any(Seeing.given) is (backend == "torch")


class Deciding(layers.Layer):
    """The square, told by Python from values."""

    def call(self, x):
        return ops.square(x) if float(ops.sum(x)) > -1e6 else x

    def compute_output_shape(self, shape):
        return shape


def test_a_layer_that_decides_by_values_is_tried_eagerly():
    model = keras.Sequential([keras.Input((D,)), Deciding(), layers.Dense(1)])
    assert reasons_against_exact(model) == ()
