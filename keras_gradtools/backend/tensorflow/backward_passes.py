"""The backward pass of an eager TensorFlow tape as a list of steps, which is found without computing any of them.

TensorFlow's tape does not show what it has recorded. But it calls one function of Python to differentiate an operation,
another to add gradients, and a third to make zeros. These three are replaced here. While `steps_of` runs, they compute
nothing, and note what they are asked for. What passes through the tape meanwhile are not gradients, but their numbers.

Values are the tensors that the tape has kept for the gradients of operations. Slots are the numbers of gradients.

This file uses these private parts of TensorFlow: `TFE_Py_RegisterGradientFunction`, `TFE_Py_RegisterVSpace`,
`backprop._gradient_function` and `_default_vspace`, `imperative_grad` and `record.record_operation`.
"""

import threading
from typing import Any, NamedTuple

import tensorflow as tf
from tensorflow.python import pywrap_tfe
from tensorflow.python.eager import backprop, imperative_grad, record
from tensorflow.python.framework import ops
from tensorflow.python.ops.resource_variable_ops import ResourceVariable

from keras_gradtools.blocks import Block
from keras_gradtools.keras_state import recording


class Unknown(Exception):
    """A backward pass that cannot be taken apart."""


class _Zeros(NamedTuple):
    shape: Any
    dtype: Any


class Gradients(NamedTuple):
    """The gradients of the inputs of an operation, from those of its outputs.

    Attributes:
        name, attributes, arity: The operation, its attributes, and the number of its inputs.
        inputs, outputs: The values, or None where the gradients do not need them.
        upstream: The slots of the gradients of the outputs. `_Zeros` or None where there is none.
        skipped: The inputs whose gradients are not needed, or None.
        results: The slots of the gradients of the inputs, or None.
    """

    name: Any
    attributes: Any
    arity: int
    inputs: Any
    outputs: Any
    upstream: tuple
    skipped: Any
    results: tuple

    def described(self, number):
        """What it does, hashable, with `number(value)` in the place of each value."""
        inputs, outputs = (
            xs and tuple([None if x is None else number(x) for x in xs]) for xs in (self.inputs, self.outputs)
        )
        attributes = tuple([tuple(x) if isinstance(x, list) else x for x in self.attributes or ()])
        return self._replace(attributes=attributes, inputs=inputs, outputs=outputs)

    def compute(self, values, gradients):
        """The gradients of the inputs. `values` replaces the values, and `gradients` are those in the slots."""
        upstream = [tf.zeros(*g) if type(g) is _Zeros else None if g is None else gradients[g] for g in self.upstream]
        if all(g is None for g in map(gradients.get, filter(_is_slot, self.upstream))):
            return [None] * self.arity
        if any(_is_slot(slot) and g is None for slot, g in zip(self.upstream, upstream, strict=True)):
            raise Unknown
        inputs, outputs = (
            [None if x is None else values[id(x)] for x in xs or ()] for xs in (self.inputs, self.outputs)
        )
        found = _gradient_function(
            self.name, self.attributes, self.arity, inputs, outputs, upstream, self.skipped, None
        )
        found = found if isinstance(found, (list, tuple)) else [found]
        if len(found) != self.arity:
            raise Unknown
        return [None if g is None else tf.convert_to_tensor(g) for g in found]


class Sum(NamedTuple):
    """The sum of the gradients in the slots `terms`."""

    terms: tuple
    results: tuple

    def described(self, number):
        return self

    def compute(self, values, gradients):
        terms = [gradients[slot] for slot in self.terms if gradients[slot] is not None]
        return [tf.add_n(terms) if terms else None]


def _is_slot(x):
    return type(x) is int


# A longer pass takes seconds to trace.
MOST_SLOTS = 5000


class _Thread(threading.local):
    def __init__(self):
        # The pass that is being noted on this thread.
        self.noted = None
        # What stands for the gradient in each slot. These are tensors, because TensorFlow would call Python to count
        # the elements of anything else, from a place that an interrupt must not reach.
        self.gradients = []
        self.slots = {}


