"""`preflight` against layers whose second derivative is known to be there, to be missing, or to be wrong."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from keras_gradtools.diagnostics import preflight

X = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")


class Squared(layers.Layer):
    """The square of its input, with the gradient that `wrong` gives it."""

    def __init__(self, gradient, **kwargs):
        super().__init__(**kwargs)
        self.square = kg.custom_gradient(lambda x: (x * x, lambda upstream: gradient(x, upstream)))

    def call(self, x):
        return self.square(x)


def without_gradient(x):
    """`x` itself, by a computation that the backend cannot pull back."""
    if keras.config.backend() == "jax":
        # On JAX the code of a custom gradient runs beforehand, so that an error in it is none of the gradient.
        import jax

        return jax.pure_callback(np.asarray, jax.ShapeDtypeStruct(x.shape, x.dtype), x, vmap_method="sequential")

    def refuse(upstream):
        raise RuntimeError("no gradient here")

    return kg.custom_gradient(lambda x: (1.0 * x, refuse))(x)


class Once(layers.Layer):
    """The square, with a gradient that has none itself."""

    def call(self, x):
        return kg.custom_gradient(lambda x: (x * x, lambda upstream: 2.0 * without_gradient(x) * upstream))(x)


class Never(layers.Layer):
    """The square, without a gradient."""

    def call(self, x):
        return without_gradient(x * x)


def of_one(layer, shape=(4,), dtype="float32"):
    inputs = keras.Input(shape, dtype=dtype)
    model = keras.Model(inputs, layer(inputs), name="net")
    (verdict,) = preflight(model).layers
    return verdict


RIGHT = {
    "Dense, relu": lambda: layers.Dense(3, "relu"),
    "Dense, gelu": lambda: layers.Dense(3, "gelu"),
    "Conv1D": lambda: layers.Conv1D(3, 2),
    "BatchNormalization": lambda: layers.BatchNormalization(),
    "LayerNormalization": lambda: layers.LayerNormalization(),
    "LSTM": lambda: layers.LSTM(3),
    "Bidirectional": lambda: layers.Bidirectional(layers.GRU(2)),
    "TimeDistributed": lambda: layers.TimeDistributed(layers.Dense(2)),
    "MaxPooling1D": lambda: layers.MaxPooling1D(2),
    "Softmax": lambda: layers.Softmax(),
}


# The two that take long are compositions of others.
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in ("Bidirectional", "TimeDistributed") else n for n in RIGHT],
)
def test_a_layer_that_is_right(name):
    shape = (4,) if name.startswith("Dense") else (6, 4)
    verdict = of_one(RIGHT[name](), shape)
    assert verdict.verdict == "yes", str(verdict)
    assert verdict.message == verdict.advice == ""


def test_attention():
    inputs = keras.Input((5, 4))
    model = keras.Model(inputs, layers.MultiHeadAttention(2, 3)(inputs, inputs))
    report = preflight(model)
    assert report.twice_differentiable
    # The dense layers inside of it are a part of it.
    assert len(report.layers) == 1


def test_a_custom_gradient_that_can_be_differentiated():
    assert of_one(Squared(lambda x, upstream: 2.0 * x * upstream)).verdict == "yes"


def test_a_second_derivative_that_is_wrong_without_an_error():
    layer = Squared(lambda x, upstream: 2.0 * ops.stop_gradient(x) * upstream, name="stopped")
    verdict = of_one(layer)
    assert verdict.verdict == "wrong"
    # The derivative is 2, and comes out as 0.
    assert float(verdict.message.split()[4]) == pytest.approx(1.0, abs=0.05)
    assert "custom_gradient" in verdict.advice
    assert "stopped" in str(verdict)


def test_a_layer_that_is_differentiable_once():
    verdict = of_one(Once(name="once"))
    assert verdict.verdict == "once", str(verdict)
    assert verdict.advice


def test_a_layer_without_a_gradient():
    verdict = of_one(Never(name="never"))
    assert verdict.verdict == "no", str(verdict)
    assert "no gradient here" in verdict.message or "callback" in verdict.message
    assert "stop_gradient" in verdict.advice


def test_softsign_is_differentiable_once_on_tensorflow(backend):
    verdict = of_one(layers.Activation("softsign"))
    assert verdict.verdict == ("once" if backend == "tensorflow" else "yes")


@pytest.mark.parametrize("fun", [ops.stop_gradient, ops.round])
def test_a_constant_layer_is_no_problem(fun):
    verdict = of_one(layers.Lambda(fun))
    assert verdict.verdict == "constant"


def test_the_report_names_the_layers_of_nested_models():
    inner = keras.Sequential(
        [keras.Input((4,)), layers.Dense(3, "tanh", name="fine"), Never(name="never")], name="inner"
    )
    model = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="first"), inner, layers.Dense(1)], name="outer")
    report = preflight(model)
    assert [layer.verdict for layer in report.layers] == ["yes", "yes", "no", "yes"]
    (problem,) = report.problems
    assert "never" in problem.path and problem.layer_class.endswith("Never")
    assert not report.twice_differentiable
    text = str(report)
    assert "4 layers of 'outer'" in text and "1 cannot" in text and "never" in text and "fine" not in text


def test_integers_dicts_and_given_examples():
    inputs = {"words": keras.Input((6,), dtype="int32", name="words"), "numbers": keras.Input((4,), name="numbers")}
    embedded = layers.LSTM(3)(layers.Embedding(7, 5, mask_zero=True)(inputs["words"]))
    outputs = layers.Dense(1)(layers.Concatenate()([embedded, inputs["numbers"]]))
    model = keras.Model(inputs, outputs)
    kinds = {"Embedding": "yes", "LSTM": "yes", "Concatenate": "yes", "Dense": "yes", "NotEqual": "constant"}
    report = preflight(model, {"words": np.array([[1, 2, 3, 0, 0, 0]] * 2), "numbers": X[:2]})
    assert report.twice_differentiable
    for layer in report.layers:
        assert layer.verdict == kinds.get(layer.layer_class.rpartition(".")[2], layer.verdict), str(layer)
    assert preflight(model).twice_differentiable


def test_a_model_whose_inputs_are_not_known():
    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2, "tanh")

        def call(self, x):
            return self.dense(x)

    model = Subclassed()
    model(X)
    with pytest.raises(ValueError, match="Give it `x`"):
        preflight(model)
    assert [layer.verdict for layer in preflight(model, X).layers] == ["yes"]


def test_nothing_changes():
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(3), layers.BatchNormalization(), layers.Dropout(0.5, seed=1), layers.Dense(1)]
    )
    before = [ops.convert_to_numpy(v) for v in model.variables]
    original = keras.Layer.__call__
    report = preflight(model, training=True)
    assert report.twice_differentiable, str(report)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), value)
    assert keras.Layer.__call__ is original and model.losses == []


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (lambda: keras.Sequential([layers.Dense(1)], name="new"), "the unbuilt model 'new'"),
        (lambda: abs, "expects a built Keras model"),
    ],
)
def test_what_is_no_model(model, match):
    with pytest.raises(ValueError, match=match):
        preflight(model())


def test_training_is_a_bool():
    with pytest.raises(ValueError, match="True or False"):
        preflight(keras.Sequential([keras.Input((2,)), layers.Dense(1)]), training=None)
