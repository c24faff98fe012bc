"""The rows of a Jacobian a chunk at a time: what one needs is given back before the next."""

from keras import ops


def loop(fun, count, chunk_size):
    """Calls `fun(index) -> list of tensors or None` on the numbers below `count`, and joins what it returns."""
    results = []
    for start in range(0, count, chunk_size):
        results.append(fun(ops.arange(start, min(start + chunk_size, count), dtype="int32")))
    return [None if column[0] is None else ops.concatenate(column, axis=0) for column in zip(*results, strict=True)]


class Present:
    """Leaves out what is None, as the loops of compilers take tensors alone, and puts it back."""

    def __init__(self, fun):
        self._fun = fun
        self._connected: list[bool] = []

    def __call__(self, *args):
        results = self._fun(*args)
        self._connected = [r is not None for r in results]
        return [r for r in results if r is not None]

    def restore(self, results):
        results = iter(results)
        return [next(results) if c else None for c in self._connected]
