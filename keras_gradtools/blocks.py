"""`Block`, a context manager that always restores the state from before, even if Ctrl-C interrupts it.

Python may raise `KeyboardInterrupt` between any two bytecodes, so also inside `__enter__` and `__exit__`. A usual
context manager would then leave a tape recording, or a global mode changed. Code that changes such state should use a
`Block`.
"""

from typing import Any, Self


class Block:
    """A context manager that changes some state in `begin` and restores it in `end`.

    `end` must work after any part of `begin` has run, and again after any part of `end` has run. Then an interrupt
    inside either of them is raised only after everything is restored. `contextlib.contextmanager` with `try` and
    `finally` cannot do that: an interrupt between its `yield` and the first line of the `with` block skips the
    `finally`.

    An interrupt may also come when `__exit__` is called, before its first line. So where nothing else would call `end`
    later, write `with block, block:`. The second entry does nothing, and there are two calls of `__exit__`, so one
    that is interrupted is followed by another.
    """

    _is_open = False

    def begin(self) -> None:
        """Changes the state. The base class does nothing."""

    def end(self) -> None:
        """Restores the state."""

    def __enter__(self) -> Self:
        if self._is_open:
            return self
        try:
            self._is_open = True
            self.begin()
            return self
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *exception: Any) -> None:
        if not self._is_open:
            return
        try:
            self.end()
        except BaseException:
            self.end()
            raise
        finally:
            self._is_open = False
