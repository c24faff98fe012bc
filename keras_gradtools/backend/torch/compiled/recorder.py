"""Records the operations of torch that a call runs.

The call is an ordinary one: it runs eagerly, with its values, and has all its effects. The recorder is a
`TorchDispatchMode`, which sees each operation below autograd: those of the forward pass and those of every backward
pass. Tensors are known by their C++ objects, since torch may make several Python objects for one.

A tensor that no recorded operation has made is an argument, the value of a Keras variable, a constant that was made
from Python numbers, or else captured: made before the call, and found by the function in some other place.
"""

import functools
import sys
import threading
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode
from torch.utils._python_dispatch import _disable_current_modes as _no_modes

from keras_gradtools.backend.torch.compiled.leaks import Leaks
from keras_gradtools.backend.torch.compiled.operations import Operation, Slot, facts, has_variable_shape
from keras_gradtools.blocks import Block
from keras_gradtools.keras_internals.variables import direct_assign, initialize
from keras_gradtools.keras_state import recording

_PLAIN = {torch.Tensor, torch.nn.Parameter}
ARGUMENT, VARIABLE, CONSTANT, CAPTURED = "argument", "variable", "constant", "captured"


class _Thread(threading.local):
    recorder: Any = None


_thread = _Thread()


def current():
    """The recorder that is recording on this thread, or None."""
    return _thread.recorder


def install():
    initialize.replace(_noted)
    direct_assign.replace(_with_variable)


def _noted(original):
    @functools.wraps(original)
    def _initialize(self, value):
        original(self, value)
        if _thread.recorder is not None:
            _thread.recorder.makes_variables = True

    return _initialize


def _with_variable(original):
    # From Keras 3.16 on, an assignment does not read the variable.
    @functools.wraps(original)
    def _direct_assign(self, value):
        if _thread.recorder is not None and self._value is not None:
            _thread.recorder.note_variable(self, self._value)
        return original(self, value)

    return _direct_assign


def seen_random_state(read):
    """`read()`, the states of the host's and the device's generator, as an operation of a recorder."""
    current = _thread.recorder
    return read() if current is None else current.read_random_state(read)


def seen_setting(write, state):
    """`write(*state)`, which sets the states of these generators, as an operation of a recorder."""
    current = _thread.recorder
    if current is None:
        write(*state)
    else:
        current.write_random_state(write, state)


class Guard:
    """Takes the place of a function in an `Operation` that reads a bool: a program is only valid for one value."""


GUARD = Guard()


