"""`torch.compile`, and `kg.jit` on torch, which compiles nothing."""

import functools

import keras
import torch

from keras_gradtools import nesting


def compiled(fun):
    function = torch.compile(fun)

    @functools.wraps(fun)
    def call(*args, **kwargs):
        # Donated buffers allow only one backward pass, but a directional derivative takes one, and the gradient of the
        # weights another one.
        with torch._functorch.config.patch(donated_buffer=False):
            return function(*args, **kwargs)

    return call


def jit(fun):
    """Runs `fun` uncompiled, because `torch.compile` does not support second derivatives."""

    @functools.wraps(fun)
    def call(*args, **kwargs):
        return fun(*_floats_to_tensors(args), **_floats_to_tensors(kwargs))

    return call


def _floats_to_tensors(structure):
    # `kg.jit` on the other backends passes floats to `fun` as tensors, too.
    return nesting.map_structure(
        lambda x: keras.ops.convert_to_tensor(x, keras.config.floatx()) if isinstance(x, float) else x, structure
    )
