"""`kg.jit` on TensorFlow: a `tf.function` whose reads of Keras variables are seen by tapes.

A graph runs without calling Keras, so a tape would not notice which variables it reads. Here the variables are noted
while the function is traced, and reported to the tapes at each call.
"""

import functools

import keras
import tensorflow as tf

from keras_gradtools import nesting
from keras_gradtools.backend import causes
from keras_gradtools.backend.tensorflow.containers import Leaves
from keras_gradtools.keras_state import recording, scopes


def jit(fun, compiler=None):
    # Inside a stateless scope, assignments are discarded. A graph either contains them or not, so there are two graphs.
    outside, inside = _Graph(fun, compiler), _Graph(fun, compiler)

    @functools.wraps(fun)
    def call(*args, **kwargs):
        args, kwargs = _floats_to_tensors(args), _floats_to_tensors(kwargs)
        if not scopes.in_scope():
            return outside(*args, **kwargs)
        # A graph would read the variables themselves and not the values that the scope gives them.
        return fun(*args, **kwargs) if scopes.is_overridden() else inside(*args, **kwargs)

    return call


class _Graph:
    """A `tf.function` that reports the variables it reads, and custom gradients, to the tapes."""

    def __init__(self, fun, compiler):
        self._fun = fun
        self._jit_compile = True if compiler == "xla" else None
        self._reads = {}
        self._has_custom_gradient = False
        self._compiled = {}

    def _compiled_for(self, outline):
        """The `tf.function` for one nested structure. It takes leaves: TensorFlow does not know all containers."""
        compiled = self._compiled.get(outline)
        if compiled is None:
            # Without AutoGraph, Python control flow on values raises an error, as on JAX.
            compiled = tf.function(
                functools.partial(self._traced, outline), autograph=False, jit_compile=self._jit_compile
            )
            # TensorFlow counts traces per code object for this warning, and all functions compiled here share one.
            compiled._omit_frequent_tracing_warning = True
            compiled = self._compiled.setdefault(outline, compiled)
        return compiled

    def _traced(self, outline, *leaves):
        args, kwargs = outline.pack(leaves)
        with recording.ReadLog() as log:
            result = self._fun(*args, **kwargs)
        self._reads.update((id(v), v) for v in log.variables)
        self._has_custom_gradient |= log.has_custom_gradient
        return Leaves(*nesting.split(result))

    def __call__(self, *args, **kwargs):
        if recording.active_tapes():
            for variable in self._reads.values():
                _ = variable.value
            if self._has_custom_gradient:
                recording.note_custom_gradient()
        outline, leaves = nesting.split((args, kwargs))
        result = self._compiled_for(outline)(*leaves)
        return result.outline.pack(result.leaves)


def _floats_to_tensors(structure):
    # A Python float would be a constant of the graph, and each new value would cause a new trace.
    return nesting.map_structure(
        lambda x: tf.constant(x, keras.config.floatx()) if isinstance(x, float) else x, structure
    )


_WORDS = (
    "SymbolicTensor",
    "symbolic tf.Tensor",
    "is out of scope",
    "tf.function only supports",
    "slice indices must be integers",
)


def depends_on_values(error):
    # Python and NumPy name the symbolic tensor in the error when they need a value.
    kinds = (NotImplementedError, TypeError, AttributeError, ValueError)
    return any(
        isinstance(e, tf.errors.OperatorNotAllowedInGraphError)
        or isinstance(e, kinds)
        and any(words in str(e) for words in _WORDS)
        for e in causes.of(error)
    )
