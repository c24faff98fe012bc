"""Chooses the backend that Keras starts. The package imports this module first, and it imports no other module of it.

Keras starts TensorFlow unless `KERAS_BACKEND` or its configuration file names another backend. Keras writes that file
at its first start, and names TensorFlow there whether it is installed or not. Therefore, another backend is started
only if `KERAS_BACKEND` is not set, the backend that Keras would start is not installed, and exactly one other is.
"""

import importlib.util
import json
import os
import pathlib
import sys
import warnings

BACKENDS = ("tensorflow", "jax", "torch")
_VARIABLE = "KERAS_BACKEND"


def choose_backend(environment, modules, is_installed):
    """Names the backend in `environment` if Keras could not start, and says so.

    Args:
        environment: The environment variables, which may change.
        modules: The modules that are already imported.
        is_installed: A function from a name to whether there is such a module.

    Raises:
        ImportError: If Keras could not start, and the choice is not clear.
    """
    if "keras" in modules:
        return
    named = environment.get(_VARIABLE)
    wanted = named or _configured(environment)
    if wanted not in BACKENDS or is_installed(wanted):
        return
    installed = [name for name in BACKENDS if is_installed(name)]
    if not installed:
        raise ImportError(
            "keras_gradtools needs TensorFlow, JAX or PyTorch. Received: an installation with none of them. Install it "
            'with a backend: pip install "keras-gradtools[tensorflow]", "keras-gradtools[jax]" or '
            '"keras-gradtools[torch]".'
        )
    has_failed = any(name.partition(".")[0] == "keras" for name in modules)
    if named or has_failed or len(installed) > 1:
        where = f"the environment variable {_VARIABLE} names" if named else "Keras would start"
        restart = "restart Python, and " if has_failed else ""
        raise ImportError(
            f"keras_gradtools needs a Keras backend that is installed, and {where} {wanted!r}. Received: an "
            f"installation with {' and '.join(installed)}. To start one of these, {restart}set the variable before "
            f'Keras is imported: `export {_VARIABLE}={installed[0]}` or `os.environ["{_VARIABLE}"] = "{installed[0]}"`.'
        )
    environment[_VARIABLE] = installed[0]
    warnings.warn(
        f"Keras would start {wanted!r}, which is not installed. keras_gradtools starts {installed[0]!r}, the only "
        f"installed backend. Set the environment variable {_VARIABLE}={installed[0]} to choose it yourself. Without "
        "keras_gradtools, Keras needs this variable.",
        stacklevel=2,
    )


def _configured(environment):
    """The backend in Keras' configuration file, or its default."""
    base = pathlib.Path(environment.get("KERAS_HOME") or _home() / ".keras")
    try:
        return json.loads((base / "keras.json").read_text(encoding="utf-8")).get("backend", BACKENDS[0])
    except (OSError, ValueError, AttributeError):
        return BACKENDS[0]


def _home():
    home = pathlib.Path.home()
    return home if os.access(home, os.W_OK) else pathlib.Path("/tmp")


def _is_installed(name):
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


choose_backend(os.environ, sys.modules, _is_installed)
