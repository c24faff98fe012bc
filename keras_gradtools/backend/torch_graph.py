"""Finds the nodes of autograd's graph that a tape has recorded, and runs a backward pass through these only.

Autograd has one graph and no tapes, but it numbers the nodes of each thread in the order of their creation. So a tape
is a set of windows of these sequence numbers. An edge is a pair `(node, output number)`, as in `next_functions`. The
gradient of one tensor arrives there.
"""

import bisect
import functools
import re
import threading

import torch

from keras_gradtools.backend import torch_formulas, torch_levels
from keras_gradtools.backend.blocks import Block

# The sequence number of all nodes that accumulate the gradient of a leaf.
_LEAF = 2**64 - 1


class _Thread(threading.local):
    def __init__(self):
        # Identifies this thread. A later thread may have the same `ident`, but not this object.
        self.key = object()
        self.passes = []


_thread = _Thread()


class GradMode(Block):
    """A block with another grad mode. Unlike torch's context managers, it is safe against an interrupt."""

    def __init__(self, enabled):
        self._enabled, self._before = enabled, torch.is_grad_enabled()

    def begin(self):
        torch._C._set_grad_enabled(self._enabled)

    def end(self):
        torch._C._set_grad_enabled(self._before)


class Windows:
    """The sequence numbers of the nodes that were created while a tape was recording, for each thread."""

    def __init__(self):
        self._open = {}
        self._closed = {}
        self._renewed = []

    def open(self):
        self._open[_thread.key] = torch.autograd._get_sequence_nr()

    def close(self):
        thread = _thread.key
        start = self._open.pop(thread, None)
        if start is not None:
            self._closed.setdefault(thread, []).append(range(start, torch.autograd._get_sequence_nr()))

    def renew(self, numbers):
        """Adds the numbers of nodes of recorded tensors that torch creates only later, when `grad_fn` is read."""
        self._renewed.append(numbers)

    def are_of_another_thread(self):
        return any(thread is not _thread.key for thread in self._closed)

    def membership(self, inside):
        """Returns `recorded(number) -> bool`, for nodes that the calling thread uses.

        Threads number their nodes independently. While the tape is `inside` its block, another thread has recorded
        nothing, whatever its numbers are. After the block, the tape can be used on another thread.
        """
        thread = _thread.key
        windows = list(self._closed.get(thread, []))
        if thread in self._open:
            windows.append(range(self._open[thread], _LEAF))
        elif not windows and not inside:
            windows = _merged(w for closed in self._closed.values() for w in closed)
        if self._renewed:
            windows = _merged([*windows, *self._renewed])
        if len(windows) == 1:
            return windows[0].__contains__
        starts = [w.start for w in windows]

        def recorded(number):
            place = bisect.bisect(starts, number)
            return place > 0 and number in windows[place - 1]

        return recorded


def _merged(windows):
    """The union of windows, which may overlap if they come from several threads."""
    merged = []
    for window in sorted(windows, key=lambda w: w.start):
        if merged and window.start <= merged[-1].stop:
            merged[-1] = range(merged[-1].start, max(merged[-1].stop, window.stop))
        else:
            merged.append(window)
    return merged


def leaf_edge(tensor):
    """The edge that an operation on `tensor`, a leaf that requires gradients, would have."""
    block = GradMode(True)
    with block, block, torch_levels.outside(tensor):
        return tensor.view_as(tensor).grad_fn.next_functions[0]


class Slice:
    """The part of the graph that is reached from some nodes through nodes of the tape.

    `recorded(number)` says whether the tape has recorded a node. `watched` maps each watched edge to the sequence
    number at which watching began.

    - `boundaries`: The first nodes that are not recorded. Gradients must stop there.
    - `early`: For each node that used a tensor before it was watched, the positions of these edges.
    - `leaves`: The nodes of all leaves that were reached.
    - `nodes`: All nodes that were reached.
    """

    def __init__(self, roots, recorded, watched):
        self.boundaries, self.early, self.leaves = [], {}, []
        self.nodes = seen = set()
        stack = []

        def meet(node):
            seen.add(node)
            number = node._sequence_nr()
            if recorded(number):
                stack.append((node, number))
            elif number == _LEAF:
                require_derivative(node)
                self.leaves.append(node)
            else:
                self.boundaries.append(node)

        for node, _ in roots:
            if node not in seen:
                meet(node)
        while stack:
            node, number = stack.pop()
            for position, edge in enumerate(node.next_functions):
                following = edge[0]
                if following is None:
                    continue
                if edge in watched and number < watched[edge]:
                    self.early.setdefault(node, set()).add(position)
                if following not in seen:
                    meet(following)

    def is_used_outside(self):
        """Whether it leads to a leaf that requires gradients, but not only because of a tape."""
        return any(_requires_grad(leaf) for leaf in self.leaves) or is_used_outside(self.boundaries)


def is_used_outside(nodes):
    """As `Slice.is_used_outside`, for everything that `nodes` were computed from."""
    seen, stack = set(nodes), list(nodes)
    while stack:
        node = stack.pop()
        if node._sequence_nr() == _LEAF and _requires_grad(node):
            return True
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return False


def _requires_grad(leaf):
    variable = getattr(leaf, "variable", None)
    return variable is not None and variable.requires_grad and not is_borrowed(variable)


