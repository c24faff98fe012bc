"""How much memory a computation on TensorFlow needs."""

import math

import tensorflow as tf
from tensorflow.python.eager import context
from tensorflow.python.framework import op_callbacks

from keras_gradtools.blocks import Block

# They share the memory of their argument.
_VIEWS = {b"Identity", b"IdentityN", b"Reshape", b"ReadVariableOp", b"ExpandDims", b"Squeeze"}


def computed_bytes(fun):
    count = _Count()
    with count, count:
        if tf.executing_eagerly():
            fun()
        else:
            # A graph of its own, because the one that is being built would run it again and again.
            tf.function(lambda: list(fun()), autograph=False).get_concrete_function()
    return count.bytes


class _Count(Block):
    """Counts the bytes of the tensors that operations make, eagerly or in a graph, views excepted."""

    def __init__(self):
        self.bytes = 0

    def begin(self):
        op_callbacks.add_op_callback(self)

    def end(self):
        if self in context.context().op_callbacks:
            op_callbacks.remove_op_callback(self)

    def __call__(self, kind, inputs, attributes, outputs, op_name=None, graph=None):
        kind = kind if isinstance(kind, bytes) else kind.encode()
        if kind not in _VIEWS:
            self.bytes += sum(map(_size, outputs))


def _size(tensor):
    if tensor.shape.rank is None:
        return 0
    return math.prod(n or 0 for n in tensor.shape) * tensor.dtype.size
