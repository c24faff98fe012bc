"""Linear operations of TensorFlow on a stack of tangents at once, for the most frequent ones.

All others are vectorized by TensorFlow, whose vectorizer takes longer to trace each of them than to run it.
"""

import tensorflow as tf

from keras_gradtools.backend import steps


def _same(step, stacks):
    return [stacks[0]]


def _negative(step, stacks):
    return [-stacks[0]]


def _cast(step, stacks):
    return [tf.cast(stacks[0], step.results[0].dtype)]


def _matrix_product(step, stacks):
    """A matrix of examples, one in each row, times a matrix that does not depend on the sources."""
    op = step.op
    if step.active != [0] or op.get_attr("transpose_a"):
        return None
    kernel, stack = op.inputs[1], stacks[0]
    if stack.shape.rank == 2:
        return [tf.matmul(stack, kernel, transpose_b=op.get_attr("transpose_b"))]
    flat = tf.reshape(stack, (-1, stack.shape[-1]))
    product = tf.matmul(flat, kernel, transpose_b=op.get_attr("transpose_b"))
    sizes = [*stack.shape[:-1], product.shape[-1]]
    if sizes.count(None) > 1:
        return [tf.reshape(product, tf.concat([tf.shape(stack)[:-1], tf.shape(product)[1:]], 0))]
    return [tf.reshape(product, [-1 if n is None else n for n in sizes])]


def _sum(step, stacks, sign=1):
    result = step.results[0]
    if any(x.shape.rank is None or x.shape.as_list() != result.shape.as_list() for x in step.primals):
        return None
    return steps.of_sum(stacks, step.active == [1], sign)


def _difference(step, stacks):
    return _sum(step, stacks, sign=-1)


def _bias(step, stacks):
    return [stacks[0]] if step.active == [0] else None


def _scaled(step, stacks):
    """The product with a factor that does not depend on the sources."""
    (place,) = step.active
    x, other = step.primals[0], step.op.inputs[1 - place]
    ranks = x.shape.rank, other.shape.rank
    if None in ranks or ranks[1] > ranks[0]:
        return None
    return [stacks[0] * other]


def _quotient(step, stacks):
    x, other = step.op.inputs
    if None in (x.shape.rank, other.shape.rank) or other.shape.rank > x.shape.rank:
        return None
    return [stacks[0] / other]


def _total(step, stacks):
    axes, x = tf.get_static_value(step.op.inputs[1]), step.primals[0]
    if axes is None or x.shape.rank is None:
        return None
    axes = [int(i) % x.shape.rank + 1 for i in axes.reshape(-1)]
    reduce = tf.reduce_sum if step.op.type == "Sum" else tf.reduce_mean
    return [reduce(stacks[0], axes, keepdims=step.op.get_attr("keep_dims"))]


def _reshaped(step, stacks):
    shape = tf.shape(step.results[0])
    return [
        tf.ensure_shape(tf.reshape(stacks[0], tf.concat([tf.shape(stacks[0])[:1], shape], 0)), _shape(step, stacks))
    ]


def _shape(step, stacks):
    return [stacks[0].shape[0], *step.results[0].shape.as_list()]


def _transposed(step, stacks):
    order = tf.get_static_value(step.op.inputs[1])
    return None if order is None else [tf.transpose(stacks[0], [0, *(int(i) + 1 for i in order)])]


def _joined(step, stacks):
    axis = tf.get_static_value(step.op.inputs[-1])
    parts = step.op.inputs[:-1]
    rank = parts[0].shape.rank
    if axis is None or rank is None:
        return None
    given = dict(zip(step.active, stacks, strict=True))
    count = stacks[0].shape[0]
    found = [
        given[i] if i in given else tf.zeros(tf.concat([[count], tf.shape(x)], 0), x.dtype) for i, x in enumerate(parts)
    ]
    return [tf.concat(found, int(axis) % rank + 1)]


def _columns(step, stacks):
    """Slices and indices along known axes, as of `x[:, 0]`."""
    op = step.op
    begin, end, strides = (tf.get_static_value(x) for x in op.inputs[1:])
    if any(x is None for x in (begin, end, strides)) or op.get_attr("ellipsis_mask"):
        return None
    masks = {name: 2 * op.get_attr(name) for name in ("new_axis_mask", "shrink_axis_mask")}
    # The axis of the directions comes first, and all of it is kept.
    masks.update({name: 2 * op.get_attr(name) + 1 for name in ("begin_mask", "end_mask")})
    ends = ([0, *begin], [0, *end], [1, *strides])
    return [tf.strided_slice(stacks[0], *ends, **masks, ellipsis_mask=0)]


RULES = {
    "Add": _sum,
    "AddV2": _sum,
    "BiasAdd": _bias,
    "Cast": _cast,
    "ConcatV2": _joined,
    "ExpandDims": _reshaped,
    "Identity": _same,
    "MatMul": _matrix_product,
    "Mean": _total,
    "Mul": _scaled,
    "Neg": _negative,
    "RealDiv": _quotient,
    "Reshape": _reshaped,
    "Squeeze": _reshaped,
    "StridedSlice": _columns,
    "Sub": _difference,
    "Sum": _total,
    "Transpose": _transposed,
}
# Those whose result is equal for all examples if the stack is, and has size 1 along the batch axis.
UNIFORM = {name: RULES[name] for name in ("Add", "AddV2", "BiasAdd", "Cast", "Identity", "MatMul", "Neg", "Sub")}
