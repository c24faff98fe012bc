"""`kg.jit` on torch: the operations of a call are recorded, and run again in later calls.

The first two calls with one structure, shapes and dtypes of the arguments run eagerly and are recorded. So they have
the same results and effects as without `kg.jit`. If both ran the same operations with the same constants, later calls
only run these. Otherwise the function depends on something that is neither an argument nor a Keras variable, such as
NumPy's random numbers or a counter in Python, and runs eagerly from then on.

A call also runs eagerly where its graph is needed: under a tape, inside another transform, where another mode of torch
sees its operations, and once torch itself has differentiated a result, as `loss.backward()` does.
"""

import collections
import functools
import threading
from typing import Any

import keras
import numpy as np
import torch

from keras_gradtools import nesting
from keras_gradtools.backend.torch import graph, levels
from keras_gradtools.backend.torch.compiled import notices
from keras_gradtools.backend.torch.compiled.differentiable import Differentiable
from keras_gradtools.backend.torch.compiled.program import Diverged, Program
from keras_gradtools.backend.torch.compiled.recorded_call import RecordedCall
from keras_gradtools.backend.torch.compiled.recorder import Recorder
from keras_gradtools.backend.torch.compiled.uncompiled import runs_compiled
from keras_gradtools.backend.torch.random_numbers import get_device, random_state, set_random_state
from keras_gradtools.keras_internals.layers import get_keras_mask, set_keras_mask
from keras_gradtools.keras_state import recording, scopes

# At most this many signatures per function.
_MOST_SIGNATURES = 256
# At most this many calls of a signature are recorded: two, and two more for each path through the bools that it reads.
_MOST_RECORDINGS = 10
# So often a call may differ from the call before it with the same bools. The first call may still build something.
_MOST_CHANGES = 2


def jit(fun: Any, compiler: str | None = None) -> Any:
    signatures: collections.OrderedDict = collections.OrderedDict()
    lock = threading.Lock()

    @functools.wraps(fun)
    def compiled(*args, **kwargs):
        outline, leaves = nesting.split((args, kwargs))
        leaves = [_converted(x) for x in leaves]
        if not may_replay():
            return _called(fun, outline, leaves)
        try:
            key = (outline, _ambient(), *map(_kind, leaves))
            signature = signatures.get(key)
        except TypeError:  # a constant that is not hashable, or a tensor that cannot be given to a program
            return _called(fun, outline, leaves)
        if signature is None:
            with lock:
                signature = signatures.setdefault(key, Signature(fun, outline, compiler))
                if len(signatures) > _MOST_SIGNATURES:
                    signatures.popitem(last=False)
        result = signature(leaves)
        call.refusal = signature.refusal
        return result

    call: Any = compiled
    call.refusal = None
    return call


def may_replay():
    """Whether a call can be recorded here, or run from its record."""
    return not (
        notices.current() is not None
        or recording.is_recording()
        or scopes.in_scope()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or levels.depth()
        or levels.is_in_vectorized_pass()
        or torch.is_inference_mode_enabled()
        or torch._C._is_any_autocast_enabled()
        or runs_compiled()
    )


def _called(fun, outline, leaves):
    args, kwargs = outline.pack(leaves)
    return fun(*args, **kwargs)


def _converted(x):
    # As on the other backends: floats and arrays are inputs, and not constants of a program.
    if isinstance(x, float):
        return keras.ops.convert_to_tensor(x, keras.config.floatx())
    if isinstance(x, (np.ndarray, np.generic)) and x.dtype.kind in "biuf":
        return keras.ops.convert_to_tensor(x)
    return x


def _ambient():
    return (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        get_device(),
    )


def _kind(x):
    if isinstance(x, torch.Tensor):
        is_plain = type(x) in (torch.Tensor, torch.nn.Parameter) and x.layout == torch.strided and not x.is_complex()
        if not is_plain or get_keras_mask(x) is not None:
            raise TypeError
        return x.shape, x.stride(), x.dtype, x.device, x.requires_grad
    if isinstance(x, keras.Variable):
        return keras.Variable, id(x)
    hash(x)
    # True == 1 == 1.0 in Python, but not to a function that branches on them.
    return type(x), x


