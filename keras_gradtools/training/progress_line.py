"""Which entries of the logs of `fit` appear in its progress bar. The `History` and all callbacks get all of them."""

import functools
import weakref

import keras

# For each model, as Keras has given it to the callbacks, the monitors that choose what is shown while it trains.
_choosers: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def choose(monitor):
    """From now on, the progress bar of its model shows of `monitor.last` only what `monitor.shown()` names."""
    _replace_once()
    _choosers.setdefault(monitor._model, weakref.WeakSet()).add(monitor)


def release(monitor):
    """Ends `choose`."""
    _choosers.get(monitor._model, weakref.WeakSet()).discard(monitor)


def shown_logs(model, logs):
    """The entries of `logs` without those that monitors hide. What one monitor shows, no other one hides."""
    monitors = list(_choosers.get(model, ()))
    if not logs or not monitors:
        return logs
    shown = {name for monitor in monitors for name in monitor.shown()}
    hidden = {name for monitor in monitors for name in monitor.last} - shown
    return {name: value for name, value in logs.items() if name not in hidden}


@functools.cache
def _replace_once():
    # Keras hands one dict to all callbacks, of which its progress bar comes last.
    logger = keras.callbacks.ProgbarLogger
    for hook in ("on_train_batch_end", "on_epoch_end"):
        setattr(logger, hook, _filtered(getattr(logger, hook)))


def _filtered(hook):
    @functools.wraps(hook)
    def with_shown_logs(self, number, logs=None):
        # Keras may run this in another thread while training continues. On JAX, the property `model` would bring the
        # weights into the variables there, in the middle of a step that replaces them.
        return hook(self, number, shown_logs(self._model, logs))

    return with_shown_logs
