"""Operations of Keras that cannot be vectorized or differentiated as Keras writes them on torch."""

import functools

import torch
from keras import ops

from keras_gradtools.backend import recording
from keras_gradtools.keras_internals import backend_modules


def install():
    # Not all are in every supported Keras.
    for module, name, mended in (
        ("nn", "_maybe_convert_to_channels_last", _where_it_can),
        ("linalg", "cholesky_inverse", _of_the_triangle),
        ("image", "affine_transform", _of_a_copy),
        ("numpy", "floor_divide", _constant),
    ):
        hook = backend_modules.hooks[module].get(name)
        if hook is not None:
            hook.replace(mended)


def _where_it_can(convert):
    @functools.wraps(convert)
    def call(tensor):
        try:
            return convert(tensor)
        except RuntimeError:
            # The layout in memory changes the speed and no value, and `vmap` knows none.
            return tensor

    return call


def _of_the_triangle(cholesky_inverse):
    @functools.wraps(cholesky_inverse)
    def call(x, upper=False):
        # The value has only this half in it; torch's gradient has both.
        x = ops.convert_to_tensor(x)
        return cholesky_inverse(torch.triu(x) if upper else torch.tril(x), upper=upper)

    return call


def _of_a_copy(affine_transform):
    @functools.wraps(affine_transform)
    def call(images, transform, *args, **kwargs):
        # Keras overwrites it.
        return affine_transform(images, ops.convert_to_tensor(transform).clone(), *args, **kwargs)

    return call


def _constant(floor_divide):
    @functools.wraps(floor_divide)
    def call(x1, x2):
        if not recording.active_tapes():
            return floor_divide(x1, x2)
        # Its derivative is zero, and torch has none.
        with torch.no_grad():
            return floor_divide(x1, x2)

    return call
