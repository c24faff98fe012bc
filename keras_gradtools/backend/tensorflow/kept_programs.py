"""Programs for the Jacobians of eager tapes, kept for the next time that a tape's backward pass has the same steps.

For a stack of cotangents, TensorFlow traces the backward pass as a graph, which takes many times as long as the graph
runs. A kept program is such a graph, with the tensors that the tape has kept as arguments. Two passes have the same
program if they have the same operations, connected in the same way, with the same attributes, shapes and dtypes. Short
tensors of integers, such as shapes and axes, must have the same entries, because a graph needs them as constants.

A program is made when its steps occur for the second time. It is used only if its first result is that of the usual
way.
"""

import collections
import threading
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import record
from tensorflow.python.framework import ops

from keras_gradtools.backend.tensorflow import backward_passes, vectorize

MOST_PROGRAMS = 64
# Shapes, axes and slices have few entries.
_MOST_ENTRIES = 16
_INTEGERS = (tf.int32, tf.int64)


def kept(tape, target, sources, key, compute):
    """`compute(tape)`, a list of tensors and None, from a kept program if there is one. See `Backend.kept`."""
    if tape.has_opaque_operation or not tf.executing_eagerly():
        return compute(tape)
    try:
        found = _Pass(tape, target, sources, key)
        program, is_known = _programs.find(found.key)
    except (backward_passes.Unknown, TypeError):
        return compute(tape)
    if program is not None:
        return program(found.arguments)
    results = compute(tape)
    if is_known:
        _programs.add(found.key, _checked(found, compute, results))
    return results


class _Key:
    """A tuple that knows its hash, which takes long for many steps."""

    __slots__ = ("_entries", "_hash")

    def __init__(self, entries):
        self._entries = entries
        self._hash = hash(entries)

    def __hash__(self):
        return self._hash

    def __eq__(self, other):
        return self._hash == other._hash and self._entries == other._entries


class _Pass:
    """A backward pass: what its program needs to know, and the arguments for this time.

    Attributes:
        steps, slots: See `backward_passes.steps_of`.
        values: The tensors that the steps use.
        constants: For each value, its entries if they are constants of the program, otherwise None.
        arguments: The other values.
        key: Hashable, and equal for passes with the same program.
    """

    def __init__(self, tape, target, sources, key):
        self._tape = tape
        self._sources = sources
        owners, values, _ = tape.spread(sources, sources)
        self.steps, self.slots = backward_passes.steps_of(tape.native, [target], values)
        self.values: list[Any] = []
        self._numbers: dict = {}
        steps = tuple([step.described(self._number) for step in self.steps])
        self.constants = list(map(_entries, self.values))
        self.arguments = [x for x, entries in zip(self.values, self.constants, strict=True) if entries is None]
        kinds = tuple([_kind(x) for x in (target, *sources, *self.values)])
        entries = tuple([None if c is None else c.tobytes() for c in self.constants])
        self.key = _Key((key, steps, tuple(self.slots), tuple(owners), kinds, entries))

    def _number(self, x):
        number = self._numbers.setdefault(id(x), len(self.values))
        if number == len(self.values):
            self.values.append(x)
        return number

    def replay(self, arguments):
        """The pass as a tape, for `pullback_batch`, with other arguments."""
        given = iter(arguments)
        values = {
            id(x): next(given) if entries is None else tf.constant(entries)
            for x, entries in zip(self.values, self.constants, strict=True)
        }

        def gradients_of(rows):
            gradients = dict(enumerate(rows))
            for step in self.steps:
                results = step.compute(values, gradients)
                gradients.update((s, g) for s, g in zip(step.results, results, strict=True) if s is not None)
            return self._tape.gather(self._sources, lambda _: [s if s is None else gradients[s] for s in self.slots])

        return Replay(self._sources, gradients_of)


