"""Makes tensors require gradients for a time, on behalf of tapes and backward passes."""

import threading

from keras_gradtools.backend.torch import levels
from keras_gradtools.blocks import Block

_borrowed = {}
_borrowed_lock = threading.Lock()


def borrow(tensor, holder, variable=None):
    """Makes `tensor` require gradients until `holder` gives it back. Does nothing if it already does.

    Several holders may borrow the same tensor. `variable`: The Keras variable with this value, if there is one.
    """
    with _borrowed_lock:
        entry = _borrowed.get(id(tensor))
        if entry is None:
            if tensor.requires_grad:
                return
            trainable = variable is not None and variable.trainable
            entry = _borrowed[id(tensor)] = (tensor, {id(holder)}, variable, trainable)
        entry[1].add(id(holder))
        levels.require_grad(tensor, True)


def give_back(tensor, holder):
    """Undoes `borrow`, when the last holder gives the tensor back. Does nothing if `holder` has not borrowed it."""
    with _borrowed_lock:
        entry = _borrowed.get(id(tensor))
        if entry is None:
            return
        _, holders, variable, was_trainable = entry
        if holders <= {id(holder)}:
            # If the layer was unfrozen meanwhile, Keras has set the flag, and it must stay set.
            unfrozen = variable is not None and variable.trainable and not was_trainable
            levels.require_grad(tensor, unfrozen)
            del _borrowed[id(tensor)]
        else:
            holders.discard(id(holder))


class Borrowing(Block):
    """A block in which some tensors require gradients."""

    def __init__(self, tensors):
        self._tensors = tensors

    def begin(self):
        for tensor in self._tensors:
            borrow(tensor, self)

    def end(self):
        for tensor in self._tensors:
            give_back(tensor, self)


def is_borrowed(tensor):
    return id(tensor) in _borrowed
