"""Which backend the package starts where the user names none."""

import json
import os
import pathlib
import subprocess
import sys
import warnings

import pytest

import keras_gradtools as kg
from keras_gradtools.start import BACKENDS, choose_backend


def chosen(installed, tmp_path, modules=(), configured=None, **environment):
    """The backend that is named afterwards, and the text of the warning."""
    if configured is not None:
        (tmp_path / "keras.json").write_text(json.dumps(configured))
    environment = {"KERAS_HOME": str(tmp_path), **environment}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        choose_backend(environment, modules, installed.__contains__)
    return environment.get("KERAS_BACKEND"), "".join(str(w.message) for w in caught)


@pytest.mark.parametrize("configured", [None, {}, {"backend": "tensorflow"}, []])
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_the_one_that_is_installed(backend, configured, tmp_path):
    name, told = chosen([backend], tmp_path, configured=configured)
    assert name == backend
    assert f"starts {backend!r}" in told and f"KERAS_BACKEND={backend}" in told


@pytest.mark.parametrize(
    ("installed", "options"),
    [
        (["tensorflow"], {}),
        (["tensorflow", "jax"], {}),
        (["jax", "torch"], {"configured": {"backend": "torch"}}),
        (["jax"], {"KERAS_BACKEND": "jax"}),
        (["jax"], {"modules": ["keras"]}),
        (["jax"], {"KERAS_BACKEND": "openvino"}),
        ([], {"modules": ["keras"]}),
    ],
)
def test_keras_decides_where_it_can(installed, options, tmp_path):
    name, told = chosen(installed, tmp_path, **options)
    assert name == options.get("KERAS_BACKEND") and told == ""


@pytest.mark.parametrize(
    ("installed", "options", "message"),
    [
        ([], {}, r'Received: an installation with none.*pip install "keras-gradtools\[tensorflow\]"'),
        (["jax", "torch"], {}, "would start 'tensorflow'. Received: .* with jax and torch.*export KERAS_BACKEND=jax"),
        (["jax"], {"KERAS_BACKEND": "torch"}, "KERAS_BACKEND names 'torch'. Received: .*with jax.*KERAS_BACKEND=jax"),
        (["torch"], {"modules": ["keras.src"]}, r'restart Python.*os.environ\["KERAS_BACKEND"\] = "torch"'),
    ],
)
def test_an_error_says_what_to_set(installed, options, message, tmp_path):
    with pytest.raises(ImportError, match=message):
        chosen(installed, tmp_path, **options)


START = """
import importlib.machinery
import sys

class Others(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, *args):
        return None if name.partition(".")[0] in sys.argv[1:] else super().find_spec(name, *args)

sys.meta_path[:] = [Others if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
import keras_gradtools
import keras
print(keras.config.backend())
"""


@pytest.mark.slow
def test_two_first_starts(backend, tmp_path):
    others = [name for name in BACKENDS if name != backend]
    environment = {name: x for name, x in os.environ.items() if name != "KERAS_BACKEND"}
    environment |= {"KERAS_HOME": str(tmp_path), "PYTHONPATH": str(pathlib.Path(kg.__file__).resolve().parent.parent)}
    for _ in range(2):  # Keras' own file names TensorFlow from the first start on
        ran = subprocess.run([sys.executable, "-c", START, *others], capture_output=True, text=True, env=environment)
        assert ran.stdout.split() == [backend], ran.stderr
        assert ("starts" in ran.stderr) == (backend != "tensorflow")
    assert json.loads((tmp_path / "keras.json").read_text())["backend"] == "tensorflow"
