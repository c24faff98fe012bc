"""Blocks that leave nothing behind, whatever ends them: an interrupt (Ctrl-C) can come between any two steps."""


class Block:
    """The time of a `with` block in which something is otherwise.

    `begin` does it and `end` undoes it. `end` may be called after any part of `begin`, and again after any part of
    itself: an interrupt inside one of them is raised once everything is undone. A generator with a `try` cannot do
    that: it waits at its `yield`, and an interrupt on the way from there to the block leaves it so.
    """

    def begin(self):
        raise NotImplementedError

    def end(self):
        raise NotImplementedError

    def __enter__(self):
        try:
            self.begin()
            return self
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *exception):
        try:
            self.end()
        except BaseException:
            self.end()
            raise
