"""Which inputs of a model to differentiate by."""

import keras
from keras import ops

from keras_gradtools import nesting, validation
from keras_gradtools.regularization.penalty import no_gradient


def as_tensors(inputs):
    """NumPy arrays as tensors; Keras does not convert what goes to a model's `call` everywhere."""
    expected = "An input whose gradient is penalized must be a tensor or an array"
    return nesting.map_structure(
        lambda x: x if x is None or ops.is_tensor(x) else validation.as_tensor(x, expected), inputs
    )


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


def chosen_positions(owner, model, inputs, names):
    """The positions among the flat `inputs` of those named, or of all with a derivative."""
    leaves = nesting.flatten(inputs)
    if names is None:
        chosen = [i for i, x in enumerate(leaves) if x is not None and _has_gradient(x)]
        if not chosen:
            raise no_gradient(owner, "inputs without a gradient", [x for x in leaves if x is not None])
        return chosen
    known = _names(model, inputs, leaves)
    chosen = _known(owner, known, names)
    without = [leaves[i] for i in chosen if leaves[i] is None or not _has_gradient(leaves[i])]
    if without:
        raise no_gradient(owner, f"inputs={list(names)!r}, of which some have no gradient", without)
    return sorted(set(chosen))


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
    symbolic = keras.tree.flatten(getattr(model, "inputs", None) or [])
    names: list[set] = [{i} for i in range(len(leaves))]
    for i, (path, _) in enumerate(keras.tree.flatten_with_path(inputs)):
        names[i] |= {key for key in path if isinstance(key, str)}
        if len(symbolic) == len(leaves):
            names[i].add(symbolic[i].name)
    return names


def _has_gradient(x):
    return keras.backend.is_float_dtype(validation.dtype_of(x))
