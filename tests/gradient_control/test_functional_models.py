"""The gradient control functions on the symbolic tensors of functional models."""

import json
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from tests.cases import close, tensor
from tests.gradient_control.slopes import gradient_of

# A control, and what it makes of a gradient. The values of the tests are integers, which `round` leaves as they are.
CONTROLS = {
    "stop_gradient": (kg.stop_gradient, lambda u: 0 * u),
    "clip_gradient_norm": (lambda x: kg.clip_gradient_norm(x, 2.5), lambda u: u * 2.5 / np.linalg.norm(u)),
    "clip_gradient_value": (lambda x: kg.clip_gradient_value(x, 3.5), lambda u: np.clip(u, -3.5, 3.5)),
    "scale_gradient": (lambda x: kg.scale_gradient(x, 0.5), lambda u: 0.5 * u),
    "reverse_gradient": (lambda x: kg.reverse_gradient(x, 2), lambda u: -2 * u),
    "straight_through": (kg.straight_through(ops.round), lambda u: u),
}
with_every_control = pytest.mark.parametrize(("control", "rule"), CONTROLS.values(), ids=CONTROLS)
UPSTREAM = np.array([[3.0, -4.0]])
# What a new process does with a saved model that has one output for each control.
LOADER = """
import json, sys
import keras
from keras import ops
import keras_gradtools as kg

model = keras.models.load_model(sys.argv[1])
x = ops.convert_to_tensor([[1.0, 2.0]])
with kg.GradientTape(persistent=True) as tape:
    tape.watch(x)
    outputs = model(x)
upstream = ops.convert_to_tensor([[3.0, -4.0]])
gradients = [tape.gradient(y, x, output_gradients=upstream, unconnected_gradients="zero") for y in outputs]
to_list = lambda x: ops.convert_to_numpy(ops.stop_gradient(x)).tolist()
print(json.dumps([[to_list(y) for y in outputs], [to_list(g) for g in gradients]]))
"""


def functional(control, *shape, dtype=None):
    inputs = keras.Input(shape or (2,), dtype=dtype)
    return keras.Model(inputs, control(inputs))


def check(model, rule):
    x = tensor([[1.0, 2.0]])
    with kg.GradientTape() as tape:
        tape.watch(x)
        y = model(x)
    gradient = tape.gradient(y, x, output_gradients=tensor(UPSTREAM), unconnected_gradients="zero")
    close(y, [[1, 2]])
    close(gradient, rule(UPSTREAM))


@with_every_control
class TestEveryControl:
    def test_values_and_gradients(self, control, rule):
        model = functional(control)
        assert model.output_shape == (None, 2)
        check(model, rule)
        check(kg.jit(model), rule)

    def test_is_saved_and_loaded(self, control, rule, tmp_path):
        model = functional(control)
        model.save(tmp_path / "model.keras")
        check(keras.models.load_model(tmp_path / "model.keras"), rule)
        check(keras.models.clone_model(model), rule)
        check(keras.Model.from_config(model.get_config()), rule)

    def test_fit(self, control, rule):
        dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
        inputs = keras.Input((1,))
        hidden = dense(inputs)
        model = keras.Model(inputs, hidden + control(hidden))
        model.compile(keras.optimizers.SGD(0.1), "mse")
        x = np.array([[3.0], [4.0]])
        model.fit(x, 0 * x, batch_size=2, verbose=0)
        # The outputs are 2x, where the loss has the gradient 2x. It comes back on both ways.
        close(dense.kernel, [[1 - 0.1 * np.sum((2 * x + rule(2 * x)) * x)]])

    def test_a_mask_passes_through(self, control, rule):
        inputs = keras.Input((3, 2))
        outputs = keras.layers.GlobalAveragePooling1D()(control(keras.layers.Masking()(inputs)))
        close(keras.Model(inputs, outputs)(tensor([[[1, 2], [3, 4], [0, 0]]])), [[2, 3]])

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
    def test_the_dtype_is_kept(self, control, rule, dtype, tmp_path):
        keras.config.set_dtype_policy("mixed_float16")
        try:
            model = functional(control, dtype=dtype)
        finally:
            keras.config.set_dtype_policy("float32")
        model.save(tmp_path / "model.keras")
        for each in (model, keras.models.load_model(tmp_path / "model.keras")):
            assert each.outputs[0].dtype == dtype
            x = ops.ones((1, 2), dtype=dtype)
            assert each(x).dtype == x.dtype

    def test_in_mixed_precision(self, control, rule):
        dense = keras.layers.Dense(2, use_bias=False, kernel_initializer="identity", dtype="mixed_bfloat16")
        inputs = keras.Input((2,))
        outputs = control(dense(inputs))
        assert outputs.dtype == "bfloat16"
        model = keras.Model(inputs, ops.cast(outputs, "float32"))
        close(
            gradient_of(lambda x: ops.sum(model(x) * tensor(UPSTREAM)) + 0 * ops.sum(x), tensor([[1.0, 2.0]])),
            rule(UPSTREAM),
            rtol=1e-2,
        )


