"""Restores a model's variables when a step of Keras' training on JAX fails or is interrupted.

While Keras trains, evaluates or predicts on JAX, the variables are empty. Their values are arrays that each step
receives and returns. Without this file, an error or Ctrl-C could leave a model without weights, in three ways:

- Keras stores no values before the first step has ended.
- The arrays that a step receives are donated to its compiled program, and deleted when it runs.
- The result of a step is lost if an interrupt comes before Keras has stored it.

So the state is stored before the variables are emptied, and the result of each step as it returns, with no Python
bytecode in between. Before a program runs for the first time, the state is copied, because it may fail at any point.

This file uses private parts of Keras' trainer for JAX: `_get_jax_state`, `_make_function`, `_jax_state`,
`_jax_state_synced` and `jax_state_sync`. `tests/training/test_failed_steps.py` checks them.
"""

import functools
import inspect
import itertools
import threading
import typing
import weakref

import jax
import numpy as np

from keras_gradtools.keras_internals.jax_trainer import Trainer as _Trainer
from keras_gradtools.keras_internals.jax_trainer import module as keras_trainer

_METHODS = ("fit", "evaluate", "predict", "train_on_batch", "test_on_batch", "predict_on_batch")

# The parts of the state by their number, in the order of Keras' train, test and predict steps.
_STORES = {
    4: ("trainable_variables", "non_trainable_variables", "optimizer_variables", "metrics_variables"),
    3: ("trainable_variables", "non_trainable_variables", "metrics_variables"),
    2: ("trainable_variables", "non_trainable_variables"),
}

# For each trainer, a list with the result of its last step. For a moment it may also hold the one before.
_returned: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class _Thread(threading.local):
    # The trainer whose step function is being compiled.
    trainer: typing.Any = None


_thread = _Thread()


def _returned_by(trainer):
    return _returned.setdefault(trainer, [])


class _Step:
    """A compiled step of a trainer that stores its results."""

    def __init__(self, trainer, compiled):
        self._trainer = weakref.ref(trainer)
        self._compiled = compiled
        self._count_programs = getattr(compiled, "_cache_size", lambda: 0)
        # The shapes of data for which JAX has already compiled a program, so that a call runs no Python code.
        self._known: set = set()

    def __call__(self, state, data):
        leaves, structure = jax.tree.flatten(data)
        if any(isinstance(x, jax.core.Tracer) for x in leaves):
            # Keras traces a loop over steps.
            return self._compiled(state, data)
        key = (structure, tuple((np.shape(x), getattr(x, "dtype", type(x))) for x in leaves))
        trainer = self._trainer()
        returned, count = _returned_by(trainer), self._count_programs()
        if key not in self._known:
            _note(trainer, jax.tree.map(_copy, state))
        # `extend` with `starmap` runs in C: Python handles no signal between the return of the program and the append.
        returned.extend(itertools.starmap(self._compiled, ((state, data),)))
        del returned[:-1]
        if self._count_programs() == count:
            self._known.add(key)
        return returned[-1]

    def __getattr__(self, name):
        return getattr(self._compiled, name)


def _copy(x):
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.numpy.copy(x)
    return np.array(x)


def _note(trainer, state):
    """Stores `state` for `jax_state_sync`, which assigns it to the variables."""
    trainer._jax_state = _by_store(state)
    trainer._jax_state_synced = False
    _returned_by(trainer).clear()


def _by_store(state):
    return dict(zip(_STORES[len(state)], state, strict=True))


def install():
    # Since Keras 3.16 it is called `state_sync`, and the old name calls the new one.
    sync_name = "state_sync" if hasattr(_Trainer, "state_sync") else "jax_state_sync"
    get_state, make_function, sync = _Trainer._get_jax_state, _Trainer._make_function, getattr(_Trainer, sync_name)

    @functools.wraps(get_state)
    def _get_jax_state(self, purge_model_variables=False, **stores):
        state = get_state(self, **stores)
        _note(self, state)
        if purge_model_variables:
            self._purge_model_variables(**stores)
        return state

    @functools.wraps(make_function)
    def _make_function(self, step_function, *args, **kwargs):
        if hasattr(step_function, "lower"):
            # Keras up to 3.15 passes a function that is already compiled.
            step_function = _Step(self, step_function)
        _thread.trainer = self
        try:
            return make_function(self, step_function, *args, **kwargs)
        finally:
            _thread.trainer = None

    @functools.wraps(sync)
    def state_sync(self):
        returned = _returned_by(self)
        if returned and not self._jax_state_synced:
            _, state = returned[-1]
            self._jax_state = _by_store(state)
        sync(self)
        returned.clear()

    _Trainer._get_jax_state, _Trainer._make_function = _get_jax_state, _make_function
    setattr(_Trainer, sync_name, state_sync)
    for name in _METHODS:
        setattr(_Trainer, name, _restoring(getattr(_Trainer, name)))
    if "out_shardings" in inspect.signature(make_function).parameters:
        # Since Keras 3.16, `_make_function` compiles the step.
        jit = keras_trainer.jit

        def jit_step(fun, **options):
            compiled = jit(fun, **options)
            return _Step(_thread.trainer, compiled) if _thread.trainer and "donate_argnums" in options else compiled

        keras_trainer.jit = jit_step


def _restoring(method):
    @functools.wraps(method)
    def call(self, *args, **kwargs):
        try:
            return method(self, *args, **kwargs)
        except BaseException as error:
            self.jax_state_sync()
            self._jax_state = None
            # It may hold tracers of the failed step.
            self._losses_override.clear()
            if any(_is_deleted(v._value) for v in self.variables):
                error.add_note(
                    "The compiled step failed while it ran, and Keras had donated the arrays of the weights to it: the "
                    f"weights of {self.name!r} are lost. Load them from a checkpoint."
                )
            raise

    return call


def _is_deleted(value):
    return isinstance(value, jax.Array) and value.is_deleted()
