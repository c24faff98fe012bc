"""Which inputs of a model to differentiate with respect to. The others are passed on unchanged."""

import functools
from typing import NamedTuple

import keras

from keras_gradtools import nesting, validation

_EMBEDDINGS = (
    "If they are indices, differentiate with respect to the embedding's output: use the part of the model after it."
)


class ChosenInputs(NamedTuple):
    """The positions of the chosen inputs in the flat list of all inputs. Hashable, for use in the cache of programs."""

    positions: tuple
    total: int

    def parts(self, x):
        """The chosen inputs as a list."""
        leaves = nesting.flatten(x)
        return [leaves[i] for i in self.positions]

    def rest(self, x):
        """All other inputs as a list."""
        return [leaf for i, leaf in enumerate(nesting.flatten(x)) if i not in self.positions]

    def filled(self, x, parts):
        """`x` with the chosen inputs replaced by `parts`."""
        leaves = nesting.flatten(x)
        for i, part in zip(self.positions, parts, strict=True):
            leaves[i] = part
        return nesting.pack_as(x, leaves)

    def packed(self, x, values):
        """`values`, one for each chosen input, in the structure of `x`, with None for the other inputs."""
        return self.places(x).pack(values)

    def places(self, x):
        """The `Places` of the chosen inputs in `x`."""
        return nesting.Places(nesting.outline(x), tuple(i in self.positions for i in range(self.total)))

    def function(self, fun, x):
        """`fun` as a function of a list of the chosen inputs alone."""
        # Keras refuses a mix of tensors and arrays.
        x = as_tensors(x)

        @functools.wraps(fun, updated=())
        def of_chosen(parts, *args, **kwargs):
            return fun(self.filled(x, parts), *args, **kwargs)

        return of_chosen


def as_tensors(inputs, expected="An input of a model must be a tensor or an array"):
    """Converts NumPy arrays to tensors, because Keras does not do so in every call of a model.

    The `ValueError` for values that are not numeric begins with `expected`.
    """
    if not nesting.flatten(inputs):
        raise ValueError(f"{expected}. Received: {validation.shown(inputs)}.")
    return nesting.map_structure(lambda x: x if x is None else validation.as_tensor(x, expected), inputs)


def require_names(owner, names):
    """Returns the argument `inputs` as a tuple of names and positions, or None for all inputs.

    Raises `ValueError` for anything else.
    """
    if names is None:
        return None
    given = names if isinstance(names, (list, tuple)) else [names]
    if not given or not all(isinstance(n, (str, int)) and not isinstance(n, bool) for n in given):
        expected = "the name of an input, its position, or a list of these"
        raise validation.refused(owner, expected, "inputs", names, "None stands for all floating-point inputs.")
    return tuple(given)


def model_inputs(model):
    """The symbolic inputs of a model in the structure that it takes, or None if the model does not declare any."""
    if not getattr(model, "inputs", None):
        return None
    # For a functional model, `input` has the user's structure and `inputs` is flat.
    return model.inputs if isinstance(model, keras.Sequential) else model.input


def choose(owner, model, inputs, names, advice=_EMBEDDINGS):
    """The `ChosenInputs` for `names` (from `require_names`), or for all floating-point inputs if it is None.

    An error message about inputs without a gradient ends with `advice`.
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
    """As `choose`, but raises `ValueError` if more than one input is chosen."""
    chosen = choose(owner, model, inputs, names)
    if len(chosen.positions) > 1:
        tensors = ", ".join(validation.describe(x) for x in chosen.parts(inputs))
        raise ValueError(
            f"{owner} perturbs one floating-point input. Received: {len(chosen.positions)} of them, {tensors}. Choose "
            "one by `inputs`, with its name or its position. The others stay as they are."
        )
    return chosen


def require_batch_size(owner, chosen, x, rank=1):
    """Returns the batch size, and raises `ValueError` unless all inputs agree on it.

    The chosen inputs must have a batch axis and at least the given rank. The others must have the same batch axis, or
    be scalars.
    """
    parts, rest = chosen.parts(x), [leaf for leaf in chosen.rest(x) if leaf is not None and len(leaf.shape)]
    sizes = {leaf.shape[0] for leaf in parts + rest if len(leaf.shape)}
    if len(sizes) != 1 or any(len(leaf.shape) < rank for leaf in parts):
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in parts + rest)
        raise ValueError(
            f"{owner} expects floating-point examples of shape (batch, ...){', of rank 2 or more' * (rank > 1)}. Other "
            f"inputs must have the same batch size or be scalars. Received: the shapes {shapes}."
        )
    return sizes.pop()


def no_gradient(owner, received, tensors, advice=_EMBEDDINGS):
    """The error for inputs that have no gradient."""
    return ValueError(
        f"{owner} differentiates with respect to floating-point inputs. Received: {received}, "
        f"{', '.join(validation.describe(x) for x in tensors)}. If the values are quantities, such as pixels, cast "
        f"them to 'float32' first. {advice}"
    )


def _known(owner, known, names):
    """The positions of the inputs with the given `names`. `known` holds the set of names of each input."""
    chosen = []
    for name in names:
        found = [i for i, of in enumerate(known) if name in of]
        if not found:
            every = ", ".join(repr(next(iter(sorted(of, key=lambda n: isinstance(n, int))))) for of in known)
            raise ValueError(
                f"{owner} was given an input in `inputs` that the model does not have. "
                f"Received: {validation.shown(name)}. The inputs are {every}."
            )
        chosen += found
    return chosen


def _names(model, inputs, leaves):
    """The names of each flat input: its dict keys, the name of the model's input, and its position."""
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
