"""What a function returns beside its value, with `has_aux`: any nesting of tensors and of anything else."""

from keras import ops

from keras_gradtools import nesting, validation


class _Tensor:
    """In the place of a tensor."""


_TENSOR = _Tensor()


def split(name, returned):
    """Returns `(value, aux)`, and raises `ValueError` if the function under `name` has returned no such pair."""
    if isinstance(returned, (tuple, list)) and len(returned) == 2:
        return returned
    raise ValueError(
        f"With has_aux=True, the function under `{name}` must return a pair `(value, aux)`. Received: "
        f"{validation.describe(returned)}."
    )


def held(aux):
    """`aux`, with the values that variables have now in their place: a backend may hand out what changes later."""
    return nesting.map_structure(lambda x: ops.copy(x) if validation.is_any_variable(x) else x, aux)


def take_apart(aux):
    """The tensors of `aux`, which a compiler can return, and the rest of it, which Python knows once it was traced."""
    leaves = nesting.flatten(aux)
    tensors = [x for x in leaves if ops.is_tensor(x)]
    return tensors, (nesting.outline(aux), [_TENSOR if ops.is_tensor(x) else x for x in leaves])


def put_together(tensors, rest):
    """What `take_apart` has taken apart."""
    given, (outline, leaves) = iter(tensors), rest
    return outline.pack([next(given) if x is _TENSOR else x for x in leaves])
