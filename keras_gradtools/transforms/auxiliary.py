"""The auxiliary output of a function, with `has_aux`: a nested structure of tensors and other values."""

from keras import ops

from keras_gradtools import nesting, validation


class _Tensor:
    """Takes the place of a tensor."""


_TENSOR = _Tensor()


def split(name, returned):
    """Returns `(value, aux)`. Raises `ValueError` if the function under `name` did not return a pair."""
    if isinstance(returned, (tuple, list)) and len(returned) == 2:
        return returned
    raise ValueError(
        f"With has_aux=True, the function under `{name}` must return a pair `(value, aux)`. Received: "
        f"{validation.describe(returned)}."
    )


def held(aux):
    """`aux` with its variables replaced by copies of their values, because a variable may change later."""
    return nesting.map_structure(lambda x: ops.copy(x) if validation.is_any_variable(x) else x, aux)


def take_apart(aux):
    """The tensors of `aux`, which a compiled program can return, and the rest, which is known after tracing."""
    leaves = nesting.flatten(aux)
    tensors = [x for x in leaves if ops.is_tensor(x)]
    return tensors, (nesting.outline(aux), [_TENSOR if ops.is_tensor(x) else x for x in leaves])


def put_together(tensors, rest):
    """The inverse of `take_apart`."""
    given, (outline, leaves) = iter(tensors), rest
    return outline.pack([next(given) if x is _TENSOR else x for x in leaves])
