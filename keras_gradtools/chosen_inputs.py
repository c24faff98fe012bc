"""Which inputs of a model to differentiate by; the others are carried along."""

import functools
from typing import NamedTuple

import keras

from keras_gradtools import nesting, validation

_INDICES = "Where they are indices, differentiate by the output of the embedding: take the part of the model after it."


class ChosenInputs(NamedTuple):
    """The positions of some inputs among all of them, flat: a key, so that programs can be kept by it."""

    positions: tuple
    total: int

    def parts(self, x):
        """The chosen inputs in a list."""
        leaves = nesting.flatten(x)
        return [leaves[i] for i in self.positions]

    def rest(self, x):
        """All others in a list."""
        return [leaf for i, leaf in enumerate(nesting.flatten(x)) if i not in self.positions]

    def filled(self, x, parts):
        """`x` with `parts` in the place of the chosen inputs."""
        leaves = nesting.flatten(x)
        for i, part in zip(self.positions, parts, strict=True):
            leaves[i] = part
        return nesting.pack_as(x, leaves)

    def packed(self, x, values):
        """`values`, one for each chosen input, nested as `x` is; None in the place of the others."""
        return self.places(x).pack(values)

    def places(self, x):
        """Where in `x` they are."""
        return nesting.Places(nesting.outline(x), tuple(i in self.positions for i in range(self.total)))

    def function(self, fun, x):
        """`fun` as a function of the chosen inputs alone, in a list."""
        # Keras refuses tensors and arrays side by side.
        x = as_tensors(x)

        @functools.wraps(fun, updated=())
        def of_chosen(parts, *args, **kwargs):
            return fun(self.filled(x, parts), *args, **kwargs)

        return of_chosen


def as_tensors(inputs, expected="An input of a model must be a tensor or an array"):
    """NumPy arrays as tensors; Keras does not convert what goes to a model's `call` everywhere.

    `expected` begins the `ValueError` for what has no numbers.
    """
    if not nesting.flatten(inputs):
        raise ValueError(f"{expected}. Received: {validation.shown(inputs)}.")
    return nesting.map_structure(lambda x: x if x is None else validation.as_tensor(x, expected), inputs)


def checked_choice(owner, names):
    """Returns `inputs` as a tuple of names and positions, or None for all; `ValueError` for anything else."""
    if names is None:
        return None
    given = names if isinstance(names, (list, tuple)) else [names]
    if not given or not all(isinstance(n, (str, int)) and not isinstance(n, bool) for n in given):
        raise ValueError(
            f"{owner} expects the name of an input, its position, or a list of these as `inputs`. Received: "
            f"inputs={validation.describe(names)}. None stands for all floating-point inputs."
        )
    return tuple(given)


def model_inputs(model):
    """What a model is known to take, nested as it takes it; None where it is only known by its calls."""
    if not getattr(model, "inputs", None):
        return None
    # A model of a graph has them in the user's own nesting.
    return model.inputs if isinstance(model, keras.Sequential) else model.input


def choose(owner, model, inputs, names, advice=_INDICES):
    """The `ChosenInputs` of those named, or of all that are floating-point.

    `names` are what `checked_choice` returned, and `advice` is for inputs that are indices.
    """
    leaves = nesting.flatten(inputs)
    if names is None:
        chosen = [i for i, x in enumerate(leaves) if _has_gradient(x)]
        if not chosen:
            raise no_gradient(owner, "inputs without a gradient", [x for x in leaves if x is not None], advice)
    else:
        chosen = _known(owner, _names(model, inputs, leaves), names)
        without = [leaves[i] for i in chosen if not _has_gradient(leaves[i])]
        if without:
            raise no_gradient(owner, f"inputs={list(names)!r}, of which some have no gradient", without, advice)
    return ChosenInputs(tuple(sorted(set(chosen))), len(leaves))


def choose_one(owner, model, inputs, names):
    """The same where there must be one."""
    chosen = choose(owner, model, inputs, names)
    if len(chosen.positions) > 1:
        tensors = ", ".join(validation.describe(x) for x in chosen.parts(inputs))
        raise ValueError(
            f"{owner} moves one floating-point input. Received: {len(chosen.positions)} of them, {tensors}. Choose one "
            "by `inputs`, its name or its position; the others stay as they are."
        )
    return chosen


def require_examples(owner, chosen, x, rank=1):
    """Raises `ValueError` unless the inputs fit together; returns the number of examples.

    The chosen ones have a batch axis, and a `rank` or more; the others have that batch axis, or none.
    """
    parts, rest = chosen.parts(x), [leaf for leaf in chosen.rest(x) if leaf is not None and len(leaf.shape)]
    sizes = {leaf.shape[0] for leaf in parts + rest if len(leaf.shape)}
    if len(sizes) != 1 or any(len(leaf.shape) < rank for leaf in parts):
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in parts + rest)
        raise ValueError(
            f"{owner} expects floating-point examples of shape (batch, ...){', of rank 2 or more' * (rank > 1)}, and "
            f"beside them inputs of that batch size or numbers. Received: the shapes {shapes}."
        )
    return sizes.pop()


def no_gradient(owner, received, tensors, advice=_INDICES):
    """The error where there is nothing to differentiate by."""
    return ValueError(
        f"{owner} differentiates by floating-point inputs. Received: {received}, "
        f"{', '.join(validation.describe(x) for x in tensors)}. Where the values are numbers, such as pixels, cast "
        f"them to 'float32' first. {advice}"
    )


def _known(owner, known, names):
    """The positions of the inputs of some names, out of the names of each."""
    chosen = []
    for name in names:
        found = [i for i, of in enumerate(known) if name in of]
        if not found:
            every = ", ".join(repr(next(iter(sorted(of, key=lambda n: isinstance(n, int))))) for of in known)
            raise ValueError(
                f"{owner} was given an input in `inputs` that the model does not have. "
                f"Received: {validation.shown(name)} of {every}."
            )
        chosen += found
    return chosen


def _names(model, inputs, leaves):
    """For each flat input what it can be called by: its key, the name of the model's input, its position."""
    symbolic = nesting.flatten(getattr(model, "inputs", None) or [])
    names: list[set] = [{i} for i in range(len(leaves))]
    for i, path in enumerate(nesting.paths(inputs)):
        names[i] |= {key for key in path if isinstance(key, str)}
        if len(symbolic) == len(leaves):
            names[i].add(symbolic[i].name)
    return names


def _has_gradient(x):
    if x is None or not hasattr(x, "dtype"):
        return isinstance(x, float)
    return keras.backend.is_float_dtype(validation.dtype_of(x))
