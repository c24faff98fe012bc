"""`dead_units`: which units are zero on all examples, in which layers, and that nothing changes."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from keras_gradtools.diagnostics import dead_units

RNG = np.random.default_rng(21)
X = RNG.uniform(0.5, 1.5, size=(7, 3)).astype("float32")


def of(*parts, x=X, **options):
    model = keras.Sequential([keras.Input(x.shape[1:]), *parts])
    return dead_units(model, x, **options), model


def dense(signs, activation="relu", **kwargs):
    """One unit for each sign: of positive inputs, positive or negative before the activation."""
    kernel = keras.initializers.Constant(np.tile(np.array(signs, "float32"), (3, 1)))
    return layers.Dense(len(signs), activation, kernel_initializer=kernel, **kwargs)


def test_units_that_are_zero_on_all_examples():
    found, _ = of(dense([1, -1, 1, -1], name="hidden"), layers.Dense(2, name="out"))
    assert {name: units.tolist() for name, units in found.items()} == {"hidden": [False, True, False, True]}


def test_one_example_is_enough_to_be_alive():
    x = X.copy()
    x[:, 1] = 2.0
    model = keras.Sequential([keras.Input((3,)), layers.Dense(1, "relu", name="hidden")])
    model.set_weights([np.array([[1.0], [-1.0], [0.0]]), np.zeros(1)])
    assert dead_units(model, x)["hidden"].tolist() == [True]
    x[3] = [2.0, 0.5, 0.0]
    assert dead_units(model, x)["hidden"].tolist() == [False]


@pytest.mark.parametrize(
    ("activation", "is_found"),
    [
        ("relu", True),
        ("relu6", True),
        ("hard_sigmoid", True),
        (lambda z: ops.maximum(z, 0), True),
        (layers.ReLU(), True),
        ("tanh", False),
        ("leaky_relu", False),
        ("elu", False),
        ("softmax", False),
        (None, False),
        (lambda z: ops.reshape(z, (-1, 5, 7)), False),
    ],
    ids=["relu", "relu6", "hard_sigmoid", "function", "layer", "tanh", "leaky", "elu", "softmax", "none", "fails"],
)
def test_which_activations_can_be_dead(activation, is_found):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(35, activation, name="hidden")])
    assert list(dead_units(model, X)) == (["hidden"] if is_found else [])


@pytest.mark.parametrize("activation", [layers.Activation("relu", name="a"), layers.ReLU(name="a")])
def test_an_activation_as_a_layer(activation):
    found, _ = of(dense([1, -1], None, name="hidden"), activation)
    assert {name: units.tolist() for name, units in found.items()} == {"a": [False, True]}


def test_slopes_below_zero_are_no_death():
    assert of(dense([-1], None), layers.ReLU(negative_slope=0.1))[0] == {}


def test_a_channel_is_dead_where_all_its_places_are():
    signs = keras.initializers.Constant(np.array([1.0, -1.0, 1.0], "float32").reshape(1, 1, 1, 3))
    image = np.zeros((2, 4, 5, 1), "float32")
    image[1, 2, 3] = 1.0
    found, _ = of(layers.Conv2D(3, 1, activation="relu", kernel_initializer=signs, name="conv"), x=image)
    assert found["conv"].tolist() == [False, True, False]


def test_channels_first_are_on_axis_one():
    x = np.abs(RNG.normal(size=(2, 3, 4, 4)).astype("float32"))
    layer = layers.BatchNormalization(axis=1)
    relu = layers.Activation("relu", name="a")
    relu.data_format = "channels_first"
    found, _ = of(layer, relu, x=x)
    assert found["a"].shape == (3,)


def test_names_of_nested_models_and_a_layer_that_is_called_twice():
    shared = dense([1, -1, -1], name="shared")
    inner = keras.Sequential([keras.Input((3,)), dense([-1, -1, 1], name="hidden")], name="inner")
    x = keras.Input((3,))
    y = shared(inner(shared(x)))
    found = dead_units(keras.Model(x, y), X)
    assert {name: units.tolist() for name, units in found.items()} == {
        "shared": [False, True, True],
        "inner/hidden": [True, True, False],
    }


def test_names_in_a_model_made_of_parts_of_another():
    layer = dense([1, -1], name="hidden")
    keras.Sequential([keras.Input((3,)), layer], name="first")
    other = keras.Sequential([keras.Input((3,)), layer, layers.Dense(2, "relu", name="second")])
    assert list(dead_units(other, X)) == ["hidden", "second"]


def test_two_layers_of_one_name():
    class Two(keras.Model):
        def __init__(self):
            super().__init__()
            self.parts = [dense([1, -1], name="same"), dense([-1, -1], name="same")]

        def call(self, x):
            return self.parts[0](x) + self.parts[1](x)

    model = Two()
    model(X)
    found = dead_units(model, X)
    assert {name: units.tolist() for name, units in found.items()} == {"same": [False, True], "same_1": [True, True]}


def test_recurrent_layers_and_states():
    x = np.abs(RNG.normal(size=(4, 6, 3)).astype("float32"))
    inputs = keras.Input((6, 3))
    units = 4
    y, state = layers.SimpleRNN(units, "relu", return_sequences=True, return_state=True, name="rnn")(inputs)
    found = dead_units(keras.Model(inputs, [y, state]), x)
    assert found["rnn"].shape == (units,)


def test_nothing_changes():
    model = keras.Sequential(
        [keras.Input((3,)), layers.Dense(4, "relu"), layers.BatchNormalization(), layers.Dropout(0.5, seed=1)]
    )
    before = [ops.convert_to_numpy(v).copy() for v in model.variables]
    dead_units(model, X, training=True)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), value)


def test_the_wrapped_model_is_called():
    model = keras.Sequential([keras.Input((3,)), dense([1, -1], name="hidden"), layers.Dense(1)])
    assert dead_units(kg.models.InputGradientRegularized(model, 0.1), X)["hidden"].tolist() == [False, True]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [(lambda x: x, {}, "expects a keras.Model"), (keras.Sequential([layers.Dense(1)]), {}, "expects a built model")],
    ids=["function", "unbuilt"],
)
def test_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        dead_units(model, X, **options)


def test_a_mode_that_is_none():
    with pytest.raises(ValueError, match="expects True or False as `training`"):
        of(layers.Dense(1), training="yes")
