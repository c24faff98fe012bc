"""One recorded call of a function, with the structure of its result, and its comparison with another call."""

import torch

from keras_gradtools import nesting
from keras_gradtools.backend.torch.compiled.operations import GUARD
from keras_gradtools.backend.torch.compiled.tensors import CONSTANT
from keras_gradtools.keras_internals.layers import get_keras_mask

_VALUES = (int, float, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, slice)


class RecordedCall:
    """What a `Recorder` has seen of one call.

    - `guards`: the values of the bools that Python has read.
    - `outputs`: the slots of the tensors in the result. `order`: for each leaf of the result, the number of its output,
      or None. `constants`: the leaves that are no tensors, with None for the others.
    - `masks`: pairs of the number of an output that has a Keras mask, and the slot of the mask.
    - `requires_grad`: for each output, whether it required gradients, and was made by the call.
    """

    def __init__(self, recorder, result):
        self.recorder, tensors = recorder, recorder.tensors
        self.outline, leaves = nesting.split(result)
        self.outputs, self.order, self.constants, self.requires_grad, self.masks = [], [], [], [], []
        for x in leaves:
            is_tensor = isinstance(x, torch.Tensor)
            self.order.append(len(self.outputs) if is_tensor else None)
            self.constants.append(None if is_tensor else x)
            if is_tensor:
                slot = tensors.slot_of(x)
                self.outputs.append(slot)
                self.requires_grad.append(x.requires_grad and tensors.sources[slot] is None)
                mask = get_keras_mask(x)
                if mask is not None:
                    self.masks.append((len(self.outputs) - 1, tensors.slot_of(mask)))
        tensors.release()
        self.gradients = recorder.gradients
        self.guards = tuple(op.args[1] for op in recorder.operations if op.function is GUARD)
        self.captured = tensors.captured()

    def is_as(self, other):
        """Whether the other call ran the same operations, with the same constants, on the same tensors."""
        mine, others = self.recorder, other.recorder
        return (
            (self.outputs, self.order, self.requires_grad) == (other.outputs, other.order, other.requires_grad)
            and self.masks == other.masks
            and self.outline == other.outline
            and _same(self.constants, other.constants)
            and _same(self.gradients, other.gradients)
            and len(mine.operations) == len(others.operations)
            and len(mine.tensors.sources) == len(others.tensors.sources)
            and all(map(_same_source, mine.tensors.sources, others.tensors.sources))
            and all(map(_same_operation, mine.operations, others.operations))
        )


def _same_operation(a, b):
    return (
        a.function is b.function
        and a.outputs == b.outputs
        and a.kwargs.keys() == b.kwargs.keys()
        and _same(a.args, b.args)
        and all(_same(x, b.kwargs[name]) for name, x in a.kwargs.items())
    )


def _same_source(a, b):
    if a is None or b is None or a[0] != b[0]:
        return a is b
    if a[0] != CONSTANT:
        return _same(a[1], b[1])
    x, y = a[1], b[1]
    return x.dtype == y.dtype and x.shape == y.shape and torch.equal(_bits(x), _bits(y))


def _bits(x):
    # NaN differs from itself.
    return x.contiguous().reshape(-1).view(torch.uint8) if x.dtype != torch.bool else x


def _same(a, b):
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return isinstance(a, _VALUES) and (a == b and str(a) == str(b) or a != a and b != b)
