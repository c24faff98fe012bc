"""What completion offers: the public names, and nothing that the package is made of."""

import types

import pytest

import keras_gradtools as kg

FACES = [name for name in kg.__all__ if isinstance(getattr(kg, name), types.ModuleType)]


def test_the_faces_are_found():
    assert {"attacks", "callbacks", "curvature", "diagnostics", "layers", "models", "testing"} <= set(FACES)


def test_the_package_shows_its_public_names():
    assert dir(kg) == sorted([*kg.__all__, "__version__"])


@pytest.mark.parametrize("face", FACES)
def test_a_face_shows_its_public_names(face):
    module = getattr(kg, face)
    assert dir(module) == sorted(module.__all__)
    assert all(getattr(module, name).__doc__ for name in module.__all__)


@pytest.mark.parametrize("face", ["", *FACES])
def test_a_star_imports_the_public_names(face):
    names = {}
    exec(f"from keras_gradtools{face and '.'}{face} import *", names)
    assert names.keys() - {"__builtins__"} == set((getattr(kg, face) if face else kg).__all__)
