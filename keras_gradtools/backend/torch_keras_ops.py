"""Operations of Keras that, as Keras writes them for torch, `torch.vmap` cannot carry out or a tape cannot follow."""

import functools

import keras
import torch

from keras_gradtools import backend, nesting
from keras_gradtools.backend import recording
from keras_gradtools.keras_internals import backend_modules


def install():
    # Neither is in every supported Keras.
    convert = backend_modules.hooks["nn"].get("_maybe_convert_to_channels_last")
    if convert is not None:
        convert.replace(_where_it_can)
    grad = backend_modules.hooks.get("core", {}).get("grad")
    if grad is not None:
        grad.replace(_recorded)


def _where_it_can(convert):
    @functools.wraps(convert)
    def call(tensor):
        try:
            return convert(tensor)
        except RuntimeError:
            # The layout in memory changes the speed and no value, and `vmap` knows none.
            return tensor

    return call


def _recorded(grad):
    """`keras.ops.grad`, which detaches its arguments and its result: to a tape around it that would be a constant."""

    @functools.wraps(grad)
    def with_graph(f, argnums=0):
        by_itself = grad(f, argnums)

        def gradient(*args, **kwargs):
            places = _places(argnums, len(args))
            if not recording.active_tapes() or places is None:
                return by_itself(*args, **kwargs)
            given = list(args)
            for p in places:
                given[p] = nesting.map_structure(lambda x: backend.alias(keras.ops.convert_to_tensor(x)), given[p])
            sources = [given[p] for p in places]
            gradients = nesting.pack_as(sources, _gradients(f, given, kwargs, nesting.flatten(sources)))
            return gradients[0] if isinstance(argnums, int) else tuple(gradients)

        return gradient

    return with_graph


def _places(argnums, count):
    """The arguments to differentiate by; None for what Keras refuses in its own words."""
    numbers = (argnums,) if isinstance(argnums, int) else argnums
    if not isinstance(numbers, (list, tuple)) or not all(isinstance(i, int) and -count <= i < count for i in numbers):
        return None
    places = [i % count for i in numbers]
    return places if len(set(places)) == len(places) else None


def _gradients(f, args, kwargs, leaves):
    tape = backend.Tape(watch_accessed_variables=False)
    tape.enter()
    try:
        for leaf in leaves:
            tape.watch(leaf)
        value = torch.sum(f(*args, **kwargs))
    finally:
        tape.exit()
    found = backend.pullback(tape, [value], leaves, [torch.ones_like(value)])
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]
