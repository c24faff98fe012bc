"""Running a function once under a tape: what every transform begins with."""

import math

import keras
import numpy as np
from keras import ops

from keras_gradtools import backend, nesting, validation, vectors
from keras_gradtools.backend.state import StateScope
from keras_gradtools.transforms import auxiliary


class TapedCall:
    """One call of a function, recorded as a function of some of its arguments.

    Those arguments are passed on as aliases, so that the same tensor given twice is two arguments. What the
    call assigns to variables (BatchNormalization's statistics, the state of a dropout seed) is dropped, and
    no loss that it adds to a layer is left there.

    It goes by the kernels of the backend: what a `GradientTape` checks at each call is known here.

    Attributes:
        record: the backend's tape, which recorded the call.
        sources: the arguments to differentiate by: one of them, or a tuple of them if `argnums` is a tuple.
        target: what the function returned, as the tape knows it; without `aux`, if `has_aux`.
        flat_sources, flat_targets: the tensors in these that have a derivative.
        value: the target for the caller.
        aux: the second part of what it returned, if `has_aux`.
    """

    def __init__(self, name, fun, args, kwargs=None, argnums=0, has_aux=False):
        args = list(args)
        positions = argument_positions(name, argnums, len(args))
        for i in positions:
            args[i] = differentiable_argument(name, i, args[i])
        chosen = tuple(args[i] for i in positions)
        self.sources = chosen if isinstance(argnums, (tuple, list)) else chosen[0]
        self.flat_sources = vectors.differentiable(self.sources)
        self.record = backend.Tape(watch_accessed_variables=False)
        scope, record = StateScope(), self.record
        with scope, scope, record, record:
            for x in self.flat_sources:
                self.record.watch(x)
            returned = fun(*args, **(kwargs or {}))
            target, aux = auxiliary.split(name, returned) if has_aux else (returned, None)
            self.target, self._aux = nesting.map_structure(as_result, target), auxiliary.held(aux)
            leaves = nesting.flatten(self.target)
            self.record.note_results(leaves)
        validation.require_some_differentiable(leaves, f"What the function under `{name}` returns")
        self.flat_targets = vectors.differentiable(self.target)

    @property
    def value(self):
        return _settled(self.target)

    @property
    def aux(self):
        return _settled(self._aux)

    def pull(self, cotangents=None, is_last=False):
        """The gradient by the sources, zeros where nothing is connected; no other derivative follows if `is_last`."""
        cotangents = vectors.like(cotangents, self.target, "output_gradients", "`target`", vectors.ones)
        self.record.keeps_graph = not is_last
        pulled = backend.pullback(self.record, self.flat_targets, self.flat_sources, cotangents)
        return vectors.pack_as(self.sources, _filled(pulled, self.flat_sources))

    def push(self, tangents):
        """The derivative of the target along `tangents`, zeros where nothing is connected."""
        tangents = vectors.like(tangents, self.sources, "tangents", "`primals`", vectors.zeros)
        pushed = backend.pushforward(self.record, self.flat_targets, self.flat_sources, tangents)
        return vectors.pack_as(self.target, _filled(pushed, self.flat_targets))

    def linearize(self, is_symmetric=False):
        """`push` as a function of its own, with all the work done that no tangent is needed for.

        `is_symmetric` if target and sources have one structure, and the Jacobian is its own transpose.
        """
        push = backend.linearize(self.record, self.flat_targets, self.flat_sources, is_symmetric)

        def pushforward(tangents):
            tangents = vectors.like(tangents, self.sources, "tangents", "`primals`", vectors.zeros)
            return vectors.pack_as(self.target, _filled(push(tangents), self.flat_targets))

        return pushforward


def require_function(name, fun):
    """Raises `ValueError` unless `fun` can be called."""
    if not callable(fun):
        raise ValueError(f"{name} takes a function. Received: {validation.describe(fun)}.")


def is_scalar(value):
    """Whether `value`, which tensors are in, is one tensor of rank 0."""
    return not nesting.is_nested(value) and not len(getattr(value, "shape", ()))


def require_scalar(name, value):
    """Raises `ValueError` unless `value` is one tensor of rank 0."""
    if not is_scalar(value):
        what = validation.describe(value) if not nesting.is_nested(value) else f"a {type(value).__name__}"
        raise ValueError(
            f"The function under `{name}` must return one scalar. Received: {what}. Sum it up, with "
            "`keras.ops.sum`, or use `jacobian` for the derivative of each element."
        )


def differentiable_argument(name, position, x):
    """Returns argument `x` with an alias, as a tensor, for each leaf that has a derivative.

    What has none by its kind stays as it is. `ValueError` if there is nothing else, or what cannot be told.
    """
    leaves = nesting.flatten(x)
    constant = list(map(validation.is_constant, leaves))
    if all(constant):
        constant = [False] * len(leaves)  # each of them is refused
    pairs = zip(leaves, constant, strict=True)
    return nesting.pack_as(
        x, [_constant(leaf) if c else _differentiable_leaf(name, position, leaf) for leaf, c in pairs]
    )


def _constant(x):
    # Keras refuses tensors and arrays side by side.
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
    return backend.alias(x)


def as_result(x):
    """What a function returned, as a tensor where it is a number that could have depended on its arguments."""
    x = read(x)
    if isinstance(x, float) and not hasattr(x, "dtype"):
        return ops.convert_to_tensor(x, dtype=keras.config.floatx())
    is_array = isinstance(x, (np.ndarray, np.floating)) and validation.dtype_of(x).startswith(("float", "bfloat"))
    return ops.convert_to_tensor(x) if is_array else x


def require_argnums(name, argnums):
    """Raises `ValueError` unless `argnums` is a position or several, whatever the arguments."""
    chosen = argnums if isinstance(argnums, (tuple, list)) else (argnums,)
    if not all(validation.is_count(i, -math.inf) for i in chosen):
        raise ValueError(
            f"The argnums of `{name}` must be the position of an argument, or a tuple of different positions. "
            f"Received: argnums={validation.shown(argnums)}."
        )


def argument_positions(name, argnums, count):
    """The positions, from 0 on, that `argnums` names; raises `ValueError` for what is no position, or one twice."""
    chosen = argnums if isinstance(argnums, (tuple, list)) else (argnums,)
    right = chosen and all(validation.is_count(i, -count) and i < count for i in chosen)
    if not right or len({i % count for i in chosen}) < len(chosen):
        raise ValueError(
            f"The argnums of `{name}` must be the position of an argument, or a tuple of different positions, of "
            f"which the call has {count}. Received: argnums={validation.shown(argnums)}."
        )
    return [i % count for i in chosen]


def read(x):
    """The value that a variable has here, a stateless scope's if one lends it another; anything else as it is."""
    return ops.convert_to_tensor(x.value) if validation.is_variable(x) else x


def _filled(derivatives, like):
    return [vectors.zeros(x) if d is None else d for d, x in zip(derivatives, like, strict=True)]


def _settled(structure):
    tensors, rest = auxiliary.take_apart(structure)
    return auxiliary.put_together(backend.settled(tensors), rest)
