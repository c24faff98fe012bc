"""The trace that JAX is in: making one for a tape, entering and leaving it, and what can be seen from it."""

import threading

from jax._src import core
from jax._src.array import ArrayImpl

from keras_gradtools.backend.jax.aliases import is_followable
from keras_gradtools.backend.jax.trace import TapeTrace


class _Thread(threading.local):
    def __init__(self):
        # One for all eager tapes of the thread, because the current trace is part of the keys of JAX's caches.
        self.eager = TapeTrace(core.eval_trace)


_thread = _Thread()


def trace_here():
    """The trace that a new tape must use here: the current one if that is a `TapeTrace`, else a new or eager one."""
    current = core.trace_ctx.trace
    if isinstance(current, TapeTrace):
        return current
    return _thread.eager if current is core.eval_trace else TapeTrace(current)


def enter(trace, tape):
    """Makes `trace` the current one, until `tape` leaves it."""
    trace.open_tapes.append(tape)
    core.trace_ctx.set_trace(trace)


def leave(trace, tape):
    """Makes the parent the current trace again when the last tape has left, in any order."""
    while tape in trace.open_tapes:
        trace.open_tapes.remove(tape)
    if not trace.open_tapes and core.trace_ctx.trace is trace:
        core.trace_ctx.set_trace(trace.parent)


def is_eager():
    """Whether operations run immediately, outside of all transformations of JAX."""
    current = core.trace_ctx.trace
    return (current.parent if isinstance(current, TapeTrace) else current) is core.eval_trace


def is_tracing_program():
    """Whether JAX traces a program inside the block of a tape. Its Python code may not run again."""
    return not isinstance(core.trace_ctx.trace, TapeTrace)


def follower():
    """A function that says whether a tape of an enclosing trace follows a value. None if no tape is recording."""
    levels, level = [], core.trace_ctx.trace
    while level is not None:
        levels.append(level)
        level = getattr(level, "parent_trace", None) or getattr(level, "parent", None)
    tapes = [tape for level in levels if isinstance(level, TapeTrace) for tape in level.tapes]
    return (lambda x: any(id(x) in tape.followed for tape in tapes)) if tapes else None


def is_visible(x, trace):
    """Whether `x` belongs to the level that `trace` records, or to one around it."""
    if not isinstance(x, core.Tracer):
        return True
    level = trace.parent
    while level is not None:
        if level is x._trace:
            return True
        level = getattr(level, "parent_trace", None) or getattr(level, "parent", None)
    return False


def is_traced(values):
    return any(isinstance(x, core.Tracer) for x in values)


def needs_alias(x):
    """Whether a tape could confuse `x` with another value: true of any array, and of a tracer if a tape is open.

    Without an open tape, a traced program must not contain our alias primitive, because exporters support only JAX's
    own primitives.
    """
    if isinstance(x, core.Tracer):
        return is_followable(x) and isinstance(core.trace_ctx.trace, TapeTrace)
    return isinstance(x, ArrayImpl) and is_followable(x)
