"""Scalars and histograms in the files that TensorBoard reads."""

import math
import os
from typing import Any

import numpy as np


class EventFile:
    """A file of events in a folder, written by tensorboardX, which needs none of the frameworks."""

    def __init__(self, owner, folder):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ImportError(
                f"{owner} writes to `log_dir` with tensorboardX, which is not installed: "
                'pip install "keras-gradtools[tensorboard]"'
            ) from error
        self._writer: Any = SummaryWriter(os.fspath(folder))

    def scalars(self, values, step):
        """Adds a number for each tag, if it is finite: TensorBoard has no place for what is not."""
        for tag, value in values.items():
            if math.isfinite(value):
                self._writer.add_scalar(tag, value, step)

    def histograms(self, arrays, step):
        """Adds the distribution of the finite numbers of an array for each tag; none where there are none."""
        for tag, array in arrays.items():
            finite = array[np.isfinite(array)]
            if finite.size:
                self._writer.add_histogram(tag, finite, step)

    def flush(self):
        """Writes what was added: a training that is cut off leaves it behind."""
        self._writer.flush()

    def close(self):
        """Ends the file."""
        self._writer.close()
