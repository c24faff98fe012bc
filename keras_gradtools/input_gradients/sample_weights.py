"""Reduces sample weights to one for each example."""

from keras import ops

from keras_gradtools import nesting
from keras_gradtools.keras_state.layer_state import get_keras_mask


def example_weights(sample_weight, outputs, batch_size):
    """One weight for each example, of shape `(batch,)`: the mean over its time steps and outputs.

    Time steps that are masked in the output are excluded from the mean.
    """
    outputs = nesting.flatten(outputs)
    given = nesting.flatten(sample_weight)
    masks = [get_keras_mask(y) for y in outputs] if len(outputs) == len(given) else [None] * len(given)
    means = [
        ops.ones((batch_size,)) if w is None else _mean(ops.cast(w, "float32"), mask, batch_size)
        for w, mask in zip(given, masks, strict=True)
    ]
    return sum(means) / len(means)


def _mean(weights, mask, batch_size):
    weights = ops.reshape(weights, (batch_size, -1))
    if mask is None or weights.shape[1] == 1:
        return ops.mean(weights, axis=1)
    counted = ops.cast(ops.reshape(mask, (batch_size, -1)), "float32")
    return ops.divide_no_nan(ops.sum(weights * counted, axis=1), ops.sum(counted, axis=1))
