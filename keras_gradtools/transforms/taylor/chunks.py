"""How many directions a forward pass carries at once, and the loop over them."""

import math
from typing import Any, NamedTuple

from keras import ops

from keras_gradtools import backend, memory, validation
from keras_gradtools.annotations import ChunkSize
from keras_gradtools.backend import chunks
from keras_gradtools.backend.steps import LINEAR

# Stacks of this size, for each thread, stay in the caches of a processor. Much larger ones are slower by 1.1 to 3 times
# (`python -m benchmarks.differential_operators`). With fewer directions than these, other costs are larger.
_CACHED_BYTES = 2**19
_FEWEST_CACHED = 16


class Chunks(NamedTuple):
    """The options `chunk_size` and `memory_budget`. Hashable, so that they can be part of a cache key.

    `is_last` says that no other derivative will be taken of the pass. Only then do chunks that fit the caches pay on
    every backend, because the values of a loop are kept for a derivative of it.
    """

    chunk_size: ChunkSize = "auto"
    memory_budget: int | None = None
    is_last: bool = False

    def size(self, steps, count, pairs=False):
        """How many of `count` directions to carry at once through `steps`. With `pairs`, each of them is two.

        `steps` may be None. Then `"auto"` means all of them, as where a shape is not known.
        """
        if self.chunk_size != "auto":
            return min(self.chunk_size or count, count)
        sizes = [_bytes(step) for step in steps or ()]
        if None in sizes:
            return count
        # Most of the time goes into the stacks around curved operations.
        curved = [n for n, step in zip(sizes, steps or (), strict=True) if step.kind != LINEAR]
        factor = 2 if pairs else 1
        return min(
            self._within_memory(factor * sum(sizes), count), self._within_caches(factor * max(curved, default=0), count)
        )

    def _within_memory(self, computed, count):
        # Each result may have a derivative, and a product on the way to it.
        budget = self.memory_budget or memory.budget()
        return min(max((budget - computed) // max(2 * computed, 1), 1), count)

    def _within_caches(self, widest, count):
        threads = backend.threads() if self.is_last or backend.CHUNKS_ALWAYS_PAY else None
        if threads is None:
            return count
        number = min(math.ceil(count * widest / (threads * _CACHED_BYTES)), count // _FEWEST_CACHED)
        return math.ceil(count / max(number, 1))

    def mapped(self, fun, rows, count, size, join):
        """`fun(*rows) -> tensor or None`, or `join` of its results for chunks of rows, which are along a new axis 0.

        `rows` are arrays with `count` rows, or None. `size` is that of a chunk. Rows of zeros fill up the last one.
        """
        if size >= count:
            return fun(*rows)
        number = -(-count // size)
        blocks = [None if x is None else _in_blocks(x, number, size) for x in rows]

        def of_block(index):
            found = fun(*(None if b is None else ops.take(b, index, axis=0)[0] for b in blocks))
            return [None if found is None else found[None]]

        # A derivative of a loop inside a program is slower than that of its turns one after the other.
        loop = backend.map_chunks if self.is_last else chunks.loop
        (found,) = loop(of_block, number, 1)
        return None if found is None else join(found)


def _bytes(step):
    """The size of the results of a step. None if it is not known."""
    if not all(isinstance(n, int) for x in step.results for n in x.shape):
        return None
    return sum(memory.bytes_of(tuple(x.shape), validation.dtype_of(x)) for x in step.results)


def _in_blocks(x: Any, number, size):
    missing = number * size - x.shape[0]
    if missing:
        x = ops.concatenate([x, ops.zeros((missing, *ops.shape(x)[1:]), dtype=x.dtype)], axis=0)
    return ops.reshape(x, (number, size, *ops.shape(x)[1:]))