class Replay:
    """Takes the place of a tape while a program is traced."""

    def __init__(self, sources, gradients_of):
        self._sources = sources
        self._gradients_of = gradients_of

    def pullback_batch(self, sources, cotangents):
        places = [next(i for i, s in enumerate(self._sources) if s is source) for source in sources]

        def of_rows(rows):
            gradients = self._gradients_of(rows)
            return [gradients[i] for i in places]

        return vectorize.map_connected(of_rows, cotangents, vectorize.vectorize)


def _kind(x):
    if type(x) is ops.EagerTensor:
        return x._shape_tuple(), x._datatype_enum()  # faster than `shape` and `dtype`
    return tuple(x.shape), tf.as_dtype(x.dtype)


def _entries(x):
    """The entries of a short tensor of integers, otherwise None."""
    if type(x) is not ops.EagerTensor or not x.dtype.is_numpy_compatible:
        raise backward_passes.Unknown
    shape = x._shape_tuple()
    is_short = len(shape) == 0 or len(shape) == 1 and shape[0] <= _MOST_ENTRIES
    return x.numpy() if is_short and x.dtype in _INTEGERS else None


class _Program:
    def __init__(self, found, compute):
        self._present: list = []
        # Only for the trace: it would keep the tensors of this pass in memory.
        at_hand = [found]

        def traced(*arguments):
            results = compute(at_hand[0].replay(arguments))
            self._present = [x is not None for x in results]
            return [x for x in results if x is not None]

        specs = [tf.TensorSpec(x.shape, x.dtype) for x in found.arguments]
        self._run = tf.function(traced, autograph=False).get_concrete_function(*specs)
        at_hand.clear()

    def __call__(self, arguments):
        # Without the checks of `self._run(*arguments)`, which the key of a pass has made.
        found = iter(self._run._call_flat(arguments, self._run.captured_inputs))
        return [next(found) if is_present else None for is_present in self._present]


def _checked(found, compute, expected):
    """The program of a pass, or None if it cannot be made, or if its result is not the expected one."""
    try:
        with record.stop_recording():
            program = _Program(found, compute)
            results = program(found.arguments)
    except Exception:
        # The vectorizer, and gradients of operations, raise errors of all classes.
        return None
    return program if all(map(_agree, results, expected)) else None


def _agree(a, b):
    if a is None or b is None:
        return a is b
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    # Half the digits: this asks whether it is the same derivative, not how it rounds.
    # `finfo` does not know bfloat16.
    precision = float(np.spacing(np.ones((), a.dtype))) ** 0.5
    a, b = a.astype("float64"), b.astype("float64")
    largest = np.max(np.abs(b), initial=0.0, where=np.isfinite(b))
    return np.allclose(a, b, rtol=precision, atol=precision * largest, equal_nan=True)


class _Programs:
    """At most `MOST_PROGRAMS` programs by the key of their pass, and four times as many keys of passes without one."""

    def __init__(self):
        self._by_key: collections.OrderedDict = collections.OrderedDict()
        self._lock = threading.Lock()

    def find(self, key):
        """The program or None, and whether one should be made, because the key has occurred before."""
        with self._lock:
            is_new = key not in self._by_key
            program = self._by_key.pop(key, None)
            self._put(key, program)
        return (None, False) if program is _REFUSED else (program, program is None and not is_new)

    def add(self, key, program):
        """Keeps a program, or notes that there is none."""
        with self._lock:
            self._by_key.pop(key, None)
            self._put(key, program or _REFUSED)
            others = [k for k, p in self._by_key.items() if isinstance(p, _Program)]
            for oldest in others[:-MOST_PROGRAMS]:
                del self._by_key[oldest]

    def _put(self, key, program):
        self._by_key[key] = program
        if len(self._by_key) > 4 * MOST_PROGRAMS:
            self._by_key.popitem(last=False)

    def clear(self):
        with self._lock:
            self._by_key.clear()


_REFUSED = object()
_programs = _Programs()
