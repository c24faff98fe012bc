"""Reverse mode on JAX."""

import jax

from keras_gradtools.backend.jax import slices, sweep


def pullback(tape, targets, sources, cotangents):
    return _pull(sweep.pull, tape, targets, sources, cotangents)


def constant_pullback(tape, targets, sources, cotangents):
    # `stop_gradient` comes before the sweep and not after it. Then an enclosing derivative does not enter the sweep, so
    # it cannot fail at a custom derivative that cannot be differentiated again.
    return _pull(_pull_constants, tape, targets, sources, jax.lax.stop_gradient(cotangents))


def pullback_batch(tape, targets, sources, cotangents):
    return _pull(sweep.pull_batch, tape, targets, sources, cotangents)


def _pull_constants(part, arrays, cotangents):
    return sweep.pull(part, jax.lax.stop_gradient(arrays), cotangents)


def _pull(mode, tape, targets, sources, cotangents):
    def gradient_of(values):
        part = slices.Slice(tape, targets, values)
        if not part.inputs:
            return [None] * len(values)
        connected = [u for u, slot in zip(cotangents, part.target_slots, strict=True) if slot is not None]
        gradients = sweep.differentiate(mode, part, connected)
        return [None if slot is None else gradients[slot] for slot in part.source_slots]

    return tape.gather(sources, gradient_of)
