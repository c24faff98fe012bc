"""Adds second derivatives of image resizing, which TensorFlow lacks.

Resizing is linear in the image, so the derivative of its gradient is resizing itself. For most methods TensorFlow
raises `LookupError` there. For bilinear resizing it silently gives zero, so the training gradient of an input-gradient
penalty would lack a part.
"""

import functools

import tensorflow as tf
from tensorflow.python.framework import ops

_registry = ops.gradient_registry._registry


def _pull_bilinear(op, grad):
    """TensorFlow's gradient of `ResizeBilinear`, as a custom gradient that has a derivative.

    A gradient cannot be registered for `ResizeBilinearGrad`, because TensorFlow takes that operation for constant and
    does not keep its inputs.
    """
    options = {name: op.get_attr(name) for name in ("align_corners", "half_pixel_centers")}
    image = op.inputs[0]

    @tf.custom_gradient
    def pull(grad):
        def push(tangent):
            return tf.raw_ops.ResizeBilinear(images=tangent, size=tf.shape(grad)[1:3], **options)

        return tf.raw_ops.ResizeBilinearGrad(grads=grad, original_image=image, **options), push

    return pull(grad), None


def _push_nearest(op, grad):
    return _resized(tf.raw_ops.ResizeNearestNeighbor, op, grad, "align_corners", "half_pixel_centers"), None


def _push_bicubic(op, grad):
    return _resized(tf.raw_ops.ResizeBicubic, op, grad, "align_corners", "half_pixel_centers"), None


def _push_scale_and_translate(op, grad):
    resize = functools.partial(tf.raw_ops.ScaleAndTranslate, scale=op.inputs[2], translation=op.inputs[3])
    return _resized(resize, op, grad, "kernel_type", "antialias"), None, None, None


def _resized(resize, op, image, *options):
    size = tf.shape(op.inputs[0])[1:3]
    return resize(images=image, size=size, **{name: op.get_attr(name) for name in options})


def install():
    """Registers the gradients that TensorFlow does not have."""
    for name, push in {
        "ResizeNearestNeighborGrad": _push_nearest,
        "ResizeBicubicGrad": _push_bicubic,
        "ScaleAndTranslateGrad": _push_scale_and_translate,
    }.items():
        if name not in _registry:
            ops.RegisterGradient(name)(push)
    if _registry["ResizeBilinearGrad"]["type"] is None:
        del _registry["ResizeBilinear"]
        ops.RegisterGradient("ResizeBilinear")(_pull_bilinear)
