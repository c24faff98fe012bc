"""When a callback does its work: after epochs, or after so many batches."""

from keras_gradtools import validation


class Schedule:
    """`every`, as callbacks take it: `"epoch"`, or a number of batches.

    Attributes:
        batches: how many there were since `begin`, where they are counted.
    """

    def __init__(self, owner, every):
        if not validation.is_one_of(every, ("epoch",)) and not validation.is_count(every):
            raise ValueError(
                f"{owner} expects 'epoch', or a positive number of batches, as `every`. Received: "
                f"every={validation.describe(every)}."
            )
        self._every, self.batches = every, 0

    def begin(self):
        """Counts batches from here."""
        self.batches = 0

    def is_due_next(self):
        """Whether the batch that begins is one after which the work is due."""
        return self._every != "epoch" and (self.batches + 1) % self._every == 0

    def is_due_after_batch(self):
        """Whether the batch that has just ended is one after which the work is due."""
        if self._every == "epoch":
            return False
        self.batches += 1
        return self.batches % self._every == 0

    def is_due_after_epoch(self):
        """Whether it is due after each epoch."""
        return self._every == "epoch"
