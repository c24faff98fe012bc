"""What the atlas tries: an operation or a layer, at a generic point and at awkward ones."""

import typing

import numpy as np


def words(text):
    """The names in a text."""
    return text.split()


class Case(typing.NamedTuple):
    """A function of floating-point tensors, and a point."""

    name: str
    kind: str
    fun: typing.Callable
    arrays: tuple

    @property
    def key(self):
        return f"{self.name} / {self.kind}"


def with_awkward_points(name, entries):
    """The cases of one row: each entry at its own point, and the first of them at the awkward ones."""
    for i, (fun, arrays) in enumerate(entries):
        arrays = tuple(np.asarray(x, "float64") for x in arrays)
        yield Case(name, "generic" if i == 0 else f"generic {i + 1}", fun, arrays)
    if entries:
        fun, arrays = entries[0]
        arrays = tuple(np.asarray(x, "float64") for x in arrays)
        yield Case(name, "zeros", fun, tuple(np.zeros_like(x) for x in arrays))
        yield Case(name, "ties", fun, tuple(np.full_like(x, np.round(x.flat[0], 1) or 0.5) for x in arrays))
        yield Case(name, "one element", fun, tuple(x[(slice(0, 1),) * x.ndim] for x in arrays))
        yield Case(name, "empty", fun, tuple(x[:0] if x.ndim else x for x in arrays))
