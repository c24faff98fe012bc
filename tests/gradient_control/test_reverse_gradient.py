"""`reverse_gradient`, and its layer in a domain-adversarial model, after Ganin & Lempitsky (2015)."""

import keras
import numpy as np
import pytest

import keras_gradtools as kg
from keras_gradtools import layers, reverse_gradient
from tests.cases import close, tensor
from tests.compilers import with_every_compiler
from tests.gradient_control.slopes import gradient_of

X = np.array([[1.0], [2.0], [-1.0], [0.5]], "float32")
LABELS = np.array([[1.0], [0.0], [2.0], [1.0]], "float32")
DOMAINS = np.array([[0.0], [1.0], [0.0], [1.0]], "float32")
RATE = 0.05


def _dense():
    return keras.layers.Dense(1, use_bias=False, kernel_initializer=keras.initializers.Constant(0.5))


def adversarial(*between):
    """One linear unit each for the features, the labels, and, behind the layers `between`, the domains."""
    features, labels, domains = _dense(), _dense(), _dense()
    inputs = keras.Input((1,))
    hidden = adapted = features(inputs)
    for layer in between:
        adapted = layer(adapted)
    model = keras.Model(inputs, [labels(hidden), domains(adapted)])
    model.compile(keras.optimizers.SGD(RATE), ["mse", "mse"])
    return model, (features, labels, domains)


def by_hand(scales):
    """The three weights after one step for each scale."""
    feature, label, domain = 0.5, 0.5, 0.5
    for scale in scales:
        hidden = feature * X
        by_label = 2 * (label * hidden - LABELS)
        by_domain = 2 * (domain * hidden - DOMAINS)
        step_feature = np.mean((by_label * label - scale * by_domain * domain) * X)
        step_label, step_domain = np.mean(by_label * hidden), np.mean(by_domain * hidden)
        feature -= RATE * step_feature
        label -= RATE * step_label
        domain -= RATE * step_domain
    return feature, label, domain


def fit(model, epochs, callbacks=()):
    model.fit(X, [LABELS, DOMAINS], batch_size=len(X), epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks)


@pytest.mark.parametrize(
    "scale",
    [0.5, np.float32(0.5), np.float64(0.5), tensor(0.5), tensor(0.5, "float16"), keras.Variable(0.5)],
    ids=["float", "float32", "float64", "tensor", "half_tensor", "variable"],
)
def test_kinds(scale):
    close(gradient_of(lambda x: reverse_gradient(x * x, scale), tensor(3.0)), -3)


def test_the_scale_has_no_gradient():
    for scale in (tensor(0.5), keras.Variable(0.5)):
        x = tensor(3.0)
        with kg.GradientTape(persistent=True) as tape:
            tape.watch([x, scale])
            y = reverse_gradient(x, scale)
        close(tape.gradient(y, scale), None)
        close(tape.gradient(y, x), -0.5)


@with_every_compiler
def test_a_schedule_changes_it(compiler):
    if not compiler.sees_assignments:
        pytest.skip("this compiler takes variables for constants")
    scale = keras.Variable(1.0, trainable=False)
    slope = compiler.compile(lambda x: gradient_of(lambda x: reverse_gradient(x * x, scale), x))
    for value in (1.0, 0.5, 0.0, 2.0):
        scale.assign(value)
        close(slope(tensor(3.0)), -6 * value)


@pytest.mark.parametrize(
    "scale",
    [np.inf, np.nan, "1", None, True, np.ones(()), tensor([1.0]), tensor(True, "bool"), tensor(1, "complex64")],
    ids=["inf", "nan", "str", "None", "bool", "array", "vector", "bool_tensor", "complex"],
)
def test_scales(scale):
    with pytest.raises(ValueError, match="reverse_gradient expects a finite number, or .* as `scale`. Received: "):
        reverse_gradient(tensor(1.0), scale)


class CountCalls(keras.layers.Layer):
    """Counts how often Python runs through it."""

    count = 0

    def call(self, x):
        type(self).count += 1
        return x


class Schedule(keras.callbacks.Callback):
    """Sets the scale before each epoch, and notes how often the model's Python has run until then."""

    def __init__(self, scales):
        super().__init__()
        self.scales, self.calls = scales, []

    def on_epoch_begin(self, epoch, logs=None):
        self.model.get_layer("reverse").scale = self.scales[epoch]
        self.calls.append(CountCalls.count)


class TestReverseGradient:
    def test_the_features_move_the_other_way(self):
        model, weights = adversarial(layers.ReverseGradient(0.7))
        fit(model, 1)
        close([w.kernel for w in weights], [[[w]] for w in by_hand([0.7])])

        # Without the labels, the same step as that of an ordinary model, with the other sign.
        moved = {}
        for name, layer in (("plain", keras.layers.Identity()), ("reversed", layers.ReverseGradient())):
            model, (features, _, domains) = adversarial(layer)
            model.compile(keras.optimizers.SGD(RATE), ["mse", "mse"], loss_weights=[0.0, 1.0])
            fit(model, 1)
            moved[name] = float(features.kernel[0, 0]) - 0.5, float(domains.kernel[0, 0]) - 0.5
        assert moved["plain"][0] != 0
        close(tensor(moved["reversed"][0]), -moved["plain"][0])
        close(tensor(moved["reversed"][1]), moved["plain"][1])

    def test_a_callback_schedules_the_scale(self, backend):
        scales = [0.0, 0.25, 1.0, 2.0]
        model, weights = adversarial(layers.ReverseGradient(9.0, name="reverse"), CountCalls())
        schedule = Schedule(scales)
        fit(model, len(scales), [schedule])
        close([w.kernel for w in weights], [[[w]] for w in by_hand(scales)])
        if backend != "torch":
            assert len(set(schedule.calls[1:])) == 1, "the model was traced again"

    def test_the_scale_is_saved(self, tmp_path):
        inputs = keras.Input((1,))
        model = keras.Model(inputs, layers.ReverseGradient(1.0, name="reverse")(inputs))
        model.get_layer("reverse").scale = 0.25
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        close(loaded.get_layer("reverse").scale, 0.25)
        x = tensor([[3.0]])
        with kg.GradientTape() as tape:
            tape.watch(x)
            y = loaded(x)
        close(tape.gradient(y, x), [[-0.25]])

    def test_the_scale_is_a_variable_of_single_precision(self):
        layer = layers.ReverseGradient(0.1, dtype="float16")
        assert isinstance(layer.scale, keras.Variable) and not layer.scale.trainable
        close(layer.scale, np.float32(0.1), rtol=0, atol=0)
        layer.scale = 3
        close(layer.scale, 3)

    @pytest.mark.parametrize("scale", [float("nan"), "1", None, True])
    def test_refuses_scales(self, scale):
        with pytest.raises(ValueError, match="ReverseGradient expects a finite number as `scale`. Received: scale="):
            layers.ReverseGradient(scale)
        layer = layers.ReverseGradient()
        with pytest.raises(ValueError, match="ReverseGradient expects a finite number, or .* as `scale`. Received: "):
            layer.scale = scale
        close(layer.scale, 1)
