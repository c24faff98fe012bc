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
            positions = argnums if isinstance(argnums, (list, tuple)) else (argnums,)
            # What is no position, or one twice, is left to Keras, which says so.
            are_positions = all(p in range(-len(args), len(args)) for p in positions)
            if (
                not recording.active_tapes()
                or not are_positions
                or len({p % len(args) for p in positions}) < len(positions)
            ):
                return by_itself(*args, **kwargs)
            args = list(args)
            for p in positions:
                args[p] = nesting.map_structure(lambda x: backend.alias(keras.ops.convert_to_tensor(x)), args[p])
            sources = [args[p] for p in positions]
            gradients = nesting.pack_as(sources, _gradients(f, args, kwargs, nesting.flatten(sources)))
            return tuple(gradients) if isinstance(argnums, (list, tuple)) else gradients[0]

        return gradient

    return with_graph


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
