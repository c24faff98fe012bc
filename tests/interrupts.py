"""Interrupts at every point of some code, as signals are at a few of them by chance; and what they may leave behind."""

import inspect
import sys

import keras

from keras_gradtools.keras_state.recording import active_tapes

GRAPH_MODE = "the graph mode"


class Interrupt(BaseException):
    """Stands for KeyboardInterrupt."""


def at_every_point(run, files, every=1):
    """Yields after each of the runs of `run()` that was interrupted, each at another point in the source `files`.

    The points are those at which Python handles signals: where a function begins, and where a function written in C
    has returned. `files` are ends of file names; elsewhere nothing is interrupted, nor where an `__exit__` begins,
    before any `try` of it could. The run that comes to its end is the last one.
    """
    point = 0
    while True:
        point += every
        left = point

        def profile(frame, event, _):
            nonlocal left
            code = frame.f_code
            # A generator that is thrown away is called once more, out of the reach of signals.
            begins = event == "call" and code.co_name != "__exit__" and not code.co_flags & inspect.CO_GENERATOR
            if (begins or event == "c_return") and code.co_filename.endswith(files):
                left -= 1
                if left == 0:
                    raise Interrupt

        sys.setprofile(profile)
        try:
            run()
        except Interrupt:
            pass
        finally:
            sys.setprofile(None)
        if left > 0:
            return
        yield point


def left_behind():
    """What of the package's or the framework's state is not as it is outside of all blocks, in words."""
    found = [f"{len(active_tapes())} active tapes"] if active_tapes() else []
    if keras.src.backend.common.stateless_scope.in_stateless_scope():
        found.append("a stateless scope")
    backend = keras.config.backend()
    if backend == "torch":
        import torch

        from keras_gradtools.backend.torch import backward_pass, borrowing, levels, tape
        from keras_gradtools.backend.torch.compiled import notices

        found += ["grad mode"] if not torch.is_grad_enabled() else []
        found += ["threads of the engine"] if not torch._C._is_multithreading_enabled() else []
        found += ["borrowed tensors"] if borrowing._borrowed else []
        found += ["levels of functorch"] if torch._C._functorch.get_dynamic_layer_stack_depth() else []
        found += ["a vectorized pass"] if levels.is_in_vectorized_pass() else []
        found += ["passes"] if backward_pass._thread.passes else []
        found += ["a recorder"] if notices.current() is not None else []
        found += ["a dispatch mode"] if torch._C._len_torch_dispatch_stack() else []
        found += ["a function mode"] if torch._C._len_torch_function_stack() else []
        found += ["grad modes"] if tape._thread.grad_modes else []
    elif backend == "jax":
        from jax._src import core

        from keras_gradtools.backend.jax import current_trace

        found += ["a trace"] if core.trace_ctx.trace is not core.eval_trace else []
        eager = current_trace._thread.eager
        found += ["tapes of the trace"] if eager.tapes or eager.open_tapes else []
    else:
        import tensorflow as tf
        from tensorflow.python import pywrap_tfe

        found += ["a native tape"] if not pywrap_tfe.TFE_Py_TapeSetIsEmpty() else []
        found += [GRAPH_MODE] if not tf.executing_eagerly() else []
    return found
