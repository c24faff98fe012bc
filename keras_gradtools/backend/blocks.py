"""Blocks that leave nothing behind, whatever ends them: an interrupt (Ctrl-C) can come between any two steps."""


class Block:
    """The time of a `with` block in which something is otherwise.

    `begin` does it and `end` undoes it. `end` may be called after any part of `begin`, and again after any part of
    itself: an interrupt inside one of them is raised once everything is undone. A generator with a `try` cannot do
    that: it waits at its `yield`, and an interrupt on the way from there to the block leaves it so.

    Python may raise an interrupt as `__exit__` begins, too, before any line of it. What nobody would end later is
    therefore entered twice, `with block, block:`, of which the second time does nothing but be left.
    """

    _is_open = False

    def begin(self):
        """Does it; a `Block` itself does nothing."""

    def end(self):
        """Undoes it."""

    def __enter__(self):
        if self._is_open:
            return self
        try:
            self._is_open = True
            self.begin()
            return self
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *exception):
        if not self._is_open:
            return
        try:
            self.end()
        except BaseException:
            self.end()
            raise
        finally:
            self._is_open = False