class Signature:
    """The programs of a function for one signature of its arguments."""

    def __init__(self, fun, outline, compiler=None):
        self._fun, self._outline, self._compiler = fun, outline, compiler
        self._programs: list = []
        self._recorded: list = []
        self._recordings = self._changes = 0
        self.refusal: str | None = None

    def __call__(self, leaves):
        if self.refusal is not None:
            return _called(self._fun, self._outline, leaves)
        if any(p.is_differentiated for p in self._programs):
            # Otherwise the forward pass would be computed again for each gradient.
            return _called(self._fun, self._outline, leaves)
        for program in self._programs:
            captured = program.captured_if_valid()
            if captured is not None:
                try:
                    return program(leaves, captured)
                except Diverged:
                    continue
        return self._record(leaves)

    def _record(self, leaves):
        places = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)]
        given = list(leaves)
        for i in places:
            # An argument may also be captured, or be the value of a variable. As an alias, it is neither.
            given[i] = leaves[i].view_as(leaves[i]) if leaves[i].requires_grad else leaves[i].detach()
        found = Recorder([given[i] for i in places])
        with found, found:
            result = _called(self._fun, self._outline, given)
        found.finish()
        call = RecordedCall(found, result)
        self._keep(call, places)
        aliases = {id(given[i]): leaves[i] for i in places}
        return nesting.map_structure(lambda x: aliases.get(id(x), x), result)

    def _keep(self, call, places):
        found = call.recorder
        if found.makes_variables:
            # The next call will read them instead.
            return
        self._recordings += 1
        if any(call.requires_grad) and any(x.requires_grad for x in call.captured):
            found.refuse("it captures a tensor that requires gradients. Pass it as an argument instead")
        former = [] if found.is_unproven else [c for c in self._recorded if c.guards == call.guards]
        is_as_before = any(other.is_as(call) for other in former)
        self._changes += bool(former) and not is_as_before
        if self._recordings > _MOST_RECORDINGS or self._changes > _MOST_CHANGES:
            found.refuse("what it computes changes from call to call, other than by its arguments and Keras variables")
        if found.refusal is not None:
            self.refusal, self._programs, self._recorded = found.refusal, [], []
            return
        if found.is_unproven:
            return
        if is_as_before:
            self._recordings = self._changes = 0
            program = _Replayed(self._fun, self._outline, call, places, self._compiler)
            self._programs = [program, *[p for p in self._programs if p.guards != call.guards]]
        self._recorded = [c for c in self._recorded if c.guards != call.guards]
        if not is_as_before:
            self._recorded.append(call)


class _Replayed:
    """A program with the structure of its result, for certain values of the bools that Python reads."""

    def __init__(self, fun, outline, call, places, compiler):
        self._fun, self._outline, self._call = fun, outline, call
        self.guards = call.guards
        self.is_differentiated = False
        more = [slot for _, slot in call.masks] + [slot for _, slot in call.gradients if slot is not None]
        self._program = program = Program(call.recorder, call.outputs + more, compiler)
        self._arguments = [places[i] for i in program.arguments]
        self._described = [(v, v._value.dtype, v._value.shape, v._value.requires_grad) for v in program.variables]
        self._attached = [i for i, needed in enumerate(call.requires_grad) if needed]
        if any(v._value.requires_grad for v in program.written_variables):
            # Its results cannot be differentiated with respect to weights that it has overwritten.
            self._attached = []
        call.recorder = call.captured = None

    def captured_if_valid(self):
        """The captured tensors, or None if what it captures and reads is no longer as it was."""
        for variable, dtype, shape, requires_grad in self._described:
            x = variable._value
            if x.requires_grad != requires_grad or x.dtype != dtype or x.shape != shape:
                return None
        captured = [reference() for reference in self._program.captured]
        return None if any(x is None for x in captured) else captured

    def __call__(self, leaves, captured):
        program, call = self._program, self._call
        given = [leaves[i] for i in self._arguments]
        given += [v._value for v in program.variables]
        given += captured
        source = Differentiable(self._again, leaves, program, self._note_use) if self._attached else None
        no_grad = graph.GradMode(False)
        with no_grad, no_grad:
            if program.is_replayed:
                # The operations were recorded below autograd, so they need none of it.
                with torch._C._AutoDispatchBelowAutograd():
                    found = self._guarded(given) if self.guards else program.function(*given)
            else:
                found = program.function(*given)
        more = iter(found[len(call.outputs) :])
        masks = [(i, next(more)) for i, _ in call.masks]
        for variable, slot in call.gradients:
            variable._value.grad = None if slot is None else next(more)
        if source is not None:
            found = source.attached(found, self._attached)
        for i, mask in masks:
            set_keras_mask(found[i], mask)
        leaves = [c if i is None else found[i] for i, c in zip(call.order, call.constants, strict=True)]
        return call.outline.pack(leaves)

    def _note_use(self):
        self.is_differentiated = True

    def _guarded(self, given):
        program = self._program
        saved = [(given[i], given[i].clone()) for i in program.restored]
        state = random_state() if program.draws_before_guard else None
        try:
            return program.function(*given)
        except Diverged:
            for x, value in saved:
                x.copy_(value)
            if state is not None:
                set_random_state(state)
            raise

    def _again(self, leaves):
        result = _called(self._fun, self._outline, leaves)
        return [x for x in nesting.flatten(result) if isinstance(x, torch.Tensor)]
