"""The class of kernels: each is described once, and a backend has all of them and no other."""

import inspect
import pathlib
import subprocess
import sys

import keras
import pytest

from keras_gradtools import backend as kernels
from keras_gradtools.backend.base import Backend


def public(names):
    return {name for name in names if not name.startswith("_")}


def of_this_framework():
    (found,) = Backend.__subclasses__()
    return found


def test_every_kernel_is_described():
    for name in public(vars(Backend)):
        assert name == "Tape" or name.isupper() or inspect.getdoc(getattr(Backend, name)), name


def test_a_backend_has_these_kernels_and_no_other():
    assert public(vars(of_this_framework())) <= public(vars(Backend))
    assert all(hasattr(kernels, name) for name in public(vars(Backend)))


def test_the_arguments_are_those_of_the_base_class():
    for name in public(vars(of_this_framework())):
        described = vars(Backend).get(name)
        if inspect.isfunction(described):
            expected = [p for p in inspect.signature(described).parameters if p != "self"]
            given = list(inspect.signature(getattr(kernels, name)).parameters)
            assert given[: len(expected)] == expected, name


def test_a_backend_without_a_kernel_cannot_be_made():
    class Unfinished(of_this_framework()):
        linearize = Backend.linearize

    with pytest.raises(TypeError, match="linearize"):
        Unfinished()


def test_the_backend_is_loaded_on_import():
    """What it corrects must be right also in what is traced before the first use of a kernel."""
    tape = f"keras_gradtools.backend.{keras.config.backend()}.tape"
    code = f"import sys, keras_gradtools; print({tape!r} in sys.modules)"
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=pathlib.Path(__file__).parents[2], check=True, capture_output=True, text=True
    )
    assert shown.stdout.split()[-1] == "True"


def test_a_kernel_is_looked_up_once():
    assert kernels.pullback is vars(kernels)["pullback"]
    with pytest.raises(AttributeError, match="no_such_kernel"):
        kernels.no_such_kernel  # noqa: B018


def test_another_keras_backend_is_refused(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "numpy")
    with pytest.raises(RuntimeError, match="Received: the backend 'numpy'"):
        kernels._load()
