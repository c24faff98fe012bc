"""What is measured. One function is one row: what our code computes.

The function is given a model and returns what is timed, a function of the inputs and labels. The function
of the same name in `reference_BACKEND.py`, `reference_BACKEND_transforms.py` or `reference_BACKEND_steps.py`
is the hand-written code that it is compared with, unless `reference` names another.
A file of rows that is added here is measured, checked and reported with nothing else to change.
"""

import dataclasses
import importlib
from collections.abc import Callable

# The files of rows in the order of the tables, by the part of the benchmarks that they belong to. A part is
# measured, and its result kept, whole.
PARTS = {
    "gradients": (
        "gradients",
        "double_backward",
        "batch_jacobian",
        "bare_tape",
        "eager_tape",
        "regularized_step",
        "jacobians",
        "hessians",
        "products",
        "over_one_gradient",
        "guide",
        "order_of_modes",
    ),
    "curvature": ("curvature",),
}

# The modes of a row that is about compiled code, and of one whose transform compiles by itself: on torch,
# which has no compiler here, both run eagerly.
COMPILED = {"tensorflow": ("compiled",), "jax": ("compiled",), "torch": ("eager",)}
SELF_COMPILED = {"tensorflow": ("self-compiled",), "jax": ("self-compiled",), "torch": ("eager",)}

# Below this the fixed costs, which are reported apart, would count for more than the computation.
LEAST_MS = 5.0

# Ours over hand-written code, where issue 2 asks for a bound: wherever the framework has compiled it, and
# on torch, which has no compiler here, eagerly.
BOUNDS = {
    ("tensorflow", "compiled"): 1.05,
    ("tensorflow", "XLA"): 1.05,
    ("tensorflow", "self-compiled"): 1.05,
    ("jax", "compiled"): 1.05,
    ("jax", "self-compiled"): 1.05,
    ("torch", "eager"): 1.10,
}


@dataclasses.dataclass
class Row:
    """One line of the table for every model and mode that it is measured in."""

    name: str
    ours: Callable
    batches: dict  # by the name of the model: the batch sizes to measure at
    reference: str | Callable
    modes: tuple | dict
    backends: tuple
    target: float | dict | None
    grow: bool
    check: bool
    tolerance: float
    least_ms: float
    compiles: bool

    def modes_on(self, backend):
        return self.modes[backend] if isinstance(self.modes, dict) else self.modes

    def bound(self, backend, mode):
        if isinstance(self.target, dict):
            return self.target.get(backend)
        return self.target if self.target is not None else BOUNDS.get((backend, mode))


_rows = []


def row(
    name,
    batches,
    modes=("eager", "compiled", "XLA"),
    backends=("tensorflow", "jax", "torch"),
    target=None,
    grow=True,
    check=True,
    tolerance=1e-3,
    least_ms=LEAST_MS,
    compiles=False,
    reference=None,
):
    """Adds the decorated function to the table.

    `grow` doubles the batch until the hand-written code takes `least_ms`; `check=False` says that the two
    compute different things, otherwise they must agree to `tolerance` times the largest entry. A mode that a
    framework does not have is left out there. `modes` and `target` may depend on the backend, as dicts; a
    backend that `target` lacks has none.

    `compiles` says that the function takes the compiler too, as the hand-written code does, and compiles what
    it returns: so a row passes more than inputs and labels to compiled code. `reference` is the name of the
    hand-written code, or a function of the same kind, for a row that compares two ways with one another.
    """

    def add(ours):
        sizes = {model: size if isinstance(size, tuple) else (size,) for model, size in batches.items()}
        against = reference or ours.__name__
        _rows.append(
            Row(name, ours, sizes, against, modes, backends, target, grow, check, tolerance, least_ms, compiles)
        )
        return ours

    return add


def rows_of(backend, part, containing=""):
    modules = [importlib.import_module(f"benchmarks.rows.{file}").__name__ for file in PARTS[part]]
    found = [r for r in _rows if r.ours.__module__ in modules and backend in r.backends and containing in r.name]
    return sorted(found, key=lambda r: modules.index(r.ours.__module__))


def with_preparation(prepare):
    """Returns a function of `x, y` that calls `prepare(x, y)` the first time, and only what that returned from then on.

    For what is not to be timed: the evaluation before many products at one point.
    """
    prepared = []

    def run(x, y):
        if not prepared:
            prepared.append(prepare(x, y))
        return prepared[0]()

    return run
