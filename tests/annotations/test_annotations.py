"""Everything public is annotated, and a strict type checker passes on the code of users."""

import inspect
import pathlib
import subprocess
import sys
import types

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from tests.annotations import user_code

FACES = [kg, *(x for name in kg.__all__ if isinstance(x := getattr(kg, name), types.ModuleType))]
OPERATORS = (
    "__init__",
    "__enter__",
    "__exit__",
    "__matmul__",
    "__rmatmul__",
    "__add__",
    "__sub__",
    "__mul__",
    "__neg__",
)


def functions_of(cls):
    """The public functions that classes of the package define for a class, with those of its properties."""
    for base in cls.__mro__:
        if not base.__module__.startswith("keras_gradtools"):
            continue
        for name, value in vars(base).items():
            if name.startswith("_") and name not in OPERATORS:
                continue
            parts = (value.fget, value.fset) if isinstance(value, property) else (value,)
            yield from (getattr(part, "__func__", part) for part in parts)


def public_functions():
    """The functions and methods of this package behind its public names."""
    for face in FACES:
        for name in getattr(face, "__all__", ()):
            value = getattr(face, name)
            for fun in functions_of(value) if isinstance(value, type) else [value]:
                fun = inspect.unwrap(fun) if callable(fun) else fun
                if isinstance(fun, types.FunctionType) and fun.__module__.startswith("keras_gradtools"):
                    yield fun


FUNCTIONS = {f"{fun.__module__}.{fun.__qualname__}": fun for fun in public_functions()}


def test_the_functions_are_found():
    assert len(FUNCTIONS) > 250


@pytest.mark.parametrize("name", FUNCTIONS)
def test_is_annotated(name):
    signature = inspect.signature(FUNCTIONS[name])
    missing = [
        p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name not in ("self", "cls")
    ]
    assert not missing
    assert signature.return_annotation is not signature.empty


def test_the_code_of_users_runs():
    assert user_code.derivatives(ops.convert_to_tensor([1.0, 2.0]))[:3] == (9.0, 9.0, 15.0)
    x, y = np.ones((4, 3), "float32"), np.ones((4, 2), "float32")
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, "tanh")])
    assert np.isfinite(user_code.trained(model, x, y)["hessian_max_eigenvalue"]).all()
    assert np.isfinite(user_code.measured(model, x, y)).all()


@pytest.mark.slow
def test_mypy_is_strict_on_the_code_of_users():
    pytest.importorskip("mypy")
    root = pathlib.Path(__file__).resolve().parent.parent.parent
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "tests/annotations/user_code.py"]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
