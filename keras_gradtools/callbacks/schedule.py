"""When a callback does its work: after every epoch, or after every n batches."""

from keras_gradtools import validation


class Schedule:
    """The argument `every` of a callback: `"epoch"`, or a number of batches.

    Attributes:
        batches: Number of batches since `begin`. Not counted with `"epoch"`.
    """

    def __init__(self, owner, every):
        if not validation.is_one_of(every, ("epoch",)) and not validation.is_count(every):
            raise ValueError(
                f"{owner} expects 'epoch', or a positive number of batches, as `every`. Received: "
                f"every={validation.describe(every)}."
            )
        self._every, self.batches = every, 0

    def begin(self):
        """Sets the number of batches to 0."""
        self.batches = 0

    def is_due_next(self):
        """Whether the work is due after the batch that begins now."""
        return self._every != "epoch" and (self.batches + 1) % self._every == 0

    def is_due_after_batch(self):
        """Counts the batch that has just ended. Returns whether the work is due."""
        if self._every == "epoch":
            return False
        self.batches += 1
        return self.batches % self._every == 0

    def is_due_after_epoch(self):
        """Whether the work is due after every epoch."""
        return self._every == "epoch"
