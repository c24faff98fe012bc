"""Writes scalars and histograms to files that TensorBoard reads."""

import math
import os
from typing import Any

import numpy as np


def require_writer(owner):
    """Returns tensorboardX's writer. Raises `ImportError` that says how to install it."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError(
            f"{owner} writes to `log_dir` with tensorboardX, which is not installed: "
            'pip install "keras-gradtools[tensorboard]"'
        ) from error
    return SummaryWriter


class EventFile:
    """An event file in a folder. It is written by tensorboardX, which needs none of the frameworks."""

    def __init__(self, owner, folder):
        self._writer: Any = require_writer(owner)(os.fspath(folder))

    def scalars(self, values, step):
        """Adds a number for each tag. Skips those that are not finite, which TensorBoard cannot show."""
        for tag, value in values.items():
            if math.isfinite(value):
                self._writer.add_scalar(tag, value, step)

    def histograms(self, arrays, step):
        """Adds a histogram of the finite numbers of an array for each tag. Skips arrays without finite numbers."""
        for tag, array in arrays.items():
            finite = array[np.isfinite(array)]
            if finite.size:
                self._writer.add_histogram(tag, finite, step)

    def flush(self):
        """Writes what was added to disk, so that it survives if training is interrupted."""
        self._writer.flush()

    def close(self):
        """Closes the file."""
        self._writer.close()
