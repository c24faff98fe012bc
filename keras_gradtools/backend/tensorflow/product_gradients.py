"""Gradients of products along an axis and of segments, which TensorFlow divides by their factors."""

import tensorflow as tf

from keras_gradtools.backend.tensorflow.vjp import pulled_back


def cumprod(op, upstream):
    x, axis = op.inputs
    options = {name: op.get_attr(name) for name in ("exclusive", "reverse")}
    return *pulled_back(lambda x: _products(x, axis, **options), [x], upstream), None


def _products(x, axis, exclusive, reverse):
    """`tf.math.cumprod` as products, without the division by the factors that TensorFlow's gradient contains."""
    order = _with_axis_first(x, axis)
    y = tf.transpose(x, order)
    y = tf.reverse(y, [0]) if reverse else y
    if exclusive:
        y = tf.concat([tf.ones_like(y[:1]), y[:-1]], 0)
    y = _doubling(_times_former, y)
    y = tf.reverse(y, [0]) if reverse else y
    return tf.ensure_shape(tf.transpose(y, tf.math.invert_permutation(order)), x.shape)


def _doubling(multiply, y):
    """The products along axis 0: `multiply(y, width)` multiplies each entry by the product of `width` before it."""
    if y.shape.rank is not None and y.shape[0] is not None:
        width = 1
        while width < y.shape[0]:
            y = multiply(y, width)
            width *= 2
        return y
    count = tf.shape(y)[0]
    return tf.while_loop(
        lambda width, y: width < count,
        lambda width, y: (2 * width, tf.ensure_shape(multiply(y, width), y.shape)),
        [tf.constant(1), y],
    )[1]


def _with_axis_first(x, axis):
    known, rank = tf.get_static_value(axis), x.shape.rank
    if known is not None and rank is not None:
        known = int(known) % rank
        return [known, *(i for i in range(rank) if i != known)]
    axis = tf.where(axis < 0, axis + tf.rank(x), axis)
    return tf.concat([[axis], tf.range(axis), tf.range(axis + 1, tf.rank(x))], 0)


def _times_former(y, width):
    return tf.concat([y[:width], y[width:] * y[:-width]], 0)


def segment_prod(op, upstream):
    """The vjp of the products of segments: each entry gets the product of the others of its segment."""
    data, ids = op.inputs[:2]
    rest = tf.shape(data)[tf.rank(ids) :]
    flat_ids = tf.reshape(ids, [-1])
    order = tf.argsort(flat_ids, stable=True)
    x = tf.gather(tf.reshape(data, tf.concat([[-1], rest], 0)), order)
    x_ids = tf.gather(flat_ids, order)
    later = _product_of_former(tf.reverse(x, [0]), tf.reverse(x_ids, [0]))
    others = _product_of_former(x, x_ids) * tf.reverse(later, [0])
    others = tf.reshape(tf.gather(others, tf.argsort(order)), tf.shape(data))
    # Entries with a negative index are in no segment.
    is_used = tf.reshape(ids >= 0, tf.concat([tf.shape(ids), tf.ones_like(rest)], 0))
    found = tf.where(is_used, tf.gather(upstream, tf.maximum(ids, 0)) * others, tf.zeros_like(data))
    return found, *[None] * (len(op.inputs) - 1)


def _product_of_former(x, ids):
    """For each row, the product of the rows before it that have its index. Rows of one index are adjacent."""
    ids = tf.reshape(ids, tf.concat([[-1], tf.ones_like(tf.shape(x)[1:])], 0))

    def if_same(y, width):
        return tf.where(ids[width:] == ids[:-width], y, tf.ones_like(y))

    def times_former(y, width):
        return tf.concat([y[:width], y[width:] * if_same(y[:-width], width)], 0)

    return _doubling(times_former, tf.concat([tf.ones_like(x[:1]), if_same(x[:-1], 1)], 0))
