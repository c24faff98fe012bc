"""Replaces the gradients of TensorFlow operations that are wrong, and adds missing ones.

| operation                  | what TensorFlow's own gradient is                                                   |
| -------------------------- | ----------------------------------------------------------------------------------- |
| `Cumprod`                  | wrong if an entry is zero; so is the second derivative of `Prod` with two zeros     |
| `ImageProjectiveTransformV3` | an interpolation by the inverse transform, not the adjoint; none of the transform |
| `ScaleAndTranslate`        | an error for an image in double precision                                           |
| `SegmentProd`, `UnsortedSegmentProd` | right, but its derivative is 0 for a segment with two zeros        |
| `SoftmaxCrossEntropyWithLogits` | wrong if labels do not sum to 1; so is the mixed second derivative  |
| `Svd`                      | without the part that is infinite for equal singular values: silently wrong there   |
| `Lu`, `XlaDynamicUpdateSlice`, `XlaDynamicSlice` | missing                                                       |

The gradients here consist of operations that have right gradients, so they can be differentiated to any order. They
are registered with TensorFlow, and work eagerly, in graphs and under XLA.
"""

import tensorflow as tf
from tensorflow.compiler.tf2xla.ops import gen_xla_ops
from tensorflow.python.framework import ops

from keras_gradtools.backend.tensorflow import image_gradients, linalg_gradients, product_gradients

_registry = ops.gradient_registry._registry


def install():
    """Replaces the wrong gradients, and adds the missing ones."""
    for name, gradient in {
        "Cumprod": product_gradients.cumprod,
        "ImageProjectiveTransformV3": image_gradients.projective_transform,
        "ScaleAndTranslate": image_gradients.scale_and_translate(ops.gradient_registry.lookup("ScaleAndTranslate")),
        "SegmentProd": product_gradients.segment_prod,
        "UnsortedSegmentProd": product_gradients.segment_prod,
        "SoftmaxCrossEntropyWithLogits": _softmax_cross_entropy,
        "Svd": linalg_gradients.svd(ops.gradient_registry.lookup("Svd")),
    }.items():
        _registry.pop(name, None)
        ops.RegisterGradient(name)(gradient)
    for name, gradient in {
        "Lu": linalg_gradients.lu,
        "XlaDynamicUpdateSlice": _dynamic_update_slice,
        "XlaDynamicSlice": _dynamic_slice,
    }.items():
        if name not in _registry:
            ops.RegisterGradient(name)(gradient)


def _softmax_cross_entropy(op, of_loss, of_difference):
    """The vjp of `-sum(labels * log_softmax(logits))` and of the second output, `softmax(logits) - labels`."""
    # Eagerly, TensorFlow does not keep the labels.
    logits, difference = op.inputs[0], op.outputs[1]
    probabilities, of_loss = tf.nn.softmax(logits), of_loss[..., None]
    # The difference sums to 0 if the labels sum to 1.
    by_logits = of_loss * (difference - probabilities * tf.reduce_sum(difference, -1, keepdims=True))
    by_labels = -of_loss * tf.nn.log_softmax(logits)
    if of_difference is not None:
        mean = tf.reduce_sum(of_difference * probabilities, -1, keepdims=True)
        by_logits += probabilities * (of_difference - mean)
        by_labels -= of_difference
    return by_logits, by_labels


def _dynamic_update_slice(op, upstream):
    update, start = op.inputs[1:]
    rest = gen_xla_ops.xla_dynamic_update_slice(upstream, tf.zeros(tf.shape(update), upstream.dtype), start)
    return rest, gen_xla_ops.xla_dynamic_slice(upstream, start, tf.shape(update, start.dtype)), None


def _dynamic_slice(op, upstream):
    x, start = op.inputs[:2]
    zeros = tf.zeros(tf.shape(x), upstream.dtype)
    return gen_xla_ops.xla_dynamic_update_slice(zeros, upstream, start), None, None
