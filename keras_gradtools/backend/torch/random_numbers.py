"""The state of torch's own random generators, from which torch modules and Keras' dropout without a seed draw."""

import itertools
import threading

import torch

from keras_gradtools.backend.torch.compiled import notices
from keras_gradtools.blocks import Block
from keras_gradtools.keras_internals import backend_modules

get_device = backend_modules.function("core", "get_device")


def random_state():
    """A tuple of the state of the host's generator, and of that of the device, if it has its own."""
    return notices.seen_random_state(_random_state)


def _random_state():
    on_device = [torch.cuda.get_rng_state()] if get_device().startswith("cuda") else []
    return torch.get_rng_state(), *on_device


class with_random_state(Block):  # noqa: N801 - said of a block
    """A block in which torch's random generators have a given state. Afterwards they have their former state."""

    # All threads share the generators.
    _lock = threading.RLock()

    def __init__(self, state):
        self._state, self._before = state, None
        self._taken: list = []
        self._given: list = []

    def begin(self):
        # `extend` with `map` runs in C, so an interrupt cannot come between the change of the lock and its note.
        self._taken.extend(map(self._lock.acquire, (True,)))
        self._before = random_state()
        set_random_state(self._state)

    def end(self):
        if self._before is not None:
            set_random_state(self._before)
        if len(self._given) < len(self._taken):
            self._given.extend(itertools.starmap(self._lock.release, ((),)))


def set_random_state(state):
    notices.seen_setting(_set_random_state, state)


def _set_random_state(on_host, *on_device):
    torch.set_rng_state(on_host)
    for state in on_device:
        torch.cuda.set_rng_state(state)
