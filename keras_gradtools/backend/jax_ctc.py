"""A CTC loss whose second derivative is right on JAX.

Keras' own calls `jnp.logaddexp` in a `lax.scan`. JAX drops the derivative rule of a `custom_jvp` function there when
the scan is differentiated twice, and differentiates the function itself. That one has a kink where its arguments are
equal, so the second derivative is wrong where two alignments are equally likely, for example if all logits are zero.
"""

import functools

import jax
import jax.numpy as jnp

from keras_gradtools.backend import recording

_IMPOSSIBLE = -1e30
# About the loss that Keras returns where the output is too short for the target.
_TOO_SHORT = 1e5


def differentiable(original):
    """Returns Keras' `ctc_loss`, computed by this file under a tape and when traced, and by `original` elsewhere."""

    @functools.wraps(original)
    def ctc_loss(target, output, target_length, output_length, mask_index=0):
        output = jnp.asarray(output)
        if not (recording.active_tapes() or isinstance(output, jax.core.Tracer)):
            return original(target, output, target_length, output_length, mask_index)
        target, target_length, output_length = (jnp.asarray(x, "int32") for x in (target, target_length, output_length))
        return _loss(target, output, target_length, output_length, mask_index)

    return ctc_loss


def _loss(target, output, target_length, output_length, blank):
    """The negative log-likelihood, summed over all alignments (Graves et al., 2006, equations 5 to 8).

    `target` has shape `(batch, labels)`. `output` holds logits, with shape `(batch, time, classes)`.
    """
    output = output.astype(jnp.promote_types(output.dtype, "float32"))
    batch, labels = target.shape
    count = 2 * labels + 1
    # The states are a blank before each label, the label, and a blank at the end.
    states = jnp.full((batch, count), blank, "int32").at[:, 1::2].set(target)
    # The blank between two labels can be skipped, unless the labels are equal.
    skips = (states[:, 2:] != blank) & (states[:, 2:] != states[:, :-2])
    skips = jnp.concatenate([jnp.zeros((batch, min(2, count)), bool), skips], axis=1)

    of_states = jnp.take_along_axis(jax.nn.log_softmax(output), states[:, None], axis=2).transpose(1, 0, 2)
    first = jnp.where(jnp.arange(count) < 2, of_states[0], _IMPOSSIBLE)

    def shifted(forward, by):
        return jnp.concatenate([jnp.full((batch, by), _IMPOSSIBLE, forward.dtype), forward], axis=1)[:, :count]

    def step(forward, time):
        now, of_states = time
        into = jnp.stack([forward, shifted(forward, 1), jnp.where(skips, shifted(forward, 2), _IMPOSSIBLE)])
        following = jnp.maximum(_log_sum_exp(into) + of_states, _IMPOSSIBLE)
        return jnp.where((now < output_length)[:, None], following, forward), None

    times = jnp.arange(1, len(of_states))
    forward, _ = jax.lax.scan(step, first, (times, of_states[1:]))
    last = jnp.stack([2 * target_length, jnp.maximum(2 * target_length - 1, 0)], axis=1)
    found = jnp.take_along_axis(forward, last, axis=1)
    # Without labels there is no last label, and index 0 is the blank, which is counted already.
    found = jnp.where(jnp.stack([target_length >= 0, target_length > 0], axis=1), found, _IMPOSSIBLE)
    loss = -_log_sum_exp(found.T)
    repeats = (target[:, 1:] == target[:, :-1]) & (jnp.arange(1, labels) < target_length[:, None])
    # Between two equal labels there has to be a blank.
    is_possible = target_length + repeats.sum(axis=1) <= output_length
    return jnp.where(is_possible, loss, _TOO_SHORT)


def _log_sum_exp(x):
    largest = jax.lax.stop_gradient(x.max(axis=0))
    return largest + jnp.log(jnp.exp(x - largest).sum(axis=0))
