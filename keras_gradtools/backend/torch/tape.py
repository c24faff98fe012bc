"""The tape on torch, which has a graph but no tapes.

A tape makes the watched tensors require gradients inside its block, and remembers which nodes of autograd's graph were
created there. `graph` finds these nodes again.
"""

import threading

import torch

from keras_gradtools.backend.torch import borrowing, graph, levels, windows
from keras_gradtools.keras_state import recording

# torch's own advice, `detach`, leads to a derivative of None.
_NUMPY_IN_A_BLOCK = (
    "A tape is recording this tensor, and does not see what NumPy computes: use `keras.ops` in place of NumPy. With "
    "`detach`, the result would be a constant."
)


class _Thread(threading.local):
    def __init__(self):
        # Pairs of a tape inside its block and the grad mode from before it was entered.
        self.grad_modes = []


_thread = _Thread()


class Tape(recording.Recording):
    """The windows of sequence numbers in which the tape recorded, and the edges of the watched tensors.

    Inside the block, watched tensors require gradients, and grad mode is on, because Keras switches it off to build,
    evaluate and predict. Both are restored at the end of the block. Each edge is stored when its tensor is watched, so
    gradients can still be taken after the block.
    """

    def __init__(self, watch_accessed_variables):
        super().__init__(watch_accessed_variables)
        self._inside = False
        self._level = 0
        self._windows = windows.Windows()
        self._watched = {}
        self._since = {}
        self._renewed = {}
        self._borrowed = []

    def _forget(self):
        self._give_back()
        self._windows = windows.Windows()
        self._watched = {}
        self._since = {}
        self._renewed = {}
        self._borrowed = []

    def _give_back(self):
        for tensor, _ in self._borrowed:
            borrowing.give_back(tensor, self)

    def __exit__(self, kind=None, error=None, traceback=None):
        super().__exit__(kind, error, traceback)
        is_of_numpy = isinstance(error, RuntimeError) and "numpy() on Tensor that requires grad" in str(error)
        if is_of_numpy and _NUMPY_IN_A_BLOCK not in getattr(error, "__notes__", []):
            error.add_note(_NUMPY_IN_A_BLOCK)

    def begin(self):
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "A GradientTape cannot record under `torch.inference_mode()`. Received: a tape entered inside it. "
                "Use `torch.no_grad()` there, which a tape overrides, or `torch.inference_mode(False)` around it."
            )
        if self._windows.are_of_another_thread():
            raise RuntimeError(
                "On torch, a GradientTape cannot go on recording on another thread than the one it began on, because "
                "torch numbers the operations of each thread independently. Received: a tape entered again on another "
                "thread. Enter it on its first thread, or make a new tape."
            )
        super().begin()
        self._inside = True
        self._level = levels.depth()
        _thread.grad_modes.append([self, torch.is_grad_enabled()])
        torch.set_grad_enabled(True)
        for tensor, variable in self._borrowed:
            borrowing.borrow(tensor, self, variable)
        self._windows.open()

    def end(self):
        super().end()
        self._windows.close()
        self._give_back()
        self._inside = False
        self._restore_grad_mode()

    def _restore_grad_mode(self):
        entries = _thread.grad_modes
        tapes = [tape for tape, _ in entries]
        if self not in tapes:
            return
        place = tapes.index(self)
        _, before = entries[place]
        if place == len(entries) - 1:
            torch.set_grad_enabled(before)
        else:
            # A tape that was entered later is still inside its block. It now restores the mode from before this one.
            entries[place + 1][1] = before
        del entries[place]

    def pause(self):
        super().pause()
        self._windows.close()

    def resume(self):
        super().resume()
        self._windows.open()

    def reset(self):
        super().reset()
        self._forget()
        if self in recording.active_tapes():
            self._windows.open()

    def release(self):
        self._forget()
        # Values that a stateless scope gave to variables may hold a graph.
        self._read = {key: (variable, {}) for key, (variable, _) in self._read.items()}

    def watch(self, tensor, variable=None):
        if id(tensor) in self._watched:
            return
        if not levels.can_watch(tensor, self._level):
            if variable is None:
                raise levels.error(tensor)
            # No error: variables are watched when they are read, and most are never used as sources.
            return
        if tensor.grad_fn is None:
            self._require_grad(tensor, variable)
            edge = graph.leaf_edge(tensor)
        else:
            edge = (tensor.grad_fn, tensor.output_nr)
            if graph.reaches(tensor.grad_fn, self._recorded(), self._since):
                # It depends on another watched tensor, so the tape follows it already.
                return
        self._watched[id(tensor)] = (tensor, edge, tensor._version if tensor.grad_fn is not None else None)
        self._since[edge] = torch.autograd._get_sequence_nr()

    def _require_grad(self, tensor, variable):
        if tensor.is_inference() and not tensor.requires_grad:
            raise ValueError(
                "A GradientTape cannot watch a tensor that was made under `torch.inference_mode()`. Received: a "
                f"tensor of dtype {tensor.dtype} and shape {tuple(tensor.shape)}. Watch and use a copy of it, "
                "`keras.ops.copy(x)`, or make it under `torch.no_grad()`."
            )
        if tensor.requires_grad and not borrowing.is_borrowed(tensor):
            return
        self._borrowed.append((tensor, variable))
        borrowing.borrow(tensor, self, variable)

    def note_results(self, results):
        for y in results:
            if isinstance(y, torch.Tensor) and y._is_view():
                # If the base of a view was overwritten, torch creates the view's graph when `grad_fn` is read. Reading
                # it here puts that graph into this block.
                _ = y.grad_fn

    def edges(self, targets, sources):
        """The edges of `targets` and `sources`. None for a tensor that this tape does not follow."""
        target_edges, source_edges = list(map(self._edge, targets)), list(map(self._edge, sources))
        recorded = self._recorded()

        def target_edge(tensor, edge):
            if edge in self._since or edge and recorded(edge[0]._sequence_nr()):
                return edge
            if edge:
                graph.require_derivative(edge[0])
            if edge and tensor._is_view() and tensor._version and graph.leads_to(edge[0], recorded):
                # Either torch has created the node of a view from the block only now, or the user has overwritten the
                # view after the block. These two cases cannot be told apart.
                raise _overwritten_error(tensor)
            return None

        def source_edge(edge):
            connected = edge in self._since or edge and graph.reaches(edge[0], recorded, self._since)
            return edge if connected else None

        return list(map(target_edge, targets, target_edges)), list(map(source_edge, source_edges))

    def require_unchanged(self, source):
        """Raises `RuntimeError` if `source`, which seems unconnected, was overwritten after it was watched."""
        _, _, version = self._watched.get(id(source), (None, None, None))
        if id(source) in self._renewed or version is not None and source._is_view() and source._version != version:
            raise _overwritten_error(source)

    def depends(self, value, others):
        edges = {edge: self._since.get(edge, 0) for edge in map(self._edge, others) if edge is not None}
        return value.grad_fn is not None and graph.reaches(value.grad_fn, self._recorded(), edges)

    def _recorded(self):
        return self._windows.membership(self._inside)

    def _edge(self, tensor):
        if id(tensor) in self._watched:
            return self._watched[id(tensor)][1]
        start = torch.autograd._get_sequence_nr()
        node = tensor.grad_fn
        stop = torch.autograd._get_sequence_nr()
        if stop > start:
            # A view whose base was overwritten. It is a view of the new value, and torch has just created its graph.
            self._windows.renew(range(start, stop))
            self._renewed[id(tensor)] = tensor
        return None if node is None else (node, tensor.output_nr)

    def slice(self, roots):
        return graph.Slice(roots, self._recorded(), self._since)


def _overwritten_error(tensor):
    return RuntimeError(
        "A GradientTape cannot follow a view of a tensor that was overwritten in place after the view was taken. "
        f"Received: a tensor of dtype {tensor.dtype} and shape {tuple(tensor.shape)}, a view whose value has changed. "
        "Compute without in-place operations, or take a copy, `keras.ops.copy(x)`, instead of the view, inside the "
        "block."
    )


def _watch_read(variable, value, tapes):
    if not value.is_floating_point():
        return value
    for tape in tapes:
        tape.watch(value, variable)
        tape.note_read(variable, value, recording.is_lent(variable, value))
    return value


def grad_mode_outside():
    """The grad mode from before the outermost block of a tape on this thread."""
    return _thread.grad_modes[0][1] if _thread.grad_modes else True


def install():
    recording.install_read_hook(_watch_read)
