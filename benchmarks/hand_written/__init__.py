"""What the package is compared with: the same derivatives, written by hand for each framework."""

import importlib

import keras


def module(kind=""):
    """The hand-written code for the current backend; `kind` is "", "_transforms" or "_steps"."""
    return importlib.import_module(f"benchmarks.hand_written.{keras.backend.backend()}{kind}")


def function(name):
    """The hand-written function `name` for the current backend."""
    for kind in ("", "_transforms", "_steps"):
        if hasattr(module(kind), name):
            return getattr(module(kind), name)
    raise LookupError(f"There is no hand-written {name!r} for {keras.backend.backend()}.")


def twin(model, mode):
    """The model for the hand-written code: where this is to be the fastest that we know, one without Keras."""
    find = getattr(module(), "twin", None)
    return find(model, mode) if find else model


def comparable(results):
    """Results of hand-written code, in the layout of Keras."""
    find = getattr(module(), "comparable", None)
    return find(results) if find else results
