"""Lets functions that were compiled by `torch.compile` run uncompiled while calls are recorded."""

import sys
import threading
from typing import Any

import torch

from keras_gradtools.blocks import Block


class Uncompiled(Block):
    """A block in which functions compiled by `torch.compile` run uncompiled.

    Inside a mode, torch would run such a function uncompiled, too, but then leave it so for good.

    torch's own setting holds for the whole process, and restores what it found. So it is set by the first of several
    blocks that overlap on different threads, and restored by the last one.
    """

    _lock = threading.Lock()
    _blocks: set = set()
    _setting: Any = None

    def begin(self):
        with self._lock:
            self._blocks.add(id(self))
            if Uncompiled._setting is None and "torch._dynamo" in sys.modules:
                Uncompiled._setting = torch.compiler.set_stance("force_eager")

    def end(self):
        with self._lock:
            self._blocks.discard(id(self))
            if not self._blocks and Uncompiled._setting is not None:
                Uncompiled._setting.__exit__(None, None, None)
                Uncompiled._setting = None


def runs_compiled():
    """Whether the caller is part of a function that `torch.compile` is compiling, or runs."""
    if "torch._dynamo" not in sys.modules:
        return False
    # Between two graphs of such a function, `torch.compiler.is_compiling` is False.
    return torch.compiler.is_compiling() or torch._C._dynamo.eval_frame.get_eval_frame_callback() not in (None, False)
