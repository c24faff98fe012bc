"""The rows of the benchmark: one function for each.

The function takes a model and returns the function to time, which takes the inputs and labels. It is compared with the
hand-written function of the same name in `hand_written/BACKEND.py`, `hand_written/BACKEND_transforms.py` or
`hand_written/BACKEND_steps.py`, unless `reference` names another one. A new file of rows only has to be listed in
`PARTS` to be measured, checked and reported.
"""

import dataclasses
import importlib
from collections.abc import Callable

# The files of rows of each part of the benchmarks, in the order of the tables. A part is measured and saved as a whole.
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

# The modes of rows about compiled code, of rows whose transform compiles itself, and of training steps.
BY_INDUCTOR = ("inductor", "inductor, both")
COMPILED = {"tensorflow": ("compiled",), "jax": ("compiled",), "torch": ("eager", "replayed", *BY_INDUCTOR)}
SELF_COMPILED = {
    "tensorflow": ("self-compiled",),
    "jax": ("self-compiled",),
    "torch": ("self-compiled", *BY_INDUCTOR),
}
FIT = ("fit", "fit, replayed", "fit, inductor", "fit, inductor, both")
# In these, the hand-written code is eager and ours is compiled, so that a target for the overhead has no meaning.
OVER_EAGER = ("replayed", "inductor", "fit, replayed", "fit, inductor")

# In shorter runs, the fixed costs, which are reported separately, would dominate.
LEAST_MS = 5.0

# The default targets for our time over that of hand-written code.
BOUNDS = {
    ("tensorflow", "compiled"): 1.05,
    ("tensorflow", "XLA"): 1.05,
    ("tensorflow", "self-compiled"): 1.05,
    ("jax", "compiled"): 1.05,
    ("jax", "self-compiled"): 1.05,
    ("torch", "eager"): 1.10,
    ("torch", "self-compiled"): 1.10,
    ("torch", "inductor, both"): 1.05,
    ("torch", "fit, inductor, both"): 1.05,
}


@dataclasses.dataclass
class Row:
    """A benchmark with one line in the table for each model, batch size and mode."""

    name: str
    ours: Callable
    batches: dict  # from model names to batch sizes
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
        if mode in OVER_EAGER:
            return None
        if isinstance(self.target, dict):
            return self.target.get((backend, mode), self.target.get(backend))
        return self.target if self.target is not None else BOUNDS.get((backend, mode))


_rows = []


def row(
    name,
    batches,
    modes=("eager", "compiled", "XLA", "replayed", *BY_INDUCTOR),
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

    `grow` doubles the batch until the hand-written code takes `least_ms`. Both results must agree to `tolerance` times
    the largest entry, unless `check=False`, for rows that compare different computations. Modes that a framework does
    not have are skipped. `modes` and `target` may be dicts by backend. A backend that is missing in `target` has none.
    A pair of a backend and a mode comes before the backend.

    With `compiles`, the function also takes the compiler, as the hand-written code does, and compiles what it returns,
    so that it can pass more than inputs and labels to compiled code. In the modes of `FIT`, it takes `jit_compile`.
    `reference` is the name of the hand-written function, or a function like the decorated one, for a row that compares
    two of our own ways.
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
    """Returns a function of `x, y` that calls `prepare(x, y)` once, and then only the function that this returned.

    It excludes preparations from the timing, such as the linearization before many products at one point.
    """
    prepared = []

    def run(x, y):
        if not prepared:
            prepared.append(prepare(x, y))
        return prepared[0]()

    return run
