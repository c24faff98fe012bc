"""Maps a function over the rows of tensors by TensorFlow's vectorizer, or one row at a time where that fails."""

import contextlib
import functools
import logging
import math
import threading
import warnings

import tensorflow as tf

_MOST_UNROLLED = 8
# An eager call is vectorized by a graph that is traced for it, which takes longer than a few dozen eager rows.
_MOST_EAGER_ROWS = 24
# With larger tensors, arithmetic takes most of the time, and is faster for all rows at once.
_MOST_EAGER_ELEMENTS = 2**18


def pays(stacks, tensors):
    """Whether vectorizing pays for derivatives of `tensors`. In an eager call, few small rows are faster one by one."""
    count = stacks[0].shape[0]
    if not tf.executing_eagerly() or count > _MOST_EAGER_ROWS:
        return True
    return count * sum(math.prod(x.shape) for x in tensors) > _MOST_EAGER_ELEMENTS


def loop_connected(fun, stacks):
    """Maps `fun` over axis 0 of `stacks`, one row at a time. A result that is None stays None."""
    rows = [fun([stack[i] for stack in stacks]) for i in range(stacks[0].shape[0])]
    return [None if column[0] is None else tf.stack(column) for column in zip(*rows, strict=True)]


def map_connected(fun, stacks, map_by=None):
    """Maps `fun` over axis 0 of `stacks`, by `map_by` or `map_rows`. A None among results stays."""
    connected = []

    def present(rows):
        results = fun(rows)
        connected[:] = [r is not None for r in results]
        # The map must return something, even if nothing is connected.
        return [r for r in results if r is not None] or [rows[0]]

    mapped = iter((map_by or map_rows)(present, stacks))
    return [next(mapped) if c else None for c in connected]


def map_rows(fun, stacks):
    """Maps `fun` over axis 0 of `stacks`, vectorized where that is possible."""
    if stacks[0].shape[0] == 1:
        return _row_by_row(fun, stacks)
    try:
        return vectorize(fun, stacks)
    except Exception as error:
        # The vectorizer has no error class of its own: it raises `TypeError`, `KeyError` and others.
        if stacks[0].shape[0] is None:
            raise
        reason = str(error).strip() or type(error).__name__
    # If the error came from `fun` itself, it is raised again here.
    results = _row_by_row(fun, stacks)
    warn_unvectorized(reason.splitlines()[-1].strip())
    return results


@contextlib.contextmanager
def _without_the_log_of_the_vectorizer():
    """Hides the vectorizer's log messages on this thread.

    If it cannot vectorize, it prints the graph in a thousand lines, where our warning has one. If it falls back to a
    loop, it asks the reader to fix TensorFlow.
    """
    thread = threading.get_ident()

    def keep(record):
        return record.levelno < logging.WARNING or record.thread != thread

    logger = tf.get_logger()
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _row_by_row(fun, stacks):
    count = stacks[0].shape[0]
    unrolled = count if tf.executing_eagerly() else min(count, _MOST_UNROLLED)
    rows = [fun([s[i] for s in stacks]) for i in range(unrolled)]
    results = [tf.stack(column) for column in zip(*rows, strict=True)]
    if unrolled == count:
        return results
    # A graph with every row unrolled would take long to trace.
    signature = [tf.TensorSpec(r.shape[1:], r.dtype) for r in results]
    rest = tf.map_fn(fun, [s[unrolled:] for s in stacks], fn_output_signature=signature)
    return [tf.concat(pair, 0) for pair in zip(results, rest, strict=True)]


def vectorize(fun, stacks):
    """Maps `fun` over axis 0 of `stacks`, vectorized. Where TensorFlow cannot, its error is raised."""
    with _without_the_log_of_the_vectorizer():
        if not tf.executing_eagerly():
            return tf.vectorized_map(fun, stacks, warn=False)
        # Run eagerly, `vectorized_map` makes a new function at every call, and TensorFlow would warn about retracing.
        compiled = tf.function(lambda: tf.vectorized_map(fun, stacks, warn=False), autograph=False)
        compiled._omit_frequent_tracing_warning = True
        return compiled()


@functools.cache
def warn_unvectorized(reason):
    warnings.warn(
        "TensorFlow cannot vectorize this computation. Jacobians are computed one row at a time, and per-example "
        f"gradients one example at a time, which is slower. TensorFlow said: {reason}",
        stacklevel=2,
    )
