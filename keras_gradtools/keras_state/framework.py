"""What this folder needs from the framework. The adapters above it provide it, so that nothing here imports them."""

from typing import Any

_kernels: Any = None


def use(kernels):
    """Takes the object whose methods `eagerly` and `can_make_variables` are used here, see `backend.base.Backend`."""
    global _kernels
    _kernels = kernels


def eagerly():
    """A block that runs eagerly, even inside a trace."""
    return _kernels.eagerly()


def can_make_variables():
    """Whether variables can be created here."""
    return _kernels.can_make_variables()