_thread = _Thread()


def _gradient_in(slot):
    gradients = _thread.gradients
    while len(gradients) <= slot:
        made = tf.constant(0.0)
        _thread.slots[id(made)] = len(gradients)
        gradients.append(made)
    return gradients[slot]


class _Noting(Block):
    """A block in which nothing is differentiated, and the steps are noted. The first `count` slots are taken."""

    def __init__(self, count):
        self.steps = []
        self._slots = count

    def begin(self):
        _thread.noted = self

    def end(self):
        _thread.noted = None

    def new(self):
        """The number of a new slot."""
        if self._slots == MOST_SLOTS:
            raise Unknown
        self._slots += 1
        return self._slots - 1


def steps_of(native, targets, sources):
    """The steps of a pass for cotangents in the first slots, one for each target, and each source's slot or None.

    Raises `Unknown` if the pass cannot be taken apart.
    """
    ends = [s.handle if type(s) is ResourceVariable else s for s in sources]
    if not all(type(x) is ops.EagerTensor for x in (*targets, *ends)):
        raise Unknown
    cotangents = list(map(_gradient_in, range(len(targets))))
    noting = _Noting(len(targets))
    try:
        with noting, noting:
            found = imperative_grad.imperative_grad(
                native._tape, targets, ends, output_gradients=cotangents, sources_raw=ends
            )
    except Exception as error:
        # The same pass runs again in the usual way, and raises the same error if it is the user's.
        raise Unknown from error
    slots = [_slot_of(g) for g in found]
    if not all(slot is None or _is_slot(slot) for slot in slots):
        raise Unknown
    return noting.steps, slots


def _slot_of(gradient):
    if gradient is None or type(gradient) is _Zeros:
        return gradient
    slot = _thread.slots.get(id(gradient))
    if slot is None:
        raise Unknown
    return slot


_gradient_function = backprop._gradient_function
_vspace = backprop._default_vspace


def _differentiate(name, attributes, count, inputs, outputs, upstream, skipped, scope):
    noted = _thread.noted
    if noted is None:
        return _gradient_function(name, attributes, count, inputs, outputs, upstream, skipped, scope)
    if ops.gradient_registry.lookup(name) is None:
        return [None] * count
    slots = tuple([None if skipped and i in skipped else noted.new() for i in range(count)])
    upstream = tuple(map(_slot_of, upstream))
    noted.steps.append(Gradients(name, attributes, count, inputs, outputs, upstream, skipped, slots))
    return [None if slot is None else _gradient_in(slot) for slot in slots]


def _add(gradients):
    noted = _thread.noted
    if noted is None:
        return _vspace.aggregate_fn(gradients)
    terms = tuple(map(_slot_of, gradients))
    if not all(map(_is_slot, terms)):
        raise Unknown
    slot = noted.new()
    noted.steps.append(Sum(terms, (slot,)))
    return _gradient_in(slot)


def _zeros(shape, dtype):
    if _thread.noted is None:
        return _vspace.zeros_fn(shape, dtype)
    dtype = tf.as_dtype(dtype)
    return _Zeros(tuple(shape), dtype) if dtype.is_numpy_compatible else None


def _zeros_like(x):
    if _thread.noted is None:
        return _vspace.zeros_like_fn(x)
    raise Unknown


def _noting_opaque_operations(original):
    def record_operation(*args, **kwargs):
        for tape in recording.active_tapes():
            tape.has_opaque_operation = True
        return original(*args, **kwargs)

    return record_operation


def install():
    pywrap_tfe.TFE_Py_RegisterGradientFunction(_differentiate)
    pywrap_tfe.TFE_Py_RegisterVSpace(_vspace._replace(aggregate_fn=_add, zeros_fn=_zeros, zeros_like_fn=_zeros_like))
    record.record_operation = _noting_opaque_operations(record.record_operation)
