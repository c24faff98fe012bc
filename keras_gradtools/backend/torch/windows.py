"""The windows of sequence numbers in which a tape records.

Autograd has one graph and no tapes, but it numbers the nodes of each thread in the order of their creation.
"""

import bisect
import threading

import torch

# The sequence number of all nodes that accumulate the gradient of a leaf.
LEAF = 2**64 - 1


class _Thread(threading.local):
    def __init__(self):
        # Identifies this thread. A later thread may have the same `ident`, but not this object.
        self.key = object()


_thread = _Thread()


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
            windows.append(range(self._open[thread], LEAF))
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
