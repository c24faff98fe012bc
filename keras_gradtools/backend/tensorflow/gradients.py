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

_registry = ops.gradient_registry._registry


def install():
    """Replaces the wrong gradients, and adds the missing ones."""
    for name, gradient in {
        "Cumprod": _cumprod,
        "ImageProjectiveTransformV3": _projective_transform,
        "ScaleAndTranslate": _scale_and_translate(ops.gradient_registry.lookup("ScaleAndTranslate")),
        "SegmentProd": _segment_prod,
        "UnsortedSegmentProd": _segment_prod,
        "SoftmaxCrossEntropyWithLogits": _softmax_cross_entropy,
        "Svd": _svd(ops.gradient_registry.lookup("Svd")),
    }.items():
        _registry.pop(name, None)
        ops.RegisterGradient(name)(gradient)
    for name, gradient in {
        "Lu": _lu,
        "XlaDynamicUpdateSlice": _dynamic_update_slice,
        "XlaDynamicSlice": _dynamic_slice,
    }.items():
        if name not in _registry:
            ops.RegisterGradient(name)(gradient)


def _pulled_back(fun, inputs, upstream):
    """The vjp of `fun` at `inputs` for the cotangent `upstream`. Zeros for an unconnected input."""
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        inputs = [tf.identity(x) for x in inputs]
        tape.watch(inputs)
        value = fun(*inputs)
    return tape.gradient(value, inputs, upstream, unconnected_gradients=tf.UnconnectedGradients.ZERO)


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


def _cumprod(op, upstream):
    x, axis = op.inputs
    options = {name: op.get_attr(name) for name in ("exclusive", "reverse")}
    return *_pulled_back(lambda x: _products(x, axis, **options), [x], upstream), None


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


def _segment_prod(op, upstream):
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


def _projective_transform(op, upstream):
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
        return _projected(images, transforms, size, fill_value, **options)

    return *_pulled_back(projected, [images, transforms], upstream), None, None


def _projected(images, transforms, size, fill_value, interpolation, fill_mode):
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


def _scale_and_translate(original):
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


def _svd(original):
    def gradient(op, by_s, by_u, by_v):
        a, (s, *vectors) = op.inputs[0], op.outputs
        rows, columns = a.shape[-2:]
        has_vectors = op.get_attr("compute_uv")
        is_whole = rows == columns or not has_vectors or not op.get_attr("full_matrices")
        if a.dtype.is_complex or None in (rows, columns) or not is_whole:
            return original(op, by_s, by_u, by_v)
        u, v = vectors if has_vectors else tf.linalg.svd(a, full_matrices=False)[1:]
        inner = tf.linalg.diag(by_s)
        if not has_vectors:
            return u @ inner @ tf.linalg.matrix_transpose(v)
        squares = tf.square(s)
        gaps = tf.linalg.set_diag(squares[..., None, :] - squares[..., None], tf.ones_like(s))
        turned_u, turned_v = (tf.linalg.matmul(x, by_x, transpose_a=True) for x, by_x in ((u, by_u), (v, by_v)))
        inner += _quotient(turned_u - tf.linalg.matrix_transpose(turned_u), gaps) * s[..., None, :]
        inner += _quotient(turned_v - tf.linalg.matrix_transpose(turned_v), gaps) * s[..., None]
        found = u @ inner @ tf.linalg.matrix_transpose(v)
        # What the vectors of a matrix that is not square have outside of its range.
        if rows > columns:
            found += _quotient(by_u - u @ turned_u, s[..., None, :]) @ tf.linalg.matrix_transpose(v)
        elif columns > rows:
            found += u @ tf.linalg.matrix_transpose(_quotient(by_v - v @ turned_v, s[..., None, :]))
        return found

    return gradient


@tf.custom_gradient
def _quotient(a, b):
    """`a / b`, but 0 / 0 is 0: vectors of equal singular values that nothing depends on. So are its derivatives."""
    y = tf.where(tf.equal(a, 0), tf.zeros_like(a), a / b)

    def gradient(upstream):
        by_a = _quotient(upstream, b)
        by_b = -by_a * y
        axes = tf.raw_ops.BroadcastGradientArgs(s0=tf.shape(a), s1=tf.shape(b))[1]
        return by_a, tf.reshape(tf.reduce_sum(by_b, axes), tf.shape(b))

    return y, gradient


def _lu(op, upstream, _):
    """With P A = L U: dL = L low(F) and dU = up(F) U, where F = inv(L) P dA inv(U)."""
    factors, permutation = op.outputs
    lower = tf.linalg.set_diag(tf.linalg.band_part(factors, -1, 0), tf.ones_like(tf.linalg.diag_part(factors)))
    upper = tf.linalg.band_part(factors, 0, -1)
    by_lower = upstream - tf.linalg.band_part(upstream, 0, -1)
    by_upper = tf.linalg.band_part(upstream, 0, -1)
    inner = tf.linalg.matmul(lower, by_lower, adjoint_a=True)
    inner = inner - tf.linalg.band_part(inner, 0, -1)
    inner += tf.linalg.band_part(tf.linalg.matmul(by_upper, upper, adjoint_b=True), 0, -1)
    inner = tf.linalg.triangular_solve(lower, inner, lower=True, adjoint=True)
    # X inv(U)' is the adjoint of inv(U) X'.
    inner = tf.linalg.adjoint(tf.linalg.triangular_solve(upper, tf.linalg.adjoint(inner), lower=False))
    # Row i of P A is row `permutation[i]` of A.
    back = tf.argsort(permutation, axis=-1)
    return tf.gather(inner, back, axis=-2, batch_dims=permutation.shape.rank - 1)


def _dynamic_update_slice(op, upstream):
    update, start = op.inputs[1:]
    rest = gen_xla_ops.xla_dynamic_update_slice(upstream, tf.zeros(tf.shape(update), upstream.dtype), start)
    return rest, gen_xla_ops.xla_dynamic_slice(upstream, start, tf.shape(update, start.dtype)), None


def _dynamic_slice(op, upstream):
    x, start = op.inputs[:2]
    zeros = tf.zeros(tf.shape(x), upstream.dtype)
    return gen_xla_ops.xla_dynamic_update_slice(zeros, upstream, start), None, None
