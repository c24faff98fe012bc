"""A function call recorded by a tape, on which every transform is built."""

import math

import keras
import numpy as np
from keras import ops

from keras_gradtools import backend, nesting, validation
from keras_gradtools.blocks import Block
from keras_gradtools.keras_state.layer_state import with_keras_mask_of
from keras_gradtools.keras_state.scopes import StateScope, read
from keras_gradtools.tape import vectors
from keras_gradtools.transforms import auxiliary


class TapedCall:
    """One call of a function, recorded so that it can be differentiated with respect to some of its arguments.

    These arguments are passed as aliases, so the same tensor given twice counts as two arguments. Assignments to
    variables during the call (BatchNormalization's statistics, the state of a dropout seed) are discarded, and so are
    the losses that it adds to layers.

    It uses the kernels of the backend directly, because it does not need the checks of a `GradientTape`. `operations`
    is a block of `backend.operations`, if the call will be taken apart into steps.

    Attributes:
        tape: The backend's tape that recorded the call.
        sources: The argument to differentiate with respect to, or a tuple of arguments if `argnums` is a tuple.
        target: What the function returned, as the tape knows it. Without `aux` if `has_aux`.
        flat_sources, flat_targets: The tensors in `sources` and `target` that have a derivative.
        value: The target, in the form that is returned to the caller.
        aux: The auxiliary output if `has_aux`, in the form that is returned to the caller.
    """

    def __init__(self, name, fun, args, kwargs=None, argnums=0, has_aux=False, operations=None):
        args = list(args)
        positions = argument_positions(name, argnums, len(args))
        for i in positions:
            args[i] = differentiable_argument(name, i, args[i])
        chosen = tuple(args[i] for i in positions)
        self.sources = chosen if isinstance(argnums, (tuple, list)) else chosen[0]
        self.flat_sources = vectors.differentiable(self.sources)
        self.tape = backend.Tape(watch_accessed_variables=False)
        scope, tape = StateScope(), self.tape
        block = operations or Block()
        with scope, scope, tape, tape, block, block:
            for x in self.flat_sources:
                tape.watch(x)
            returned = fun(*args, **(kwargs or {}))
            target, aux = auxiliary.split(name, returned) if has_aux else (returned, None)
            self.target, self._aux = nesting.map_structure(as_result, target), auxiliary.held(aux)
            leaves = nesting.flatten(self.target)
            tape.note_results(leaves)
        validation.require_some_differentiable(leaves, f"What the function under `{name}` returns")
        self.flat_targets = vectors.differentiable(self.target)

    @property
    def value(self):
        return _as_returned(self.target)

    @property
    def aux(self):
        return _as_returned(self._aux)

    def vjp(self, cotangents=None, is_last=False):
        """The gradient with respect to the sources, zeros where unconnected. `is_last`: no derivative follows it."""
        cotangents = vectors.like(cotangents, self.target, "output_gradients", "`target`", vectors.ones)
        self.tape.keeps_graph = not is_last
        found = backend.pullback(self.tape, self.flat_targets, self.flat_sources, cotangents)
        return vectors.pack_as(self.sources, _filled(found, self.flat_sources))

    def jvp(self, tangents):
        """The derivative of the target along `tangents`, with zeros where unconnected."""
        tangents = vectors.like(tangents, self.sources, "tangents", "`primals`", vectors.zeros)
        found = backend.pushforward(self.tape, self.flat_targets, self.flat_sources, tangents)
        return vectors.pack_as(self.target, _filled(found, self.flat_targets))

    def linearize(self, is_symmetric=False):
        """Returns `jvp` as a function. The work that does not depend on the tangents is done here, once.

        `is_symmetric` says that the target has the structure of the sources, and that the Jacobian is symmetric.
        """
        linear = backend.linearize(self.tape, self.flat_targets, self.flat_sources, is_symmetric)

        def jvp(tangents):
            tangents = vectors.like(tangents, self.sources, "tangents", "`primals`", vectors.zeros)
            return vectors.pack_as(self.target, _filled(linear(tangents), self.flat_targets))

        return jvp


def require_function(name, fun):
    """Raises `ValueError` unless `fun` can be called."""
    if not callable(fun):
        raise ValueError(f"{name} takes a function. Received: {validation.describe(fun)}.")


def is_scalar(value):
    """Whether `value`, a nested structure of tensors, is a single tensor of rank 0."""
    return not nesting.is_nested(value) and not len(getattr(value, "shape", ()))


