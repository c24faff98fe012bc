"""A replaced function of Keras is the one that Keras calls, and where it cannot be, that is noticed."""

import functools
import sys
import types

import keras
import numpy as np
import pytest
from keras import layers, losses, ops

import keras_gradtools as kg
from keras_gradtools import backend as adapter
from keras_gradtools.keras_internals import backend_modules, patches, variables
from keras_gradtools.keras_state import example_losses, layer_state, scopes
from tests.cases import close, tensor


def module_of(source, **given):
    made = types.ModuleType("keras.made_for_a_test")
    vars(made).update(given)
    exec(source, vars(made))
    return made


@pytest.fixture
def modules(monkeypatch):
    """Two modules as of Keras: the second knows a function of the first by name."""
    home = module_of("def f(x):\n    return x + 1\ndef user(x):\n    return f(x)\ndef stranger(x):\n    return x + 1")
    home.__name__ = "keras.home"
    importer = module_of("def user(x):\n    return f(x)", f=home.f)
    monkeypatch.setitem(sys.modules, "keras.home", home)
    monkeypatch.setitem(sys.modules, "keras.importer", importer)
    return home, importer


def doubled(f):
    return lambda x: 2 * f(x)


def test_every_module_that_knows_it_gets_the_replacement(modules):
    home, importer = modules
    patches.Hook(home, "f", [home.user]).replace(doubled)
    assert (home.user(1), importer.user(1)) == (4, 4)


def test_what_others_call_by_that_name_stays(modules, monkeypatch):
    home, importer = modules
    importer.f = other = lambda x: x
    patches.Hook(home, "f", [home.user]).replace(doubled)
    assert importer.f is other


def test_a_user_that_does_not_look_it_up_is_an_error(modules):
    home, _ = modules
    with pytest.raises(RuntimeError, match=r"does not use `keras.home.f` in `stranger`.*silently wrong"):
        patches.Hook(home, "f", [home.user, home.stranger])


def test_what_is_gone_is_an_error(modules):
    home, _ = modules
    with pytest.raises(RuntimeError, match="has no `keras.home.g`"):
        patches.Hook(home, "g", [home.user])


def test_the_code_of_a_function_is_found_under_decorators(modules):
    home, _ = modules

    def undeclared(fun):
        return lambda *args: fun(*args)

    def declared(fun):
        @functools.wraps(fun)
        def call(*args):
            return fun(*args)

        return call

    for wrap in (undeclared, declared, lambda fun: property(undeclared(fun))):
        assert patches.mentions(wrap(home.user), "f")
        assert not patches.mentions(wrap(home.stranger), "f")
    # Nothing can be said of what has no code.
    assert patches.mentions(len, "f") and patches.mentions(functools.partial(home.stranger), "f")


class TestInThisKeras:
    """What each replacement is for, seen through Keras' public functions."""

    def test_reads_of_variables_are_seen(self):
        v = keras.Variable(np.asarray(3.0, "float32"))
        with kg.GradientTape() as tape:
            y = v * v
        close(tape.gradient(y, v), 6.0)

    def test_losses_of_the_call_outside_are_kept_in_a_scope(self):
        layer = layers.ActivityRegularization(l2=1.0)
        layer(tensor([[2.0]]))
        with scopes.StateScope():
            layer(tensor([[3.0]]))
        close(layer.losses[0], 4.0)

    def test_regularizers_read_variables_as_tapes_see_it(self):
        layer = layers.Dense(1, use_bias=False, kernel_regularizer=keras.regularizers.L2(0.5))
        layer.build((None, 2))
        layer.set_weights([np.asarray([[2.0], [3.0]], "float32")])
        with kg.GradientTape() as tape, scopes.StateScope():
            (loss,) = layer.losses
        close(tape.gradient(loss, layer.kernel), [[2.0], [3.0]])

    @pytest.mark.parametrize(
        ("loss", "y", "y_pred"),
        [
            (losses.MeanSquaredError(), [[0.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [3.0, 1.0]]),
            # It reduces its values itself, from Keras 3.16 on by a function that it imports by name.
            (losses.Circle(), [0, 1], [[1.0, 0.0], [0.6, 0.8]]),
        ],
    )
    def test_losses_give_up_their_reduction(self, loss, y, y_pred):
        y, y_pred = ops.convert_to_tensor(y), tensor(y_pred)
        compiled = example_losses.compiled(loss)
        found = example_losses.example_losses(compiled, y, y_pred)
        assert found.shape == (2,)
        loss.reduction = None
        close(found, loss(y, y_pred))

    def test_what_a_layer_is_told_by_its_caller_is_one_of_the_captured_values(self):
        seen = []

        class Surroundings(layers.Layer):
            def call(self, x, training=None):
                seen.append(layer_state.ambient())
                return x

        model = keras.Sequential([Surroundings()])
        for training in (True, False):
            model(tensor([[1.0]]), training=training)
        differing = [pair for pair in zip(*seen[-2:], strict=True) if pair[0] != pair[1]]
        assert differing == [(True, False)]

    def test_the_hook_is_what_the_property_of_a_variable_calls(self):
        assert type(keras.Variable(0.0))._maybe_autocast is variables.Variable._maybe_autocast
        assert variables.Variable._maybe_autocast.__module__ == "keras_gradtools.keras_state.recording"

    def test_functions_of_the_backend_are_replaced_where_operations_look(self, backend):
        assert adapter.Tape
        where = {
            "tensorflow": [("nn", "_compute_moments")],
            "jax": [("numpy", "reshape"), ("numpy", "squeeze"), ("core", "stop_gradient")],
            "torch": [("nn", "dot_product_attention"), ("rnn", "cudnn_ok")],
        }[backend]
        for module, name in where:
            found = backend_modules.function(module, name)
            original = found.__wrapped__ if hasattr(found, "__wrapped__") else found.args[0]
            assert found.__module__ != "keras_gradtools" and original.__module__.startswith("keras.src.backend.")
            holders = [m for m in patches._modules_of_keras() if vars(m).get(name) is original]
            assert not holders, "these still call Keras' own"
