"""The CTC loss by the forward algorithm, in operations that can be differentiated to any order."""

from keras import ops

# Stands for the logarithm of zero. It is finite, because an infinite one would make derivatives NaN.
_IMPOSSIBLE = -1e30


def is_possible(likelihood):
    """Whether a result of `log_likelihood` is that of at least one alignment."""
    return likelihood > _IMPOSSIBLE / 2


def log_likelihood(log_probabilities, target, target_length, output_length, blank, fold):
    """The logarithm of the likelihood of labels, summed over all alignments (Graves et al., 2006, equations 5 to 8).

    Args:
        log_probabilities: Their logarithms, of shape `(time, batch, classes)`.
        target: The labels, of shape `(batch, labels)`.
        target_length: How many of the labels count, of shape `(batch,)`.
        output_length: How many of the times count, of shape `(batch,)`.
        blank: The class of the blank.
        fold: The loop of the framework: `fold(step, first, elements)` calls `carry = step(carry, element)` for each
            entry along the first axis of the tensors in the list `elements`.

    Returns:
        A tensor of shape `(batch,)`.
    """
    labels, times = ops.shape(target)[1], ops.shape(log_probabilities)[0]
    target = ops.where(ops.arange(labels, dtype="int32") < target_length[:, None], target, blank)
    # The states are a blank before each label, the label, and a blank at the end.
    padded = ops.pad(target, ((0, 0), (0, 1)), constant_values=blank)
    states = ops.reshape(ops.stack([ops.full_like(padded, blank), padded], axis=-1), (-1, 2 * labels + 2))[:, :-1]
    # The blank between two labels can be skipped, unless the labels are equal.
    skips = ops.logical_and(states != blank, states != _shifted(states, 2, blank))
    of_states = ops.take_along_axis(log_probabilities, states[None], axis=2)

    def step(forward, element):
        now, of_states = element
        skipped = ops.where(skips, _shifted(forward, 2, _IMPOSSIBLE), _IMPOSSIBLE)
        into = ops.stack([forward, _shifted(forward, 1, _IMPOSSIBLE), skipped])
        following = ops.logsumexp(into, axis=0) + of_states
        return ops.where((now < output_length)[:, None], following, forward)

    first = ops.where(ops.arange(2 * labels + 1) < 2, of_states[0], _IMPOSSIBLE)
    forward = fold(step, first, [ops.arange(1, times, dtype="int32"), of_states[1:]])
    # The last state is a blank or a label. Without labels there is only the blank.
    blank_at_end = ops.take_along_axis(forward, 2 * target_length[:, None], axis=1)
    label_at_end = ops.take_along_axis(forward, ops.maximum(2 * target_length - 1, 0)[:, None], axis=1)
    label_at_end = ops.where(target_length[:, None] > 0, label_at_end, _IMPOSSIBLE)
    return ops.logsumexp(ops.concatenate([blank_at_end, label_at_end], axis=1), axis=1)


def _shifted(x, by, value):
    """`x` with its columns moved `by` places to the right, and `value` in the first ones."""
    return ops.pad(x, ((0, 0), (by, 0)), constant_values=value)[:, :-by]
