"""What is measured. One function is one row: what our code computes.

The function is given a model and returns what is timed, a function of the inputs and labels. The function
of the same name in `reference_BACKEND.py` is the hand-written code that it is compared with.
A file of rows that is added here is measured, checked and reported with nothing else to change.
"""

import dataclasses
import importlib
from collections.abc import Callable

# In the order of the tables.
FILES = ("gradients", "double_backward", "batch_jacobian", "bare_tape", "eager_tape", "regularized_step")

# Ours over hand-written code, where issue 2 asks for a bound: wherever the framework has compiled it, and
# on torch, which has no compiler here, eagerly.
BOUNDS = {
    ("tensorflow", "compiled"): 1.05,
    ("tensorflow", "XLA"): 1.05,
    ("jax", "compiled"): 1.05,
    ("torch", "eager"): 1.10,
}


@dataclasses.dataclass
class Row:
    """One line of the table for every model and mode that it is measured in."""

    name: str
    ours: Callable
    batches: dict  # by the name of the model: the batch sizes to measure at
    reference: str
    modes: tuple
    backends: tuple
    target: float | None
    grow: bool
    check: bool

    def bound(self, backend, mode):
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
):
    """Adds the decorated function to the table.

    `grow` doubles the batch until the hand-written code takes long enough to be compared; `check=False`
    says that the two compute different things. A mode that a framework does not have is left out there.
    """

    def add(ours):
        sizes = {model: size if isinstance(size, tuple) else (size,) for model, size in batches.items()}
        _rows.append(Row(name, ours, sizes, ours.__name__, modes, backends, target, grow, check))
        return ours

    return add


def rows_of(backend, containing=""):
    modules = [importlib.import_module(f"benchmarks.rows.{file}").__name__ for file in FILES]
    found = [r for r in _rows if backend in r.backends and containing in r.name]
    return sorted(found, key=lambda r: modules.index(r.ours.__module__))
