"""Which entries of the logs of `fit` appear in its progress bar. The `History` and all callbacks get all of them."""

import functools
import weakref

import keras

# For each model, the monitors that choose what is shown while it trains.
_choosers: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def choose(model, monitor):
    """From now on, the progress bar of this model shows of `monitor.last` only what `monitor.shown()` names."""
    _replace_once()
    _choosers.setdefault(model, weakref.WeakSet()).add(monitor)


def release(model, monitor):
    """Ends `choose`."""
    _choosers.get(model, weakref.WeakSet()).discard(monitor)


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
        return hook(self, number, shown_logs(self.model, logs))

    return with_shown_logs
