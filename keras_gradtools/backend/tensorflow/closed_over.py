"""Prevents missing gradients of closed-over tensors in `tf.recompute_grad` and `tf.custom_gradient`.

TensorFlow differentiates both kinds of functions with respect to their arguments only, and silently drops the gradient
with respect to tensors that they close over. The values that a stateless scope gives to Keras variables are such
tensors, so the weights of a functionalized model under `keras.RematScope` would have no gradient.

- Rematerialization only saves memory. Where this package records, the function runs without it, and its derivatives are
  right to any order. Elsewhere, as in Keras' own training step, it is rematerialized.
- A custom gradient cannot be replaced, because only its author knows it. Where a source would have no gradient for this
  reason, an error is raised.

Only this file replaces functions in TensorFlow's module `custom_gradient`. Decorated functions call the two replaced
functions each time they run, even if they were decorated before this package was imported.
"""

import functools
import warnings

import tensorflow as tf
from tensorflow.python.ops import custom_gradient as native

from keras_gradtools.keras_state import recording, scopes


class ClosedOver:
    """One call of a custom gradient under a tape: its arguments, the values computed inside it, and its results."""

    def __init__(self, name, args, values, results):
        self.name = name
        self.args = args
        self.values = values
        self.results = results
        self._graph = _graph()

    def hides(self, tape, targets, source):
        """Whether `targets` depend on `source` through this function, but not through its arguments."""
        # Tensors of a graph that was traced under the tape have no values outside of it.
        return (
            self._graph is _graph()
            and _connected(tape, self.values, source)
            and not _connected(tape, self.args, source)
            and any(_connected(tape, targets, result) for result in self.results)
        )


def _graph():
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def require_connected(tape, targets, sources, gradients):
    """Raises `ValueError` if a source has no gradient only because a custom gradient closes over it."""
    for source, gradient in zip(sources, gradients, strict=True):
        if gradient is not None or isinstance(source, tf.Variable):
            # TensorFlow asks a custom gradient for the gradients of the `tf.Variable`s that it reads.
            continue
        for call in tape.custom_gradients:
            if call.hides(tape.native, targets, source):
                raise ValueError(
                    f"The gradient of a tensor is lost in {call.name!r}, a function under `tf.custom_gradient` that "
                    "closes over the tensor, or over a variable whose value it is in a functionalized model. "
                    "TensorFlow would give zeros. Pass the tensor as an argument, or use `kg.stop_gradient` if it is "
                    f"meant as a constant. Received: a source of shape {tuple(source.shape)} and dtype "
                    f"{source.dtype.name}."
                )


def constant_closure(fun):
    """Marks a function under `tf.custom_gradient` whose closed-over values are documented to be constants."""
    fun._closes_over_constants = True
    return fun


def _connected(tape, targets, source):
    targets = [t for t in targets if t.dtype.is_floating]
    return bool(targets) and tape.gradient(targets, source) is not None


def _rematerialized(fun):
    """The function that was passed to `tf.recompute_grad`, if that returned `fun`. Otherwise None."""
    if getattr(fun, "__qualname__", "") != "recompute_grad.<locals>.inner" or fun.__module__ != native.__name__:
        return None
    return fun.__closure__[fun.__code__.co_freevars.index("f")].cell_contents


def _calling(original):
    @functools.wraps(original)
    def call(fun, args, kwargs):
        tapes = recording.active_tapes()
        if not (tapes or scopes.in_scope() or recording.is_logging_reads()):
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
        "records: TensorFlow's rematerialization has no gradient of what a function closes over, and no second "
        "derivative. Derivatives are right, but need as much memory as without rematerialization.",
        stacklevel=2,
    )


def install():
    native._eager_mode_decorator = _calling(native._eager_mode_decorator)
    native._graph_mode_decorator = _calling(native._graph_mode_decorator)
