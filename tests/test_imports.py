"""The rules of the package's architecture, read off its source."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "keras_gradtools"

# Bottom first. A module imports from levels below its own, and from its own folder.
LEVELS = [
    {"annotations", "start", "nesting", "blocks", "display"},
    {"validation", "keras_internals"},
    {"keras_state"},
    {"backend"},
    {"chosen_inputs", "double_precision", "drawing", "example_norms", "memory"},
    {"independence"},
    {"tape"},
    {"gradient_control"},
    {"transforms"},
    {"finite_differences", "training"},
    {"testing", "curvature", "input_gradients", "attacks"},
    {"second_order", "diagnostics"},
    {"layers", "losses", "models", "callbacks", "optimizers", "plots", "regularization"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
# These belong to the adapters alone: each framework to the folder of its name, and the question which backend it is.
FRAMEWORKS = {"tensorflow": "tensorflow", "jax": "jax", "jaxlib": "jax", "torch": "torch"}
# `keras.src` comes in here, as an import or spelled in a string, and goes on to `keras_state` and the adapters alone.
ROOM = "keras_internals"
WHICH_BACKEND = ("backend.backend", "config.backend")
SAY_NOTHING = {"util", "utils", "helper", "helpers", "misc", "common"}


def references(tree, folder):
    """The dotted names that a module imports or spells out as an attribute, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ["keras_gradtools", *folder][: len(folder) + 2 - node.level] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from ((".".join([*base, alias.name]), node.lineno) for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node), node.lineno
        elif isinstance(node, ast.Constant) and f"{node.value}".startswith("keras.src"):
            yield node.value, node.lineno


def is_below(name, prefixes):
    return any(f"{name}.".startswith((f"{prefix}.", f"{prefix}:")) for prefix in prefixes)


def violations(path, source):
    """What the module at `path`, relative to the package, does against the rules."""
    folder, parts = path.parts[:-1], path.with_suffix("").parts
    if SAY_NOTHING & {part.strip("_") for part in parts}:
        yield f"{path}: the name says nothing"
    here = parts[0]
    if here == "__init__":
        return
    if here not in LEVEL:
        yield f"{path}: {here!r} has no level; give it one in the table"
        return
    for name, line in references(ast.parse(source), folder):
        asks = f".{name}".endswith(tuple(f".{question}" for question in WHICH_BACKEND))
        home = FRAMEWORKS.get(name.split(".")[0])
        if home is not None and parts[:2] != ("backend", home):
            yield f"{path}:{line}: {name} outside backend/{home}/"
        if here not in ("backend", ROOM) and asks:
            yield f"{path}:{line}: {name} outside backend/"
        if here not in ("backend", "keras_state", ROOM) and is_below(name, [f"keras_gradtools.{ROOM}"]):
            yield f"{path}:{line}: {name} outside keras_state/ and backend/"
        if here != ROOM and is_below(name, ["keras.src"]):
            yield f"{path}:{line}: {name} outside {ROOM}/"
        package, _, rest = name.partition(".")
        there = rest.split(".")[0]
        if package == "keras_gradtools" and there != here and LEVEL.get(there, len(LEVELS)) >= LEVEL[here]:
            yield f"{path}:{line}: {name} is not below {here}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_keeps_the_rules(path):
    assert list(violations(path.relative_to(PACKAGE), path.read_text())) == []


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("tape/a.py", "def f():\n    import jax.numpy as jnp", "tape/a.py:2: jax.numpy outside backend/"),
        ("plots.py", "from torch import nn", "torch.nn outside backend/torch/"),
        ("backend/chunks.py", "import jax", "jax outside backend/jax/"),
        ("backend/torch/tape.py", "import jaxlib", "jaxlib outside backend/jax/"),
        ("tape/a.py", "from keras.src import tree", "keras.src.tree outside keras_internals/"),
        ("backend/jax/backend.py", "from keras.src import tree", "keras.src.tree outside keras_internals/"),
        ("backend/jax/backend.py", "find('keras.src.tree:flatten')", "keras.src.tree:flatten outside keras_internals/"),
        (
            "tape/a.py",
            "from keras_gradtools.keras_internals import layers",
            "keras_internals.layers outside keras_state/",
        ),
        ("keras_internals/scopes.py", "import torch", "torch outside backend/"),
        ("keras_internals/scopes.py", "from keras_gradtools.backend import base", "is not below keras_internals"),
        ("tape/a.py", "from keras import backend\nbackend.backend()", "tape/a.py:2: backend.backend outside backend/"),
        ("tape/a.py", "import keras\nkeras.backend.backend()", "keras.backend.backend outside backend/"),
        ("attacks/noise.py", "keras.config.backend() == 'jax'", "keras.config.backend outside backend/"),
        ("attacks/noise.py", "from keras.config import backend", "keras.config.backend outside backend/"),
        ("backend/jax/backend.py", "from keras_gradtools import tape", "keras_gradtools.tape is not below backend"),
        ("keras_state/a.py", "from keras_gradtools import backend", "keras_gradtools.backend is not below keras_state"),
        ("keras_state/a.py", "import torch", "torch outside backend/torch/"),
        ("keras_state/a.py", "import keras\nkeras.backend.backend()", "keras.backend.backend outside backend/"),
        ("tape/a.py", "from keras_gradtools.transforms.jacobians import f", "is not below tape"),
        ("tape/a.py", "from ..gradient_control.scale_gradient import f", "scale_gradient.f is not below tape"),
        ("transforms/jacobians.py", "from ..curvature import f", "keras_gradtools.curvature.f is not below transforms"),
        (
            "attacks/a.py",
            "from keras_gradtools import GradientTape",
            "keras_gradtools.GradientTape is not below attacks",
        ),
        ("attacks/a.py", "import keras_gradtools as kg", "keras_gradtools is not below attacks"),
        ("novelty.py", "", "'novelty' has no level"),
        ("backend/_utils.py", "", "the name says nothing"),
        ("misc/a.py", "", "the name says nothing"),
    ],
)
def test_a_breach_is_found(path, source, message):
    assert any(message in found for found in violations(pathlib.Path(path), source))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "backend/jax/backend.py",
            "import jax\nfrom keras_gradtools.keras_internals import layers\nfrom . import recording",
        ),
        ("keras_internals/scopes.py", "from keras.src import tree\nkeras.config.backend()"),
        ("keras_state/a.py", "from keras_gradtools.keras_internals import layers\nfrom keras_gradtools import blocks"),
        ("attacks/a.py", "from keras_gradtools.attacks import b\nfrom ..tape import GradientTape"),
        (
            "tape/a.py",
            "import keras\nfrom keras_gradtools import backend\nkeras.backend.standardize_dtype\nbackend.jit",
        ),
        ("__init__.py", "from keras_gradtools.tape.gradient_tape import GradientTape"),
    ],
)
def test_what_is_allowed_is_not_reported(path, source):
    assert list(violations(pathlib.Path(path), source)) == []
