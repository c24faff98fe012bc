"""Keras layers under the tape: derivatives of first and second order, and what a taped pass leaves behind."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from keras.src.backend.common import dtypes

import keras_gradtools as kg
from tests.cases import close, tensor
from tests.compilers import with_every_compiler

LAST = {"data_format": "channels_last"}


@pytest.fixture
def double_precision(monkeypatch):
    """Lets Keras compute in double precision: on JAX and torch its operations cast what is double down."""
    monkeypatch.setitem(dtypes.BIT64_TO_BIT32_DTYPE, "float64", "float64")
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


class Nested(keras.Model):
    """A model in a model, and one layer used twice."""

    def __init__(self, **options):
        super().__init__(**options)
        self.shared = layers.Dense(3, activation="tanh")
        self.inner = keras.Sequential([layers.Dense(3, activation="swish"), layers.LayerNormalization()])

    def call(self, x, training=False):
        return self.shared(self.inner(self.shared(x), training=training))


class SelfAttention(layers.Layer):
    def __init__(self, **options):
        super().__init__(**options)
        self.attention = layers.MultiHeadAttention(2, 3, **options)

    def build(self, shape):
        self.attention.build(shape, shape)

    def call(self, x):
        return self.attention(x, x)


class CrossEntropy(layers.Layer):
    """A loss of each example, as a function of the logits alone."""

    def __init__(self, loss, targets):
        super().__init__()
        self.loss, self.targets = loss, targets

    def call(self, x):
        return self.loss(ops.convert_to_tensor(self.targets), x, from_logits=True)


def after_dense(make):
    return lambda: keras.Sequential([layers.Dense(3, activation="tanh"), make()])


# name: (make the layer, shape of its input, whether to call it in training mode)
LAYERS = {
    "dense gelu": (lambda: layers.Dense(3, activation="gelu"), (2, 4), False),
    "dense softplus": (lambda: layers.Dense(3, activation="softplus"), (2, 4), False),
    "conv1d": (lambda: layers.Conv1D(2, 3, padding="causal", dilation_rate=2), (2, 6, 2), False),
    "conv2d": (lambda: layers.Conv2D(2, 3, strides=2, padding="same", **LAST), (2, 5, 5, 2), False),
    "depthwise conv": (lambda: layers.DepthwiseConv2D(3, depth_multiplier=2, **LAST), (2, 4, 4, 2), False),
    "separable conv": (lambda: layers.SeparableConv2D(3, 2, **LAST), (2, 4, 4, 2), False),
    "transposed conv": (lambda: layers.Conv2DTranspose(2, 3, strides=2, **LAST), (2, 3, 3, 2), False),
    "max pooling": (lambda: layers.MaxPooling2D(2, **LAST), (2, 4, 4, 2), False),
    "average pooling": (lambda: layers.AveragePooling2D(2, padding="same", **LAST), (2, 5, 5, 2), False),
    "global max pooling": (lambda: layers.GlobalMaxPooling1D(), (2, 5, 2), False),
    "lstm": (lambda: layers.LSTM(2, return_sequences=True), (2, 3, 2), False),
    "gru": (lambda: layers.GRU(2), (2, 3, 2), False),
    "simple rnn": (lambda: layers.SimpleRNN(2), (2, 3, 2), False),
    "bidirectional": (lambda: layers.Bidirectional(layers.SimpleRNN(2)), (2, 3, 2), False),
    "attention": (SelfAttention, (2, 3, 4), False),
    "layer normalization": (layers.LayerNormalization, (2, 5), False),
    "group normalization": (lambda: layers.GroupNormalization(2), (2, 3, 4), False),
    "batch normalization": (layers.BatchNormalization, (5, 3), True),
    "batch normalization inference": (layers.BatchNormalization, (5, 3), False),
    "dense, layer normalization": (after_dense(layers.LayerNormalization), (2, 3), False),
    "dense, batch normalization": (after_dense(layers.BatchNormalization), (5, 3), True),
    "dense, group normalization": (after_dense(lambda: layers.GroupNormalization(1)), (2, 3), False),
    "dropout": (lambda: layers.Dropout(0.5), (4, 5), True),
    "spatial dropout": (lambda: layers.SpatialDropout1D(0.5), (3, 2, 4), True),
    "embedding": (lambda: layers.Embedding(4, 3), (2, 3), False),
    "nested model": (Nested, (2, 3), False),
    "cross entropy": (
        lambda: CrossEntropy(keras.losses.categorical_crossentropy, np.eye(3)),
        (3, 3),
        False,
    ),
    "sparse cross entropy": (
        lambda: CrossEntropy(keras.losses.sparse_categorical_crossentropy, np.arange(3)),
        (3, 3),
        False,
    ),
    "binary cross entropy": (
        lambda: CrossEntropy(keras.losses.binary_crossentropy, np.eye(3)),
        (3, 3),
        False,
    ),
}


# `tf.nn.moments` stops the gradient of the mean inside the variance: right to first order only. (Directly
# on the input it does not show: there the gradient has no component along the mean.)
class Setting:
    """A layer in double precision, as a function of its inputs and weights with a scalar value."""

    def __init__(self, name):
        make, shape, self.training = LAYERS[name]
        # JAX takes the softmax of attention in single precision, whatever it is given.
        single = name == "attention" and keras.config.backend() == "jax"
        self.step, self.tolerance = (3e-3, 2e-3) if single else (1e-5, 1e-5)
        self.random = np.random.default_rng(0)
        self.layer = make()
        if name == "embedding":
            self.x = ops.convert_to_tensor(self.random.integers(4, size=shape))
        else:
            self.x = tensor(self.random.normal(size=shape), "float64")
        out = self.call(self.x)
        # Weights in general position: the initial ones hold zeros, and symmetries.
        self.point = [self.random.normal(0, 0.5, w.shape) for w in self.layer.trainable_variables]
        self.cotangent = tensor(self.random.normal(size=out.shape), "float64")
        self.state = [ops.convert_to_numpy(v) for v in self.layer.non_trainable_variables]
        if name != "embedding":
            self.point.append(ops.convert_to_numpy(self.x))

    def call(self, x):
        return self.layer(x, training=True) if self.training else self.layer(x)

    def at(self, point):
        """Puts the layer at the weights and input of `point`, in the state that it had at first."""
        keras.utils.set_random_seed(0)  # dropout on torch uses torch's own generator
        for variable, value in zip(self.layer.trainable_variables, point, strict=False):
            variable.assign(value)
        for variable, value in zip(self.layer.non_trainable_variables, self.state, strict=True):
            variable.assign(value)
        if len(point) > len(self.layer.trainable_variables):
            self.x = tensor(point[-1], "float64")
            return [*self.layer.trainable_variables, self.x]
        return self.layer.trainable_variables

    def value(self, point):
        self.at(point)
        return self.scalar()

    def scalar(self):
        return ops.sum(self.cotangent * ops.sin(self.call(self.x)))

    def gradient(self, point):
        sources = self.at(point)
        with kg.GradientTape() as tape:
            tape.watch(sources)
            y = self.scalar()
        return tape.gradient(y, sources, unconnected_gradients="zero")

    def energy(self, point):
        """Half of the squared norm of the gradient."""
        return sum(ops.sum(ops.square(g)) for g in self.gradient(point)) / 2

    def energy_gradient(self, point):
        sources = self.at(point)
        with kg.GradientTape() as outer:
            outer.watch(sources)
            with kg.GradientTape() as inner:
                inner.watch(sources)
                y = self.scalar()
            gradient = inner.gradient(y, sources, unconnected_gradients="zero")
            energy = sum(ops.sum(ops.square(g)) for g in gradient) / 2
        return outer.gradient(energy, sources, unconnected_gradients="zero")

    def check(self, function, gradient):
        """Compares a gradient with central differences along a random direction."""
        direction = [self.random.normal(size=p.shape) for p in self.point]

        def along(h):
            return float(
                ops.convert_to_numpy(function([p + h * v for p, v in zip(self.point, direction, strict=True)]))
            )

        slope = (along(self.step) - along(-self.step)) / (2 * self.step)
        given = [ops.convert_to_numpy(g) for g in gradient(self.point)]
        assert abs(slope) > 1e-3
        np.testing.assert_allclose(
            sum(np.sum(g * v) for g, v in zip(given, direction, strict=True)), slope, self.tolerance
        )


@pytest.mark.float64
@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("name", LAYERS)
def test_first_order(name):
    setting = Setting(name)
    setting.check(setting.value, setting.gradient)


@pytest.mark.float64
@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("name", LAYERS)
def test_second_order(name):
    setting = Setting(name)
    setting.check(setting.energy, setting.energy_gradient)


def noisy_model():
    return keras.Sequential(
        [
            layers.Dense(4, activation="softplus"),
            layers.BatchNormalization(),
            layers.Dropout(0.5, seed=1),
            layers.Dense(1),
        ]
    )


X = np.random.default_rng(3).normal(size=(8, 3))


def taped(model, x, depth):
    """The gradient of the summed output, under `depth` tapes of which each differentiates the next."""
    with kg.GradientTape() as tape:
        tape.watch(x)
        y = taped(model, x, depth - 1) if depth > 1 else model(x, training=True)
    return tape.gradient(y, x, unconnected_gradients="zero")


def twins():
    """Two models with the same weights and state."""
    model, other = noisy_model(), noisy_model()
    model.build((None, 3))
    other.build((None, 3))
    other.set_weights(model.get_weights())
    return model, other


def same_state(model, other):
    for variable, expected in zip(model.variables, other.variables, strict=True):
        close(variable, ops.convert_to_numpy(expected))


def check_alive(model, trains):
    x = tensor(X)
    assert np.isfinite(ops.convert_to_numpy(model(x, training=True))).all()
    close(model(x), model.predict(X, verbose=0))
    if not trains:
        return
    model.compile("sgd", "mse")
    before = model.get_weights()
    history = model.fit(X, X[:, :1], batch_size=4, verbose=0)
    assert np.isfinite(history.history["loss"][0])
    assert any((a != b).any() for a, b in zip(before, model.get_weights(), strict=True))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_taped_pass_changes_the_state_as_a_plain_one(depth):
    model, other = twins()
    taped(model, tensor(X), depth)
    other(tensor(X), training=True)
    same_state(model, other)
    check_alive(model, trains=depth == 3)


@pytest.mark.parametrize("method", ["jacobian", "batch_jacobian", "jvp"])
def test_derivatives_of_every_kind_leave_the_state_alone(method):
    model, other = twins()
    x = tensor(X)
    with kg.GradientTape() as tape:
        tape.watch(x)
        y = model(x, training=True)
    getattr(tape, method)(y, x, *([tensor(X)] if method == "jvp" else []))
    other(tensor(X), training=True)
    same_state(model, other)
    check_alive(model, trains=method == "jacobian")


@pytest.mark.parametrize("depth", [1, 2])
@with_every_compiler
def test_state_in_compiled_code(compiler, depth):
    if compiler.name == "jax.jit":
        pytest.skip("jax.jit itself leaves tracers in a model with state, with a tape or without: use kg.jit")
    model, other = twins()
    compiled = compiler.compile(lambda x: taped(model, x, depth))
    for _ in range(2):
        # Twice, for the second call runs what the first has compiled.
        gradient, expected = compiled(tensor(X)), taped(other, tensor(X), depth)
        same_state(model, other)
        # XLA on TensorFlow draws other random numbers from the same seed.
        if not compiler.is_xla_graph:
            close(gradient, ops.convert_to_numpy(expected), rtol=1e-3, atol=1e-4)
    check_alive(model, trains=depth == 2)


def test_an_inference_pass_changes_nothing():
    model, other = twins()
    x = tensor(X)
    with kg.GradientTape() as tape:
        tape.watch(x)
        y = model(x)
    gradient = tape.gradient(y, x)
    same_state(model, other)
    # Without noise the examples are independent: the gradient of one alone is its row.
    with kg.GradientTape() as tape:
        one = tensor(X[2:3])
        tape.watch(one)
        y = model(one)
    close(tape.gradient(y, one), ops.convert_to_numpy(gradient)[2:3])


def test_dropout_scales_the_gradient_as_it_scales_the_values():
    layer = layers.Dropout(0.5, seed=2)
    x = tensor(np.full((4, 25), 3.0))
    with kg.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=True)
    gradient, kept = ops.convert_to_numpy(tape.gradient(y, x)), ops.convert_to_numpy(y) > 0
    assert 20 < kept.sum() < 80
    close(gradient, 2.0 * kept)


def test_a_layer_used_twice_gets_both_gradients():
    layer = layers.Dense(1, use_bias=False)
    layer.build((None, 1))
    layer.kernel.assign([[3.0]])
    with kg.GradientTape() as tape:
        y = layer(layer(tensor([[5.0]])))
    # y = w^2 x
    close(tape.gradient(y, layer.kernel), [[30]])


def test_no_flag_of_a_layer_changes():
    model, _ = twins()
    model.layers[0].trainable = False
    flags = [(layer.trainable, layer.built, layer.dtype_policy.name) for layer in model.layers]
    taped(model, tensor(X), 2)
    assert [(layer.trainable, layer.built, layer.dtype_policy.name) for layer in model.layers] == flags
    assert len(model.trainable_variables) == 4
