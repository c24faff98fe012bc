"""Gradients of transformed and resized images."""

import tensorflow as tf

from keras_gradtools.backend.tensorflow.vjp import pulled_back


def projective_transform(op, upstream):
    images, transforms, _, fill_value = op.inputs
    options = {name: op.get_attr(name).decode() for name in ("interpolation", "fill_mode")}
    size = tf.shape(upstream)[1:3]
    if fill_value is None:
        # TensorFlow keeps only what its own gradient needs. The gradient of the images does not need this either.
        if options["fill_mode"] == "CONSTANT" and 1 not in (op.skip_input_indices or ()):
            raise NotImplementedError(
                "The derivative of `affine_transform` with respect to the transform depends on `fill_value`, which "
                "TensorFlow does not store. Received: fill_mode='constant'. Use fill_mode='nearest', 'reflect' or "
                "'wrap'."
            )
        fill_value = 0.0

    def projected(images, transforms):
        return projected_images(images, transforms, size, fill_value, **options)

    return *pulled_back(projected, [images, transforms], upstream), None, None


def projected_images(images, transforms, size, fill_value, interpolation, fill_mode):
    """The values of TensorFlow's kernel, by operations that have right gradients."""
    dtype = images.dtype
    rows, columns = tf.meshgrid(tf.range(size[0]), tf.range(size[1]), indexing="ij")
    rows, columns = tf.cast(rows, tf.float32), tf.cast(columns, tf.float32)
    a0, a1, a2, b0, b1, b2, c0, c1 = (t[:, None, None] for t in tf.unstack(transforms, 8, axis=1))
    projection = c0 * columns + c1 * rows + 1.0
    height, width = tf.shape(images)[1], tf.shape(images)[2]
    x = _mapped((a0 * columns + a1 * rows + a2) / projection, width, fill_mode)
    y = _mapped((b0 * columns + b1 * rows + b2) / projection, height, fill_mode)
    # There may be one transform for all images.
    shape = tf.concat([tf.shape(images)[:1], size], 0)
    x, y = tf.broadcast_to(x, shape), tf.broadcast_to(y, shape)
    fill = tf.cast(fill_value, dtype)

    def read(y, x):
        inside = (x >= 0) & (x < tf.cast(width, x.dtype)) & (y >= 0) & (y < tf.cast(height, y.dtype))
        place = tf.stack([tf.where(inside, y, 0.0), tf.where(inside, x, 0.0)], -1)
        return tf.where(inside[..., None], tf.gather_nd(images, tf.cast(place, tf.int32), batch_dims=1), fill)

    if interpolation == "NEAREST":
        return read(_rounded(y), _rounded(x))
    x0, y0 = tf.stop_gradient(tf.floor(x)), tf.stop_gradient(tf.floor(y))
    along_x, along_y = (tf.cast(t, dtype)[..., None] for t in (x - x0, y - y0))
    upper = (1 - along_x) * read(y0, x0) + along_x * read(y0, x0 + 1)
    lower = (1 - along_x) * read(y0 + 1, x0) + along_x * read(y0 + 1, x0 + 1)
    return (1 - along_y) * upper + along_y * lower


def _rounded(x):
    # Like the kernel, this rounds halves away from zero. `tf.round` would round them to even.
    return tf.stop_gradient(tf.sign(x) * tf.floor(tf.abs(x) + 0.5))


def _mapped(coordinate, size, fill_mode):
    """Maps a coordinate outside the image to the one that `fill_mode` uses instead."""
    size = tf.cast(size, coordinate.dtype)
    if fill_mode == "CONSTANT":
        return coordinate
    if fill_mode == "NEAREST":
        inside = tf.clip_by_value(coordinate, 0.0, size - 1)
    elif fill_mode == "REFLECT":
        period = 2 * size
        folded = coordinate - period * tf.stop_gradient(tf.floor(coordinate / period))
        inside = tf.clip_by_value(tf.where(folded >= size, period - folded - 1, folded), 0.0, size - 1)
    else:
        turns = tf.stop_gradient(tf.floor(tf.abs(coordinate) / tf.maximum(size - 1, 1.0)))
        folded = tf.where(coordinate < 0, coordinate + size * (turns + 1), coordinate)
        folded = tf.where(coordinate > size - 1, coordinate - size * turns, folded)
        inside = tf.clip_by_value(folded, 0.0, size - 1)
    return inside


def scale_and_translate(original):
    def gradient(op, upstream):
        image = op.inputs[0]
        if image.dtype == tf.float32:
            return original(op, upstream)
        # The result always has single precision, and the kernel of the gradient exists only for it.
        options = {name: op.get_attr(name) for name in ("kernel_type", "antialias")}
        pulled = tf.raw_ops.ScaleAndTranslateGrad(
            grads=upstream,
            original_image=tf.cast(image, tf.float32),
            scale=op.inputs[2],
            translation=op.inputs[3],
            **options,
        )
        return tf.cast(pulled, image.dtype), None, None, None

    return gradient
