"""Keras' random generators, whose seeds are values of tensors.

Keras makes a new generator for each seeded draw, and reads its seed from the variable of a `SeedGenerator`. A program
reads the seed each time that it runs.
"""

import functools

import torch

from keras_gradtools.backend.torch.compiled import notices
from keras_gradtools.backend.torch.random_numbers import get_device
from keras_gradtools.keras_internals import backend_modules
from keras_gradtools.keras_internals.scopes import draw_seed


def install():
    backend_modules.hooks["random"]["torch_seed_generator"].replace(_recorded)


def _recorded(make):
    @functools.wraps(make)
    def call(seed):
        current = notices.current()
        device = get_device()
        if current is None or device == "meta":
            return make(seed)
        first, second = draw_seed(seed)
        total = first + second
        with torch.utils._python_dispatch._disable_current_modes():
            generator = _seeded(total, device)
        current.note_generator(generator, _seeded, (total, device))
        return generator

    return call


def _seeded(total, device):
    generator = torch.Generator(device=device)
    generator.manual_seed(int(total) & 0xFFFFFFFF)
    return generator