def require_scalar(name, value):
    """Raises `ValueError` unless `value` is one tensor of rank 0."""
    if not is_scalar(value):
        what = validation.describe(value) if not nesting.is_nested(value) else f"a {type(value).__name__}"
        raise ValueError(
            f"The function under `{name}` must return one scalar. Received: {what}. Reduce it with "
            "`keras.ops.sum`, or use `jacobian` for the derivative of each element."
        )


def differentiable_argument(name, position, x):
    """Returns argument `x` with each leaf that can have a derivative replaced by a tensor, an alias of it.

    Leaves of a kind that has no derivative stay unchanged. Raises `ValueError` if there are no others, or if a leaf
    is of neither kind.
    """
    leaves = nesting.flatten(x)
    constant = list(map(validation.is_constant, leaves))
    if all(constant):
        constant = [False] * len(leaves)  # makes the first of them raise the error below
    pairs = zip(leaves, constant, strict=True)
    return nesting.pack_as(
        x, [_constant(leaf) if c else _differentiable_leaf(name, position, leaf) for leaf, c in pairs]
    )


def _constant(x):
    # Keras refuses a mix of tensors and arrays.
    is_array = isinstance(x, np.ndarray) and x.dtype.kind in "iub"
    return ops.convert_to_tensor(x) if is_array else read(x)


def _differentiable_leaf(name, position, x):
    x = read(x)
    if not ops.is_tensor(x):
        if x is None or isinstance(x, (str, keras.KerasTensor)):
            validation.require_differentiable(x, f"Argument {position} under `{name}`")
        dtype = keras.config.floatx() if isinstance(x, float) else None
        x = validation.as_tensor(x, f"Argument {position} under `{name}` must be a tensor", dtype, True)
    validation.require_differentiable(x, f"Argument {position} under `{name}`")
    validation.require_dense([x], f"Argument {position} under `{name}`")
    return with_keras_mask_of(backend.alias(x), x)


def as_result(x):
    """A returned value, converted to a tensor if it is a floating-point number, array or variable."""
    x = read(x)
    if isinstance(x, float) and not hasattr(x, "dtype"):
        return ops.convert_to_tensor(x, dtype=keras.config.floatx())
    is_array = isinstance(x, (np.ndarray, np.floating)) and validation.dtype_of(x).startswith(("float", "bfloat"))
    return ops.convert_to_tensor(x) if is_array else x


def require_points(name, x):
    """Returns `x` as a tensor of shape `(batch, n)`. Raises `ValueError` for another shape, or an unknown n."""
    x = validation.as_tensor(x, f"{name} expects an input of shape (batch, n)")
    if len(x.shape) != 2 or not x.shape[1]:
        raise ValueError(
            f"{name} expects an input of shape (batch, n), with n known and not 0. Received: {validation.describe(x)}."
        )
    return x


_POSITIONS = "the position of an argument, or a tuple of different positions,"


def require_argnums(name, argnums):
    """Raises `ValueError` unless `argnums` is a position or several positions, whatever the number of arguments."""
    chosen = argnums if isinstance(argnums, (tuple, list)) else (argnums,)
    if not all(validation.is_count(i, -math.inf) for i in chosen):
        advice = f"`{name}` returns a function of the arguments: `{name}(fun)(x)`."
        raise validation.refused(name, _POSITIONS, "argnums", argnums, advice)


def argument_positions(name, argnums, count):
    """Returns `argnums` as a list of non-negative positions. Raises `ValueError` for invalid or repeated positions."""
    chosen = argnums if isinstance(argnums, (tuple, list)) else (argnums,)
    right = chosen and all(validation.is_count(i, -count) and i < count for i in chosen)
    if not right or len({i % count for i in chosen}) < len(chosen):
        advice = f"The call has {count} positional arguments."
        if count == 0:
            advice += (
                " Pass what to differentiate with respect to as an argument of the function. For the weights of a "
                "model, use `kg.functionalize`."
            )
        raise validation.refused(name, _POSITIONS, "argnums", argnums, advice)
    return [i % count for i in chosen]


def _filled(derivatives, like):
    return [vectors.zeros(x) if d is None else d for d, x in zip(derivatives, like, strict=True)]


def _as_returned(structure):
    """The structure with its tensors in the form that is returned to the caller."""
    tensors, rest = auxiliary.take_apart(structure)
    return auxiliary.put_together(backend.settled(tensors), rest)