class Recorder(Block):
    """Records the operations of a block.

    - `operations`: the list of `Operation`s.
    - `sources`: for each slot, where a tensor that no operation has made comes from: a pair of a kind and the number of
      the argument, the variable, or the tensor. None for other slots.
    - `reshapes`: whether an operation changes the shape of a tensor in place.
    - `draws`: whether they draw from torch's own random generators. `of_random_state`: the functions that read or set
      the state of these.
    - `gradients`: pairs of a Keras variable, of whose value `grad` was replaced, and the slot of the new one or None.
      `is_unproven`: whether `grad` was set where none was before, so that another call may do something else.
    - `refusal`: why what was recorded cannot be run again. None if it can.
    """

    def __init__(self, arguments):
        self.operations: list = []
        self.sources: list = []
        self.storages: list = []
        self.is_constant: list = []
        self.written: set = set()
        self.refusal: str | None = None
        self.makes_variables = False
        self.reshapes = False
        self.draws = False
        self.is_unproven = False
        self.gradients: list = []
        self._grads: dict = {}
        self.of_random_state: set = set()
        self._slots: dict = {}
        self._alive: list = []
        self._inputs: list = []
        self._inconstant: set = set()
        self._generators: dict = {}
        self._random_state: list = []
        self._arguments = list(arguments)
        for i, x in enumerate(arguments):
            self._add(x, (ARGUMENT, i))
        self._mode: Any = _Mode(self._meet)
        self._leaks: Any = Leaks(self.refuse, self._has_constant_value, self._run)
        self._log: Any = _Reads(self)
        self._was_multithreaded = torch._C._is_multithreading_enabled()
        self._depths = torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()
        self._stance: Any = None

    def begin(self):
        _thread.recorder = self
        if "torch._dynamo" in sys.modules:
            # Under a mode, torch.compile would run a function uncompiled, and leave it so for good.
            self._stance = torch.compiler.set_stance("force_eager")
        self._random_state = _random_state()
        # A backward pass on another thread would not be seen.
        torch._C._set_multithreading_enabled(False)
        self._log.__enter__()
        self._leaks.__enter__()
        self._mode.__enter__()

    def end(self):
        if torch._C._len_torch_dispatch_stack() > self._depths[0]:
            try:
                self._mode.__exit__(None, None, None)
            except IndexError:
                # It was interrupted before, between its parts.
                _pop_mode()
        if torch._C._len_torch_function_stack() > self._depths[1]:
            self._leaks.__exit__(None, None, None)
        self._log.__exit__()
        torch._C._set_multithreading_enabled(self._was_multithreaded)
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
        _thread.recorder = None

    def finish(self):
        """To be called after the block, unless it has raised an error."""
        if self.draws:
            self._check_random_state()
        self._look_at_grad()
        # They refer to the recorder. Without this cycle, what it holds is freed with it.
        self._mode = self._leaks = self._log = None

    def refuse(self, reason):
        if self.refusal is None:
            self.refusal = reason
            self.operations = []

    def slot_of(self, x):
        """The slot of a tensor. A tensor that is not known is captured."""
        slot = self._slots.get(x._cdata)
        return self._add(x, (CAPTURED, x)) if slot is None else slot

    def _add(self, x, source=None, is_constant=False):
        slot = Slot(len(self.sources))
        self._slots[x._cdata] = slot
        # As long as this reference exists, no other tensor can have the same address, and no memory is held.
        self._alive.append(torch._C._WeakTensorRef(x))
        self.sources.append(source)
        self.storages.append(_storage(x))
        self.is_constant.append(is_constant)
        return slot

    def note_variable(self, variable, value):
        """Notes that a reader of a Keras variable was given its own value."""
        if id(variable) not in self._grads:
            self._grads[id(variable)] = (variable, value.grad if value.is_leaf else None)
        slot = self._slots.get(value._cdata)
        if slot is None:
            self._add(value, (VARIABLE, variable))
        elif self.sources[slot] is not None and self.sources[slot][0] == CAPTURED:
            self.sources[slot] = (VARIABLE, variable)

    def note_generator(self, generator, function, args):
        """Notes that `function(*args)` made a random generator."""
        if self.refusal is None:
            slot = Slot(len(self.sources))
            self._generators[generator._cdata] = (slot, generator)
            self.sources.append(None)
            self.storages.append(None)
            self.is_constant.append(False)
            self.operations.append(Operation(function, self._encoded(args), {}, (slot,), True, (), False))

    def read_random_state(self, read):
        with _no_modes():
            states = read()
        self.of_random_state.add(read)
        if self.refusal is None:
            slots = tuple([self._add(x) for x in states])
            self.operations.append(Operation(read, (), {}, slots, False, (), False))
        return states

    def write_random_state(self, write, states):
        self._check_random_state()
        with _no_modes():
            write(*states)
            self._random_state = _random_state()
        self.of_random_state.add(write)
        if self.refusal is None:
            self.operations.append(Operation(write, self._encoded(states), {}, (), False, (), True))

    def _meet(self, function, types, args, kwargs):
        if self.refusal is not None:
            return function(*args, **kwargs)
        if function is torch.ops.aten._local_scalar_dense.default:
            return self._meet_value(function, args)
        found = facts(function)
        reason = found.refusal
        if not _PLAIN.issuperset(types):
            reason = (
                f"it computes with a {' or a '.join(sorted({t.__name__ for t in types} - {'Tensor', 'Parameter'}))}"
            )
        elif reason is None and found.may_vary and has_variable_shape(function, args, kwargs):
            reason = f"the shape of the result of `{function._schema.name}` depends on the values of tensors"
        if reason is not None or found.is_of_metadata:
            if reason is not None:
                self.refuse(reason)
            return function(*args, **kwargs)
        self._inputs = []
        if function is torch.ops.aten.lift_fresh.default and args[0]._cdata not in self._slots:
            # A copy, because the function may change it.
            self._add(args[0], (CONSTANT, args[0].detach().clone()), True)
            return function(*args)
        draws = found.draws and self._meet_draw(kwargs)
        encoded, named = self._encoded(args), {k: self._encoded(v) for k, v in kwargs.items()}
        inputs = self._inputs
        result = function(*args, **kwargs)
        mutated = tuple(
            s for i, name in found.written for s in _slots_in(encoded[i] if i < len(encoded) else named.get(name))
        )
        if draws:
            self._random_state = _random_state()
        is_constant = not found.draws and all(map(self._is_constant, inputs))
        if mutated:
            self._meet_writing(mutated, is_constant)
        if found.reshapes:
            self._meet_reshaping(function, mutated)
        is_single = not isinstance(result, (tuple, list))
        outputs = tuple(
            (self._slots[y._cdata] if mutated and y._cdata in self._slots else self._add(y, None, is_constant))
            if isinstance(y, torch.Tensor)
            else None
            for y in ([result] if is_single else result)
        )
        # What returns nothing checks something.
        is_kept = bool(mutated) or found.draws or all(s is None for s in outputs)
        self.operations.append(Operation(function, encoded, named, outputs, is_single, mutated, is_kept))
        return result

    def _run(self, function, changed, *args):
        if torch.is_grad_enabled() and any(x.requires_grad for x in changed):
            return function(changed, *args)
        with _no_modes():
            function(changed, *args)
        if self.refusal is None:
            self._inputs = []
            encoded = self._encoded((changed, *args))
            mutated = tuple(_slots_in(encoded[0]))
            self._meet_writing(mutated, False)
            self.operations.append(Operation(function, encoded, {}, (), True, mutated, True))
        return None

    def _meet_value(self, function, args):
        value = function(*args)
        if self._has_constant_value(args[0]):
            return value
        if isinstance(value, bool):
            slot = self.slot_of(args[0])
            self.operations.append(Operation(GUARD, (slot, value), {}, (), True, (), True))
        else:
            self.refuse("Python reads the value of a tensor, as `float(x)`, `int(x)`, `x.item()` and `if x:` do")
        return value

    def _meet_draw(self, kwargs):
        """Returns whether a default generator draws. Only draws in sequence can be repeated."""
        generator = kwargs.get("generator")
        if generator is not None:
            if generator._cdata not in self._generators:
                self.refuse("it draws from a `torch.Generator`")
            return False
        self._check_random_state()
        self.draws = True
        return True

    def _look_at_grad(self):
        """Notes which `grad` of a variable's value the block has set. `backward()` sets these without an operation."""
        others = [*self._arguments, *(source[1] for source in self.sources if source and source[0] == CAPTURED)]
        if any(x.is_leaf and x.grad is not None and x.grad._cdata in self._slots for x in others):
            self.refuse("it calls `backward()`, which sets `grad` of a tensor that is no Keras variable's value")
        for variable, before in self._grads.values():
            grad = variable._value.grad
            if grad is before:
                continue
            if before is None:
                # Perhaps a former `grad` would have been added to this one.
                self.is_unproven = True
            elif grad is None or grad._cdata in self._slots:
                self.gradients.append((variable, None if grad is None else self.slot_of(grad)))
            else:
                self.refuse("it sets `grad` of a variable to a tensor that it has not computed")

    def _check_random_state(self):
        if self.refusal is not None:
            return
        with _no_modes():
            is_as_left = all(map(torch.equal, _random_state(), self._random_state))
        if not is_as_left:
            self.refuse("it sets the state of torch's random generator")

    def _meet_writing(self, mutated, is_constant):
        for slot in mutated:
            self.written.add(self.storages[slot])
            if not is_constant:
                self._inconstant.add(self.storages[slot])
            source = self.sources[slot]
            if source is not None and source[0] == CAPTURED:
                self.refuse("it changes a tensor in place that is no argument and no Keras variable's value")

    def _meet_reshaping(self, function, mutated):
        self.reshapes = True
        if any(self.sources[slot] is not None for slot in mutated):
            self.refuse(f"torch's operation `{function._schema.name}` changes the shape of a tensor that it was given")

    def _has_constant_value(self, x):
        slot = self._slots.get(x._cdata)
        return slot is not None and self._is_constant(slot)

    def _is_constant(self, slot):
        return self.is_constant[slot] and self.storages[slot] not in self._inconstant

    def _encoded(self, x):
        if isinstance(x, torch.Tensor):
            slot = self.slot_of(x)
            self._inputs.append(slot)
            return slot
        if isinstance(x, (list, tuple)):
            return tuple([self._encoded(y) for y in x]) if isinstance(x, tuple) else [self._encoded(y) for y in x]
        if isinstance(x, torch.Generator):
            return self._generators[x._cdata][0] if x._cdata in self._generators else x
        return x


class _Mode(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, meet):
        super().__init__()
        self._meet = meet

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # The recorder's own calls must not be seen by `Leaks`.
        with torch._C.DisableTorchFunction():
            return self._meet(func, types, args, kwargs or {})


class _Reads(recording.ReadLog):
    def __init__(self, recorder):
        super().__init__()
        self._recorder = recorder

    def note(self, variable, value):
        if value is variable._value:
            self._recorder.note_variable(variable, value)
        super().note(variable, value)


def _slots_in(x):
    if isinstance(x, Slot):
        return [x]
    return [s for y in x for s in _slots_in(y)] if isinstance(x, (list, tuple)) else []


def _random_state():
    with _no_modes():
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def _storage(x):
    try:
        with torch._C.DisableTorchFunction():
            # As long as this reference exists, no other memory has the same identity.
            return StorageWeakRef(x.untyped_storage())
    except (RuntimeError, NotImplementedError):
        return None
