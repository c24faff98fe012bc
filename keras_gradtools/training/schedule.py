"""When a callback does its work: after every epoch, after every n epochs, or after every n batches."""

import math
import re

from keras_gradtools import validation

_EPOCHS = re.compile(r"epoch|([1-9][0-9]*) epochs?")


class Schedule:
    """The argument `every` of a callback: `"epoch"`, a string such as `"5 epochs"`, or a number of batches.

    Attributes:
        counts_epochs: Whether the work is due at the end of epochs.
        batches: Number of batches since `begin`. Not counted if `counts_epochs`.
    """

    def __init__(self, owner, every):
        epochs = _EPOCHS.fullmatch(every) if isinstance(every, str) else None
        if epochs is None and not validation.is_count(every):
            expected = "'epoch', a number of epochs such as '5 epochs', or a positive number of batches,"
            raise validation.refused(owner, expected, "every", every)
        self.counts_epochs = epochs is not None
        self._every = int(epochs[1] or 1) if epochs else int(every)
        self.begin()

    def begin(self, steps=None):
        """Sets the number of batches to 0. `steps` is the number of batches of an epoch, if it is known."""
        self.batches = self._of_epoch = 0
        self._steps = steps or math.inf

    def is_due_after_batch(self, batch):
        """Counts the batches that have ended, up to index `batch` of the epoch. Returns whether the work is due."""
        if self.counts_epochs:
            return False
        is_due = self.will_be_due_after_batch(batch)
        self.batches, self._of_epoch = self._count_after(batch), batch + 1
        return is_due

    def will_be_due_after_batch(self, batch):
        """Whether the work will be due after the batch with index `batch` in the epoch, if no other ends before it."""
        return not self.counts_epochs and self._count_after(batch) // self._every > self.batches // self._every

    def is_due_after_epoch(self, epoch):
        """Whether the work is due after this epoch, counted from 0."""
        return self.counts_epochs and (epoch + 1) % self._every == 0

    def _count_after(self, batch):
        # A batch number that does not increase begins a new epoch. With `steps_per_execution`, several batches end at
        # once, and the number that Keras gives at the end of an epoch may be too large.
        of_epoch = self._of_epoch if batch >= self._of_epoch else 0
        return self.batches + min(batch + 1, self._steps) - of_epoch
