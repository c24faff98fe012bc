"""Replaces Keras operations that, on torch, cannot be vectorized or recorded, or have wrong derivatives.

Most replacements are only used while a tape is recording or a transform of `torch.func` runs, so that ordinary calls
remain as fast as before.
"""

import functools

import torch
from keras import ops

from keras_gradtools import backend, nesting
from keras_gradtools.backend import keras_formulas
from keras_gradtools.backend.torch import levels
from keras_gradtools.keras_internals import backend_modules
from keras_gradtools.keras_state import recording


def install():
    # Some of these functions do not exist in every supported Keras.
    for module, name, mended in (
        ("nn", "_maybe_convert_to_channels_last", _where_it_can),
        ("linalg", "cholesky_inverse", _of_the_triangle),
        ("linalg", "det", _of_any_rank),
        ("image", "affine_transform", _of_a_copy),
        ("numpy", "floor_divide", _constant),
        ("numpy", "ldexp", _where_differentiated(keras_formulas.ldexp)),
        ("numpy", "nextafter", _where_differentiated(keras_formulas.nextafter)),
        ("numpy", "i0", _where_differentiated(keras_formulas.i0)),
        ("numpy", "sinc", _where_differentiated(keras_formulas.sinc)),
        ("core", "grad", _recorded),
    ):
        hook = backend_modules.hooks[module].get(name)
        if hook is not None:
            hook.replace(mended)


def _is_differentiated():
    """Whether a tape is recording or a transform of `torch.func` is running, as for per-example gradients."""
    return bool(recording.active_tapes()) or levels.depth() > 0


def _where_it_can(convert):
    @functools.wraps(convert)
    def call(tensor):
        try:
            return convert(tensor)
        except RuntimeError:
            # The memory layout only affects speed. Inside `vmap`, torch cannot change it.
            return tensor

    return call


def _of_the_triangle(cholesky_inverse):
    @functools.wraps(cholesky_inverse)
    def call(x, upper=False):
        # The value depends only on one triangle, but torch's gradient has entries in both.
        x = ops.convert_to_tensor(x)
        return cholesky_inverse(torch.triu(x) if upper else torch.tril(x), upper=upper)

    return call


def _of_any_rank(det):
    @functools.wraps(det)
    def call(a):
        a = ops.convert_to_tensor(a)
        value = det(a)
        if not _is_differentiated() or not a.is_floating_point() or not bool((value == 0).any()):
            return value
        # torch computes the gradient from the inverse. For a singular matrix it gives zero.
        is_singular = (value == 0)[..., None, None]
        identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        regular, singular = torch.where(is_singular, identity, a), torch.where(is_singular, a, identity)
        return torch.where(value == 0, _determinant_by_products(singular), det(regular))

    return call


def _determinant_by_products(a):
    """The determinant by the algorithm of Faddeev and LeVerrier: products and traces, differentiable at any matrix."""
    n = a.shape[-1]
    identity = torch.eye(n, dtype=a.dtype, device=a.device)
    product, coefficient = torch.zeros_like(a), a.new_ones(a.shape[:-2])
    for k in range(1, n + 1):
        product = a @ product + coefficient[..., None, None] * identity
        coefficient = -(a @ product).diagonal(dim1=-2, dim2=-1).sum(-1) / k
    return coefficient if n % 2 == 0 else -coefficient


def _of_a_copy(affine_transform):
    @functools.wraps(affine_transform)
    def call(images, transform, *args, **kwargs):
        # Keras overwrites `transform` in place.
        return affine_transform(images, ops.convert_to_tensor(transform).clone(), *args, **kwargs)

    return call


def _constant(floor_divide):
    @functools.wraps(floor_divide)
    def call(x1, x2):
        if not _is_differentiated():
            return floor_divide(x1, x2)
        # The derivative is zero, but torch has none and would raise an error.
        with torch.no_grad():
            return floor_divide(x1, x2)

    return call


def _where_differentiated(mended):
    def replaced(original):
        other = mended(original)

        @functools.wraps(original)
        def call(*args):
            return other(*args) if _is_differentiated() else original(*args)

        return call

    return replaced


def _recorded(grad):
    """`keras.ops.grad` that tapes can record. Keras detaches its arguments and result, so they would see a constant."""

    @functools.wraps(grad)
    def with_graph(f, argnums=0):
        by_itself = grad(f, argnums)

        def gradient(*args, **kwargs):
            places = _places(argnums, len(args))
            if not recording.active_tapes() or places is None:
                return by_itself(*args, **kwargs)
            given = list(args)
            for p in places:
                given[p] = nesting.map_structure(lambda x: backend.alias(ops.convert_to_tensor(x)), given[p])
            sources = [given[p] for p in places]
            gradients = nesting.pack_as(sources, _gradients(f, given, kwargs, nesting.flatten(sources)))
            return gradients[0] if isinstance(argnums, int) else tuple(gradients)

        return gradient

    return with_graph


def _places(argnums, count):
    """The positions in `argnums`, as non-negative numbers. None if `argnums` is invalid: Keras raises the error."""
    numbers = (argnums,) if isinstance(argnums, int) else argnums
    if not isinstance(numbers, (list, tuple)) or not all(isinstance(i, int) and -count <= i < count for i in numbers):
        return None
    places = [i % count for i in numbers]
    return places if len(set(places)) == len(places) else None


def _gradients(f, args, kwargs, leaves):
    tape = backend.Tape(watch_accessed_variables=False)
    with tape, tape:
        for leaf in leaves:
            tape.watch(leaf)
        value = torch.sum(f(*args, **kwargs))
    found = backend.pullback(tape, [value], leaves, [torch.ones_like(value)])
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]
