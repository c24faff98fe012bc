"""The tensors of a recorded call: where each comes from, and which of them share memory.

A tensor that no recorded operation has made is an argument, the value of a Keras variable, a constant that was made
from Python numbers, or else captured: made before the call, and found by the function in some other place.
"""

import torch
from torch.utils._python_dispatch import _disable_current_modes as _no_modes

from keras_gradtools.backend.torch.compiled.operations import Slot

ARGUMENT, VARIABLE, CONSTANT, CAPTURED = "argument", "variable", "constant", "captured"


class Tensors:
    """Tensors and random generators, each of which has a number, its slot.

    Tensors are known by their C++ objects, since torch may make several Python objects for one.

    - `sources`: for each slot, where a tensor that no operation has made comes from: a pair of a kind and the number of
      the argument, the variable, or the tensor. None for other slots.
    - `storages`: for each slot, the identity of its memory. `written`: those that an operation has overwritten.
    """

    def __init__(self):
        self.sources: list = []
        self.storages: list = []
        self.written: set = set()
        self._is_constant: list = []
        self._inconstant: set = set()
        self._slots: dict = {}
        self._alive: list = []
        self._held: set = set()
        self._shared: dict = {}
        self._generators: dict = {}

    def __contains__(self, x):
        return x._cdata in self._slots

    def add(self, x, source=None, is_constant=False):
        # As long as the first reference exists, no other tensor can have the same address, and no memory is held.
        slot = self._new(source, self._storage_of(x), is_constant)
        self._slots[x._cdata] = slot
        self._alive.append(torch._C._WeakTensorRef(x))
        return slot

    def add_generator(self, generator):
        slot = self._new(None, None, False)
        self._generators[generator._cdata] = (slot, generator)
        return slot

    def _new(self, source, storage, is_constant):
        self.sources.append(source)
        self.storages.append(storage)
        self._is_constant.append(is_constant)
        return Slot(len(self.sources) - 1)

    def add_variable(self, variable, value):
        """Notes that `value` is the value of a Keras variable."""
        slot = self._slots.get(value._cdata)
        if slot is None:
            self.add(value, (VARIABLE, variable))
        elif self.is_captured(slot):
            self.sources[slot] = (VARIABLE, variable)

    def slot_of(self, x):
        """The slot of a tensor. A tensor that is not known is captured."""
        slot = self._slots.get(x._cdata)
        return self.add(x, (CAPTURED, x)) if slot is None else slot

    def encoded(self, x):
        """Arguments, with a slot for each tensor and for each generator that the call has made."""
        if isinstance(x, torch.Tensor):
            return self.slot_of(x)
        if isinstance(x, (list, tuple)):
            return tuple([self.encoded(y) for y in x]) if isinstance(x, tuple) else [self.encoded(y) for y in x]
        if isinstance(x, torch.Generator) and self.has_generator(x):
            return self._generators[x._cdata][0]
        return x

    def has_generator(self, x):
        return x._cdata in self._generators

    def is_generator(self, slot):
        return any(slot == other for other, _ in self._generators.values())

    def is_captured(self, slot):
        source = self.sources[slot]
        return source is not None and source[0] == CAPTURED

    def captured(self):
        return [source[1] for source in self.sources if source is not None and source[0] == CAPTURED]

    def is_constant(self, slot):
        """Whether the values of a tensor come from constants only."""
        return self._is_constant[slot] and self.storages[slot] not in self._inconstant

    def has_constant_value(self, x):
        slot = self._slots.get(x._cdata)
        return slot is not None and self.is_constant(slot)

    def share(self, x):
        """Notes that NumPy now shares the memory of a constant tensor."""
        with _no_modes():
            self._shared[self.storages[self._slots[x._cdata]]] = x.detach(), x.detach().clone()

    def is_shared(self, slot):
        return self.storages[slot] in self._shared

    def has_unseen_changes(self):
        """Whether memory that NumPy shares was changed."""
        with _no_modes():
            return not all(torch.equal(x, before) for x, before in self._shared.values())

    def overwrite(self, slot, is_constant):
        """Notes that an operation has overwritten a tensor, with constant values or not."""
        self.written.add(self.storages[slot])
        if not is_constant:
            self._inconstant.add(self.storages[slot])

    def _storage_of(self, x):
        try:
            with torch._C.DisableTorchFunction():
                storage = x.untyped_storage()
                if storage._cdata not in self._held:
                    # As long as this weak reference exists, no other storage can have the same address.
                    self._held.add(storage._weak_ref())
                return storage._cdata
        except (RuntimeError, NotImplementedError):
            return None

    def release(self):
        """To be called after the block. Not by `__del__`, in which an interrupt would be lost."""
        while self._held:
            torch.UntypedStorage._free_weak_ref(self._held.pop())
