"""The tape on torch, whose graph has none: see `torch_graph` for what a tape has recorded of it."""

import threading

import torch

from keras_gradtools.backend import recording, torch_graph


class _Thread(threading.local):
    def __init__(self):
        # For each tape inside its block, the grad mode before it was entered.
        self.grad_modes = []


_thread = _Thread()


class Tape(recording.Recording):
    """Windows of sequence numbers, and the edges of what is watched.

    Inside the block the watched tensors require gradients, and grad mode is on: Keras builds, evaluates and
    predicts without. Both are put back at the end of the block. The edges are kept from the time of
    watching on, so that gradients can still be asked for then.
    """

    def __init__(self, watch_accessed_variables):
        super().__init__(watch_accessed_variables)
        self._inside = False
        self._windows = torch_graph.Windows()
        self._watched = {}
        self._since = {}
        self._borrowed = []

    def _forget(self):
        self._give_back()
        self._windows = torch_graph.Windows()
        self._watched = {}
        self._since = {}
        self._borrowed = []

    def _give_back(self):
        for tensor, _ in self._borrowed:
            torch_graph.give_back(tensor, self)

    def begin(self):
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "A GradientTape cannot record under `torch.inference_mode()`. Received: a tape entered inside it. "
                "Use `torch.no_grad()` there, which a tape overrides, or `torch.inference_mode(False)` around it."
            )
        if self._windows.are_of_another_thread():
            raise RuntimeError(
                "On torch, a GradientTape cannot go on recording on another thread than the one it began on, where the "
                "graph is numbered anew. Received: a tape entered again elsewhere. Enter it on its own thread, or make "
                "a new tape."
            )
        super().begin()
        self._inside = True
        _thread.grad_modes.append([self, torch.is_grad_enabled()])
        torch.set_grad_enabled(True)
        for tensor, variable in self._borrowed:
            torch_graph.borrow(tensor, self, variable)
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
            # The tape that was entered next is still inside its block: it restores what this one would have.
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
        # The values that a stateless scope lent its variables may hold a graph.
        self._read = {key: (variable, {}) for key, (variable, _) in self._read.items()}

    def watch(self, tensor, variable=None):
        if id(tensor) in self._watched:
            return
        if tensor.grad_fn is None:
            self._require_grad(tensor, variable)
            edge = torch_graph.leaf_edge(tensor)
        else:
            edge = (tensor.grad_fn, tensor.output_nr)
            if torch_graph.reaches(tensor.grad_fn, self._recorded(), self._since):
                # It is followed already, as a part of what it was computed from.
                return
        self._watched[id(tensor)] = (tensor, edge)
        self._since[edge] = torch.autograd._get_sequence_nr()

    def _require_grad(self, tensor, variable):
        if tensor.is_inference() and not tensor.requires_grad:
            raise ValueError(
                "A GradientTape cannot watch a tensor that was made under `torch.inference_mode()`. Received: a "
                f"tensor of dtype {tensor.dtype} and shape {tuple(tensor.shape)}. Watch and use a copy of it, "
                "`keras.ops.copy(x)`, or make it under `torch.no_grad()`."
            )
        if tensor.requires_grad and not torch_graph.is_borrowed(tensor):
            return
        self._borrowed.append((tensor, variable))
        torch_graph.borrow(tensor, self, variable)

    def edges(self, targets, sources):
        """The edges of `targets` and `sources`, None for what this tape does not follow."""
        recorded = self._recorded()

        def target_edge(tensor):
            edge = self._edge(tensor)
            return edge if edge in self._since or edge and recorded(edge[0]._sequence_nr()) else None

        def source_edge(tensor):
            edge = self._edge(tensor)
            connected = edge in self._since or edge and torch_graph.reaches(edge[0], recorded, self._since)
            return edge if connected else None

        return [target_edge(t) for t in targets], [source_edge(s) for s in sources]

    def depends(self, value, others):
        edges = {edge: self._since.get(edge, 0) for edge in map(self._edge, others) if edge is not None}
        return value.grad_fn is not None and torch_graph.reaches(value.grad_fn, self._recorded(), edges)

    def _recorded(self):
        return self._windows.membership(self._inside)

    def _edge(self, tensor):
        if id(tensor) in self._watched:
            return self._watched[id(tensor)][1]
        return None if tensor.grad_fn is None else (tensor.grad_fn, tensor.output_nr)

    def slice(self, roots):
        return torch_graph.Slice(roots, self._recorded(), self._since)


def _watch_read(variable, value, tapes):
    if not value.is_floating_point():
        return value
    for tape in tapes:
        tape.watch(value, variable)
        tape.note_read(variable, value, recording.is_lent(variable, value))
    return value


def grad_mode_outside():
    """The grad mode outside of all tapes' blocks."""
    return _thread.grad_modes[0][1] if _thread.grad_modes else True


def install():
    recording.install_read_hook(_watch_read)
