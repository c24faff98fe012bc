"""What every gradient layer does as a Keras layer: saved, loaded, symbolic, masked, in half precision."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from keras_gradtools import layers
from tests.cases import close, tensor


@keras.saving.register_keras_serializable(package="tests_layer_contract")
def tripled(x):
    return x * 1, lambda upstream: 3 * upstream


@keras.saving.register_keras_serializable(package="tests_layer_contract")
def rounded(x):
    return ops.round(x)


# A layer, and what it makes of a gradient of [3, -4]; the values [1, 2] stay as they are.
LAYERS = {
    "StopGradient": (layers.StopGradient, [0, 0]),
    "ClipGradientNorm": (lambda **kwargs: layers.ClipGradientNorm(2.5, **kwargs), [1.5, -2]),
    "ClipGradientValue": (lambda **kwargs: layers.ClipGradientValue(3.5, **kwargs), [3, -3.5]),
    "ScaleGradient": (lambda **kwargs: layers.ScaleGradient(0.5, **kwargs), [1.5, -2]),
    "ReverseGradient": (lambda **kwargs: layers.ReverseGradient(2, **kwargs), [-6, 8]),
    "StraightThrough": (lambda **kwargs: layers.StraightThrough(rounded, **kwargs), [3, -4]),
    "CustomGradient": (lambda **kwargs: layers.CustomGradient(tripled, **kwargs), [9, -12]),
}


@pytest.mark.parametrize(("make", "expected"), LAYERS.values(), ids=LAYERS)
class TestLayerContract:
    @staticmethod
    def check(call, expected, dtype="float32"):
        x = tensor([[1.0, 2.0]], dtype)
        with kg.GradientTape() as tape:
            tape.watch(x)
            y = call(x)
        gradient = tape.gradient(y, x, output_gradients=tensor([[3.0, -4.0]], y.dtype), unconnected_gradients="zero")
        close(ops.cast(y, "float32"), [[1, 2]])
        close(ops.cast(gradient, "float32"), [expected])
        return y, gradient

    def test_alone(self, make, expected):
        self.check(make(), expected)

    def test_compiled(self, make, expected):
        layer = make()
        layer.build((1, 2))
        self.check(kg.jit(layer), expected)

    def test_config(self, make, expected):
        layer = make(name="mine")
        config = layer.get_config()
        copy = type(layer).from_config(config)
        assert copy.name == "mine" and copy.get_config() == config
        self.check(copy, expected)

    def test_saved_and_loaded_in_a_functional_model(self, make, expected, tmp_path):
        inputs = keras.Input((2,))
        model = keras.Model(inputs, make()(inputs))
        self.check(model, expected)
        model.save(tmp_path / "model.keras")
        self.check(keras.models.load_model(tmp_path / "model.keras"), expected)

    def test_symbolic_shape_and_dtype(self, make, expected):
        outputs = make()(keras.KerasTensor((None, 3, None), "float32"))
        assert outputs.shape == (None, 3, None) and outputs.dtype == "float32"
        outputs = make(dtype="mixed_float16")(keras.KerasTensor((None, 3), "float32"))
        assert outputs.dtype == "float16"

    def test_mixed_precision(self, make, expected):
        for policy, dtype in (("mixed_float16", "float16"), ("mixed_bfloat16", "bfloat16")):
            y, gradient = self.check(make(dtype=policy), expected)
            assert keras.backend.standardize_dtype(y.dtype) == dtype
            assert keras.backend.standardize_dtype(gradient.dtype) == "float32"

    def test_mask_passes_through(self, make, expected):
        layer = make()
        assert layer.supports_masking
        inputs = keras.Input((3, 2))
        outputs = layer(keras.layers.Masking()(inputs))
        outputs = keras.layers.GlobalAveragePooling1D()(outputs)
        x = np.array([[[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]]], "float32")
        close(keras.Model(inputs, outputs)(x), [[2, 3]])

    def test_trains_nothing(self, make, expected):
        layer = make()
        layer.build((1, 2))
        assert layer.trainable_variables == []
