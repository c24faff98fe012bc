"""Computes the rows of a Jacobian in chunks, so that the memory of one chunk is freed before the next one."""

from keras import ops


def loop(fun, count, chunk_size):
    """Calls `fun(indices) -> list of tensors or None` on chunks of `0 ... count - 1`, and concatenates the results."""
    results = []
    for start in range(0, count, chunk_size):
        results.append(fun(ops.arange(start, min(start + chunk_size, count), dtype="int32")))
    return [None if column[0] is None else ops.concatenate(column, axis=0) for column in zip(*results, strict=True)]


class Present:
    """Removes None from the results of `fun`, because `tf.map_fn` and `jax.lax.map` accept only tensors."""

    def __init__(self, fun):
        self._fun = fun
        self._connected: list[bool] = []

    def __call__(self, *args):
        results = self._fun(*args)
        self._connected = [r is not None for r in results]
        return [r for r in results if r is not None]

    def restore(self, results):
        """Puts the Nones back."""
        results = iter(results)
        return [next(results) if c else None for c in self._connected]