def require_derivative(node):
    """Raises `RuntimeError` if `node` stands for an operation without derivative, which torch would silently omit."""
    if node._sequence_nr() != _LEAF or hasattr(node, "variable"):
        return
    try:
        node(torch.zeros(()))
    except RuntimeError as error:
        words = str(error)
    else:
        words = node.name()
    raise RuntimeError(_no_derivative(words) or _differentiable_once(words))


def _no_derivative(words):
    """The error message for an operation without derivative, from torch's message `words`. None for other messages."""
    found = re.search(r"derivative for '?(?:aten::)?_?(\w+?)(_backward)?'? is not implemented", words)
    if found is None:
        return None
    operation, is_second = found.groups()
    return (
        f"torch has no {'second ' if is_second else ''}derivative of its operation `{operation}`. Received: torch's "
        f"error {words!r}. Compute it from other operations, or give it a gradient with "
        "`keras_gradtools.custom_gradient`."
    )


def _differentiable_once(words):
    return (
        "A GradientTape was asked for a second derivative through a torch.autograd.Function that is marked with "
        f"`once_differentiable`, and has none. Received: torch's error {words!r}. Write its backward pass in "
        "differentiable torch operations and remove the mark, or use `keras_gradtools.custom_gradient`."
    )


def reaches(node, recorded, watched):
    """Whether `node` depends on a watched tensor through recorded nodes."""
    seen, stack = {node}, [node]
    while stack:
        node = stack.pop()
        number = node._sequence_nr()
        if not recorded(number):
            continue
        for edge in node.next_functions:
            if edge in watched and number >= watched[edge]:
                return True
            if edge[0] is not None and edge[0] not in seen:
                seen.add(edge[0])
                stack.append(edge[0])
    return False


def leads_to(node, recorded):
    """Whether following `node` back through nodes with one input, such as views, reaches a recorded node."""
    while True:
        following = [f for f, _ in node.next_functions if f is not None]
        if len(following) != 1:
            return False
        (node,) = following
        if recorded(node._sequence_nr()):
            return True


class passing(Block):  # noqa: N801 - said of a block
    """A block in which a backward pass stays inside `part`, a `Slice`, and runs on the calling thread only.

    Other threads of autograd's engine would number the nodes of a recorded pass independently. The leaves require
    gradients as when they were recorded, because torch checks that on saved tensors (`linalg.solve`), and a checkpoint
    computes with them again. With `is_recorded`, the pass can be differentiated to any order.
    """

    def __init__(self, part, is_recorded):
        self._part = part
        self._is_recorded = is_recorded
        self._handles = []
        self._was_multithreaded = torch._C._is_multithreading_enabled()
        self._levels = torch._C._functorch.get_dynamic_layer_stack_depth()

    def begin(self):
        _thread.passes.append(self)
        for leaf in self._part.leaves:
            borrow(leaf.variable, self)
        if self._is_recorded:
            for node, formula in torch_formulas.of(self._part.nodes):
                self._hook(node.register_hook, functools.partial(self._replace_by, formula))
        for node in self._part.boundaries:
            self._hook(node.register_prehook, self._stop)
        for node, positions in self._part.early.items():
            self._hook(node.register_hook, functools.partial(self._stop_at, positions))
        torch._C._set_multithreading_enabled(False)

    def _hook(self, register, hook):
        # `extend` with `map` runs in C, so an interrupt cannot come between registering a hook and keeping its handle.
        self._handles.extend(map(register, (hook,)))

    def end(self):
        torch._C._set_multithreading_enabled(self._was_multithreaded)
        # A vectorized pass opens a level of functorch, which an interrupt may leave open.
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(self._levels)
        for handle in self._handles:
            handle.remove()
        for leaf in self._part.leaves:
            give_back(leaf.variable, self)
        while self in _thread.passes:
            _thread.passes.remove(self)

    def __exit__(self, kind=None, error=None, traceback=None):
        was_open = self._is_open
        super().__exit__(kind, error, traceback)
        if was_open and isinstance(error, RuntimeError):
            _raise_clear_error(error)

    def _is_this_pass(self):
        # Hooks are called in every pass. Another one may reach the same nodes, on another thread or inside this pass.
        return bool(_thread.passes) and _thread.passes[-1] is self

    def _stop(self, gradients):
        # None, because zeros would become NaN where a derivative is infinite.
        return (None,) * len(gradients) if self._is_this_pass() else None

    def _replace_by(self, formula, gradients, upstream):
        if not self._is_this_pass():
            return None
        # Only the gradients that this pass needs.
        replaced = formula(upstream, gradients)
        return tuple(r if g is not None else None for g, r in zip(gradients, replaced, strict=True))

    def _stop_at(self, positions, gradients, _):
        if self._is_this_pass():
            return tuple(None if i in positions else g for i, g in enumerate(gradients))
        return None


def _raise_clear_error(error):
    if _no_derivative(str(error)):
        raise RuntimeError(_no_derivative(str(error))) from error
    if "inplace operation" in str(error):
        raise RuntimeError(
            "A tensor or variable that the tape's block has read was overwritten before the derivative was taken. "
            "torch assigns to a variable in place, so the value that the derivative needs no longer exists. Take the "
            "derivative before `assign` (or the optimizer's step), or let the block read a copy: "
            f"`keras.ops.copy(variable)`. Received: torch's error about an inplace operation: {error}"
        ) from error


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
        torch_levels.require_grad(tensor, True)


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
            torch_levels.require_grad(tensor, unfrozen)
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