def test_in_a_new_process(tmp_path):
    inputs = keras.Input((2,))
    keras.Model(inputs, [control(inputs) for control, _ in CONTROLS.values()]).save(tmp_path / "model.keras")
    done = subprocess.run([sys.executable, "-c", LOADER, tmp_path / "model.keras"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    values, gradients = json.loads(done.stdout.splitlines()[-1])
    np.testing.assert_allclose(values, [[[1, 2]]] * len(CONTROLS))
    np.testing.assert_allclose(gradients, [rule(UPSTREAM) for _, rule in CONTROLS.values()], rtol=1e-5)


def test_nested_structures_of_symbolic_tensors(tmp_path):
    inputs = {"a": keras.Input((2,), name="a"), "b": keras.Input((3,), dtype="int32", name="b")}
    stopped = kg.stop_gradient({"pair": [inputs["a"], inputs["b"]], "name": "constant", "none": None})
    assert stopped["name"] == "constant" and stopped["none"] is None
    a, b = stopped["pair"]
    assert (a.shape, a.dtype, b.shape, b.dtype) == ((None, 2), "float32", (None, 3), "int32")
    keras.Model(inputs, {"product": inputs["a"] * a, "b": b}).save(tmp_path / "model.keras")
    model = keras.models.load_model(tmp_path / "model.keras")
    given = {"a": tensor([[3.0, 4.0]]), "b": tensor([[1, 2, 3]], "int32")}
    with kg.GradientTape() as tape:
        tape.watch(given["a"])
        found = model(given)
    close(found["b"], [[1, 2, 3]])
    close(tape.gradient(found["product"], given["a"]), [[3, 4]])


def test_the_scale_of_a_reversed_gradient_can_change():
    model = functional(kg.reverse_gradient)
    check(model, lambda u: -u)
    model.layers[-1].scale = 3.0
    check(model, lambda u: -3 * u)


@keras.saving.register_keras_serializable(package="tests_functional_models")
def sign(x):
    return ops.sign(x)


def test_straight_through_a_function_of_ones_own(tmp_path):
    functional(kg.straight_through(sign)).save(tmp_path / "model.keras")
    x = tensor([[-2.0, 5.0]])
    model = keras.models.load_model(tmp_path / "model.keras")
    close(model(x), [[-1, 1]])
    close(gradient_of(lambda x: model(x) * tensor(UPSTREAM), x), UPSTREAM)


@pytest.mark.parametrize(
    "scale", [keras.Variable(1.0), tensor(1.0), "1", np.nan], ids=["variable", "tensor", "str", "nan"]
)
@pytest.mark.parametrize("control", [kg.scale_gradient, kg.reverse_gradient])
def test_the_scale_is_a_number(control, scale):
    with pytest.raises(ValueError, match="expects a finite number as `scale`. Received: .*layers.ReverseGradient"):
        control(keras.Input((2,)), scale)


def test_custom_gradient_names_its_layer():
    double = kg.custom_gradient(lambda x: (2 * x, lambda u: 2 * u))
    with pytest.raises(ValueError, match="without its decorator to the layer keras_gradtools.layers.CustomGradient"):
        double(keras.Input((2,)))
