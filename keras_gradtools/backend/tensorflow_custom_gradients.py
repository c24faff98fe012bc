"""Functions that TensorFlow differentiates by their arguments alone: `tf.recompute_grad` and `tf.custom_gradient`.

Both lose the gradient by what a function closes over, without a word. The values that a stateless scope lends to Keras
variables are such: a model built under `keras.RematScope` would have no gradient by its functional weights.

- Rematerialization is no more than a saving of memory. Where derivatives of this package are taken, the function runs
  as it is, which is right to any order. Everywhere else, as in the training step of Keras alone, it is rematerialized.
- A custom gradient is its author's. Where a source would have no gradient for this reason, that is an error.

This is the one file that replaces functions in TensorFlow's `custom_gradient` module. All that is decorated goes
through the two of them at each call, also what was decorated before this package was imported.
"""

import functools
import warnings

import tensorflow as tf
from tensorflow.python.ops import custom_gradient as native

from keras_gradtools.backend import recording, state


class ClosedOver:
    """One call of a custom gradient under a tape: its arguments, its values as they were computed, and its results."""

    def __init__(self, name, args, values, results):
        self.name = name
        self.args = args
        self.values = values
        self.results = results
        self._graph = _graph()

    def hides(self, tape, targets, source):
        """Whether a path from `source` to `targets` leads through the function, but through none of its arguments."""
        # What is of the graph of a function that was traced under the tape has no values outside.
        return (
            self._graph is _graph()
            and _connected(tape, self.values, source)
            and not _connected(tape, self.args, source)
            and any(_connected(tape, targets, result) for result in self.results)
        )


def _graph():
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def require_connected(tape, targets, sources, gradients):
    """Raises `ValueError` for a source whose gradient is None only because a custom gradient closes over it."""
    for source, gradient in zip(sources, gradients, strict=True):
        if gradient is not None or isinstance(source, tf.Variable):
            # TensorFlow asks a custom gradient for those of the variables that it reads.
            continue
        for call in tape.custom_gradients:
            if call.hides(tape.native, targets, source):
                raise ValueError(
                    f"The gradient by a tensor is lost in {call.name!r}, a function under `tf.custom_gradient` that "
                    "closes over it, or reads a variable that it stands for in a functionalized model. TensorFlow "
                    "would give zeros. Pass the tensor as an argument, or hold it constant with "
                    f"`kg.stop_gradient` if that is meant. Received: a source of shape {tuple(source.shape)} and "
                    f"dtype {source.dtype.name}."
                )


def constant_closure(fun):
    """Marks a function under `tf.custom_gradient` to which what it closes over is a constant by contract."""
    fun._closes_over_constants = True
    return fun


def _connected(tape, targets, source):
    targets = [t for t in targets if t.dtype.is_floating]
    return bool(targets) and tape.gradient(targets, source) is not None


def _rematerialized(fun):
    """What `tf.recompute_grad` was given, if `fun` is the function that it made; else None."""
    if getattr(fun, "__qualname__", "") != "recompute_grad.<locals>.inner" or fun.__module__ != native.__name__:
        return None
    return fun.__closure__[fun.__code__.co_freevars.index("f")].cell_contents


def _calling(original):
    @functools.wraps(original)
    def call(fun, args, kwargs):
        tapes = recording.active_tapes()
        if not (tapes or state.in_scope() or recording.is_logging_reads()):
            return original(fun, args, kwargs)
        rematerialized = _rematerialized(fun)
        if rematerialized is not None:
            _warn_kept()
            return rematerialized(*args, **kwargs)
        if not tapes or hasattr(fun, "_closes_over_constants"):
            return original(fun, args, kwargs)
        computed = []

        @functools.wraps(fun)
        def seen(*given, **options):
            values, grad_fn = fun(*given, **options)
            computed.append(values)
            return values, grad_fn

        results = original(seen, args, kwargs)
        name = getattr(fun, "__name__", type(fun).__name__)
        noted = ClosedOver(name, *(_tensors(x) for x in ((args, kwargs), computed, results)))
        for tape in tapes:
            tape.custom_gradients.append(noted)
        return results

    return call


def _tensors(structure):
    return [x for x in tf.nest.flatten(structure) if tf.is_tensor(x) and isinstance(x, tf.Tensor)]


@functools.cache
def _warn_kept():
    warnings.warn(
        "On TensorFlow, `keras.RematScope`, `keras.remat` and `tf.recompute_grad` save no memory where keras_gradtools "
        "records: TensorFlow's rematerialization has no gradient by what a function closes over, and no second "
        "derivative. Derivatives are right, and take the memory that they take without rematerialization.",
        stacklevel=2,
    )


def install():
    native._eager_mode_decorator = _calling(native._eager_mode_decorator)
    native._graph_mode_decorator = _calling(native._graph_mode_decorator)
