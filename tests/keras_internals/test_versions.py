"""A Keras that was not tested gives one clear warning or error, and nothing from inside."""

import importlib.util
import subprocess
import sys
import warnings

import keras
import pytest
from keras.src.backend.common import masking

from keras_gradtools.keras_internals import attributes, backend_modules, layers, scopes, variables, versions

# Of an unknown Keras, once with an internal that is gone and once with all of them.
PRETEND = """
import warnings
import keras
from keras.src.backend.common import masking
keras.__version__, kept = "3.99.0", masking.get_keras_mask
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    del masking.get_keras_mask
    try:
        import keras_gradtools
    except Exception as error:
        print(type(error).__name__, error)
    masking.get_keras_mask = kept
    from keras_gradtools import backend
    backend.Tape
for warning in seen:
    if "keras_gradtools" in str(warning.message):
        print(warning.category.__name__, warning.message)
"""
TESTED = "keras_gradtools was tested with Keras 3.10 to 3.16. Received: Keras 3.99.0."


@pytest.mark.parametrize("version", ["3.10.0", "3.15.1", "3.16.0.dev2026102704", "3.16.2"])
def test_a_tested_version_passes_in_silence(monkeypatch, version):
    monkeypatch.setattr(keras, "__version__", version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.warn_if_untested()


@pytest.mark.parametrize("version", ["3.17.0", "3.100.0.dev2030010100", "4.0", "3.9.2", "2.15.0", "unknown"])
def test_another_version_is_one_warning(monkeypatch, version):
    monkeypatch.setattr(keras, "__version__", version)
    with pytest.warns(UserWarning) as seen:
        versions.warn_if_untested()
    message = str(seen[0].message)
    assert len(seen) == 1
    assert f"tested with Keras 3.10 to 3.16. Received: Keras {version}." in message
    assert 'pip install "keras>=3.10,<3.17"' in message


def test_the_installed_one_is_tested():
    assert versions.is_tested()


def test_an_import_under_an_unknown_keras_is_one_error_or_one_warning():
    done = subprocess.run([sys.executable, "-c", PRETEND], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    error, warning = done.stdout.splitlines()
    assert error.startswith(f"RuntimeError {TESTED} This Keras has no `keras.src.backend.common.masking.get_")
    assert warning.startswith(f"UserWarning {TESTED} It has all the private names that keras_gradtools needs")
    assert "Install a newer keras_gradtools" in error and "Install a newer keras_gradtools" in warning


def read_anew(module):
    """Runs a module of the room once more, beside the one that is in use."""
    spec = importlib.util.find_spec(module.__name__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize(
    ("module", "owner", "name", "instead", "message"),
    [
        (layers, masking, "set_keras_mask", None, "has no `keras.src.backend.common.masking.set_keras_mask`"),
        (layers, layers.Layer, "losses", property(lambda self: []), "_get_regularization_losses` in `.*<lambda>`"),
        (layers, layers.Layer, "_get_call_context", None, "has no `keras.src.layers.layer.Layer._get_call_context`"),
        (variables, variables.Variable, "_maybe_autocast", None, r"has no `.*\.Variable._maybe_autocast`"),
        (variables, keras.Variable, "value", property(lambda self: 1), r"does not use `.*_maybe_autocast` in `.*<lam"),
    ],
)
def test_what_is_missing_or_unused_is_an_error(monkeypatch, module, owner, name, instead, message):
    monkeypatch.setattr(keras, "__version__", "3.99.0")
    if instead is None:
        monkeypatch.delattr(owner, name)
    else:
        monkeypatch.setattr(owner, name, instead, raising=False)
    with pytest.raises(RuntimeError, match=f"{TESTED} This Keras {message}" if "has" in message else message) as found:
        read_anew(module)
    assert "Install a newer keras_gradtools" in str(found.value)


@pytest.mark.parametrize(
    ("owner", "maker", "name"),
    [
        (variables.Variable, "__init__", "_initializer"),
        (layers.Layer, "_initialize_tracker", "_trainable_variables"),
        (layers.Layer, "_get_call_context", "current_call_ctx"),
        (scopes.StatelessScope, "__init__", "losses"),
    ],
)
def test_a_private_attribute_that_is_gone_is_an_error(monkeypatch, owner, maker, name):
    attributes.require()
    rest = "; ".join(f"self.{other}" for names in attributes._SPELLED.values() for other in names if other != name)
    made = {}
    exec(f"def {maker}(self):\n    {rest}", made)
    monkeypatch.setattr(owner, maker, made[maker])
    with pytest.raises(RuntimeError, match=rf"This Keras has no `{name}` in `.*{maker}`, which is needed"):
        attributes.require()


def test_the_backend_is_looked_through_too(monkeypatch, backend):
    where, name = {
        "tensorflow": ("nn", "_compute_moments"),
        "jax": ("numpy", "moveaxis"),
        "torch": ("nn", "dot_product_attention"),
    }[backend]
    monkeypatch.delattr(backend_modules.module(where), name)
    with pytest.raises(RuntimeError, match=rf"This Keras has no `keras\.src\.backend\.{backend}.*\.{where}\.{name}`"):
        read_anew(backend_modules)


def test_a_whole_module_may_be_missing(monkeypatch, backend):
    path = backend_modules.module("nn").__name__
    monkeypatch.setitem(sys.modules, path, None)
    with pytest.raises(RuntimeError, match=f"`keras.src.backend.{backend}.nn`, which is needed"):
        backend_modules.module("nn")
