"""Records the operations of torch that a call runs.

The call is an ordinary one: it runs eagerly, with its values, and has all its effects. The recorder is a
`TorchDispatchMode`, which sees each operation below autograd: those of the forward pass and those of every backward
pass.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode
from torch.utils._python_dispatch import _disable_current_modes as _no_modes

from keras_gradtools.backend.torch.compiled import notices
from keras_gradtools.backend.torch.compiled.leaks import Leaks
from keras_gradtools.backend.torch.compiled.operations import GUARD, Operation, facts, has_variable_shape, slots_in
from keras_gradtools.backend.torch.compiled.tensors import ARGUMENT, CONSTANT, Tensors
from keras_gradtools.backend.torch.compiled.uncompiled import Uncompiled
from keras_gradtools.blocks import Block
from keras_gradtools.keras_state import recording

_PLAIN = {torch.Tensor, torch.nn.Parameter}
_SHARED = "it changes a tensor whose memory it shares with NumPy or Python"


class Recorder(Block):
    """Records the operations of a block.

    - `operations`: the list of `Operation`s. `tensors`: their `Tensors`.
    - `reshapes`: whether an operation changes the shape of a tensor in place.
    - `draws`: whether they draw from torch's own random generators. `of_random_state`: the functions that read or set
      the state of these.
    - `gradients`: pairs of a Keras variable, of whose value `grad` was replaced, and the slot of the new one or None.
      `is_unproven`: whether `grad` was set where none was before, so that another call may do something else.
    - `refusal`: why what was recorded cannot be run again. None if it can.
    """

    def __init__(self, arguments):
        self.operations: list = []
        self.tensors = Tensors()
        self.refusal: str | None = None
        self.makes_variables = False
        self.reshapes = False
        self.draws = False
        self.is_unproven = False
        self.gradients: list = []
        self._grads: dict = {}
        self.of_random_state: set = set()
        self._random_state: list = []
        self._arguments = list(arguments)
        for i, x in enumerate(arguments):
            self.tensors.add(x, (ARGUMENT, i))
        self._mode: Any = _Mode(self._meet)
        self._leaks: Any = Leaks(self.refuse, self.tensors.has_constant_value, self.tensors.share, self._run)
        self._log: Any = _Reads(self)
        self._was_multithreaded = torch._C._is_multithreading_enabled()
        self._depths = torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()
        self._uncompiled = Uncompiled()

    def begin(self):
        notices.become_current(self)
        self._uncompiled.__enter__()
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
        self._uncompiled.__exit__()
        notices.become_current(None)
        self.tensors.release()

    def finish(self):
        """To be called after the block, unless it has raised an error."""
        if self.draws:
            self._check_random_state()
        self._look_at_grad()
        if self.tensors.has_unseen_changes():
            self.refuse(_SHARED)
        # They refer to the recorder. Without this cycle, what it holds is freed with it.
        self._mode = self._leaks = self._log = None

    def refuse(self, reason):
        if self.refusal is None:
            self.refusal = reason
            self.operations = []

    def note_variable(self, variable, value):
        """Notes that a reader of a Keras variable was given its own value."""
        if id(variable) not in self._grads:
            self._grads[id(variable)] = (variable, value.grad if value.is_leaf else None)
        self.tensors.add_variable(variable, value)

    def note_generator(self, generator, function, args):
        """Notes that `function(*args)` made a random generator."""
        if self.refusal is None:
            encoded, slot = self.tensors.encoded(args), self.tensors.add_generator(generator)
            self.operations.append(Operation(function, encoded, {}, (slot,), True, (), False))

    def read_random_state(self, read):
        with _no_modes():
            states = read()
        self.of_random_state.add(read)
        if self.refusal is None:
            slots = tuple([self.tensors.add(x) for x in states])
            self.operations.append(Operation(read, (), {}, slots, False, (), False))
        return states

    def write_random_state(self, write, states):
        self._check_random_state()
        with _no_modes():
            write(*states)
            self._random_state = _random_state()
        self.of_random_state.add(write)
        if self.refusal is None:
            self.operations.append(Operation(write, self.tensors.encoded(states), {}, (), False, (), True))

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
        tensors = self.tensors
        if function is torch.ops.aten.lift_fresh.default and args[0] not in tensors:
            # A copy, because the function may change it.
            tensors.add(args[0], (CONSTANT, args[0].detach().clone()), True)
            return function(*args)
        draws = found.draws and self._meet_draw(kwargs)
        encoded, named = tensors.encoded(args), {k: tensors.encoded(v) for k, v in kwargs.items()}
        is_constant = not found.draws and all(map(tensors.is_constant, slots_in((encoded, named))))
        result = function(*args, **kwargs)
        mutated = tuple(
            s for i, name in found.written for s in slots_in(encoded[i] if i < len(encoded) else named.get(name))
        )
        if draws:
            self._random_state = _random_state()
        if mutated:
            self._meet_writing(mutated, is_constant)
        if found.reshapes:
            self._meet_reshaping(function, mutated)
        is_single = not isinstance(result, (tuple, list))
        outputs = tuple(
            (tensors.slot_of(y) if mutated and y in tensors else tensors.add(y, None, is_constant))
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
            encoded = self.tensors.encoded((changed, *args))
            mutated = tuple(slots_in(encoded[0]))
            self._meet_writing(mutated, False)
            self.operations.append(Operation(function, encoded, {}, (), True, mutated, True))
        return None

    def _meet_value(self, function, args):
        value = function(*args)
        if self.tensors.has_constant_value(args[0]):
            return value
        if isinstance(value, bool):
            slot = self.tensors.slot_of(args[0])
            self.operations.append(Operation(GUARD, (slot, value), {}, (), True, (), True))
        else:
            self.refuse("Python reads the value of a tensor, as `float(x)`, `int(x)`, `x.item()` and `if x:` do")
        return value

    def _meet_draw(self, kwargs):
        """Returns whether a default generator draws. Only draws in sequence can be repeated."""
        generator = kwargs.get("generator")
        if generator is not None:
            if not self.tensors.has_generator(generator):
                self.refuse("it draws from a `torch.Generator`")
            return False
        self._check_random_state()
        self.draws = True
        return True

    def _look_at_grad(self):
        """Notes which `grad` of a variable's value the block has set. `backward()` sets these without an operation."""
        others = [*self._arguments, *self.tensors.captured()]
        if any(x.is_leaf and x.grad is not None and x.grad in self.tensors for x in others):
            self.refuse("it calls `backward()`, which sets `grad` of a tensor that is no Keras variable's value")
        for variable, before in self._grads.values():
            grad = variable._value.grad
            if grad is before:
                continue
            if before is None:
                # Perhaps a former `grad` would have been added to this one.
                self.is_unproven = True
            elif grad is None or grad in self.tensors:
                self.gradients.append((variable, None if grad is None else self.tensors.slot_of(grad)))
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
            self.tensors.overwrite(slot, is_constant)
            if self.tensors.is_shared(slot):
                self.refuse(_SHARED)
            if self.tensors.is_captured(slot):
                self.refuse("it changes a tensor in place that is no argument and no Keras variable's value")

    def _meet_reshaping(self, function, mutated):
        self.reshapes = True
        if any(self.tensors.sources[slot] is not None for slot in mutated):
            self.refuse(f"torch's operation `{function._schema.name}` changes the shape of a tensor that it was given")


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


def _random_state():
    with _no_modes():
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]
