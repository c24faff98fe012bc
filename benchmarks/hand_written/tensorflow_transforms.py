"""The hand-written TensorFlow counterparts of the transforms. `tensorflow.py` has those of the tape.

Each is the fastest of several versions: reverse over reverse for products with the Hessian (a `ForwardAccumulator`
around the tape took longer), two nested vjps for Jacobian-vector products, and chunks that fit into the cache for
Hessians. The guide's code is eager, as in the guide.
"""

import tensorflow as tf

from benchmarks.models import HESSIAN_CHUNK, HESSIAN_KERNEL, direction, loss
from benchmarks.rows import with_preparation
from benchmarks.rows.curvature import batches_of


def _weights(model):
    return [v.value for v in model.trainable_variables]


def _basis(shape):
    size = tf.TensorShape(shape).num_elements()
    return tf.reshape(tf.eye(size), (size, *shape))


def gradient_of_sum_by_inputs(model, compiler):
    @compiler
    def gradient(x, y):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(x)
            outputs = tf.reduce_sum(model(x))
        return tape.gradient(outputs, x)

    return gradient


def jacobian(model, compiler):
    @compiler
    def rows(x, y):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(x)
            outputs = model(x)
        return tape.jacobian(outputs, x)

    return rows


def jacobian_of_decoder(model, compiler):
    """Forward mode by two vjps: a vjp is linear in its cotangent, and the vjp of that linear function is a jvp."""

    @compiler
    def columns(x, y):
        with tf.GradientTape(watch_accessed_variables=False, persistent=True) as outer:
            with tf.GradientTape(watch_accessed_variables=False) as inner:
                inner.watch(x)
                outputs = model(x)
            cotangent = tf.zeros_like(outputs)
            outer.watch(cotangent)
            pulled = inner.gradient(outputs, x, output_gradients=cotangent)
        pushed = tf.vectorized_map(lambda v: outer.gradient(pulled, cotangent, output_gradients=v), _basis(x.shape))
        by_column = tf.transpose(tf.reshape(pushed, (tf.size(x), tf.size(outputs))))
        return tf.reshape(by_column, (*outputs.shape, *x.shape))

    return columns


def hessian(model, compiler):
    kernel = _weights(model)[HESSIAN_KERNEL]

    @compiler
    def rows(x, y):
        with tf.GradientTape(watch_accessed_variables=False) as outer:
            outer.watch(kernel)
            with tf.GradientTape(watch_accessed_variables=False) as inner:
                inner.watch(kernel)
                value = loss(y, model(x))
            gradient = inner.gradient(value, kernel)
        return outer.jacobian(gradient, kernel)

    return rows


def hessian_in_chunks(model, compiler):
    kernel = _weights(model)[HESSIAN_KERNEL]

    @compiler
    def rows(x, y):
        with tf.GradientTape(watch_accessed_variables=False, persistent=True) as outer:
            outer.watch(kernel)
            with tf.GradientTape(watch_accessed_variables=False) as inner:
                inner.watch(kernel)
                value = loss(y, model(x))
            gradient = inner.gradient(value, kernel)
        chunks = tf.reshape(_basis(kernel.shape), (-1, HESSIAN_CHUNK, *kernel.shape))
        one = lambda v: outer.gradient(gradient, kernel, output_gradients=v)  # noqa: E731
        return tf.reshape(tf.map_fn(lambda chunk: tf.vectorized_map(one, chunk), chunks), (*kernel.shape,) * 2)

    return rows


def hvp(model, compiler):
    weights, v = _weights(model), direction(model)

    @compiler
    def product(v, x, y):
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                value = loss(y, model(x))
            gradient = inner.gradient(value, weights)
        return outer.gradient(gradient, weights, output_gradients=v)

    return lambda x, y: product(v, x, y)


def linearized_hvp(model, compiler):
    """The gradient is recorded eagerly on a persistent tape, and its vjp is compiled."""
    weights, v = _weights(model), direction(model)

    def prepare(x, y):
        with tf.GradientTape(persistent=True) as outer:
            with tf.GradientTape() as inner:
                value = loss(y, model(x))
            gradient = inner.gradient(value, weights)
        pullback = compiler(lambda v: outer.gradient(gradient, weights, output_gradients=v))
        return lambda: pullback(v)

    return with_preparation(prepare)


def ggnvp(model, compiler):
    weights, v = _weights(model), direction(model)

    @compiler
    def product(v, x, y):
        with tf.GradientTape() as outer:
            with tf.GradientTape(persistent=True) as inner:
                outputs = model(x)
            cotangent = tf.zeros_like(outputs)
            outer.watch(cotangent)
            pulled = inner.gradient(outputs, weights, output_gradients=cotangent)
        pushed = outer.gradient(pulled, cotangent, output_gradients=v)
        with tf.GradientTape() as second:
            second.watch(outputs)
            with tf.GradientTape() as first:
                first.watch(outputs)
                value = loss(y, outputs)
            by_outputs = first.gradient(value, outputs)
        curved = second.gradient(by_outputs, outputs, output_gradients=pushed)
        return inner.gradient(outputs, weights, output_gradients=curved)

    return lambda x, y: product(v, x, y)


def per_example_gradients(model, compiler):
    weights = _weights(model)

    def one(example):
        x, y = example
        with tf.GradientTape() as tape:
            value = loss(y[None], model(x[None]))
        return tape.gradient(value, weights)

    return compiler(lambda x, y: tf.vectorized_map(one, (x, y)))


def _over_batches(model, product):
    """The mean of a product over all examples of several batches. The sum is part of the compiled program."""
    zeros = [tf.zeros_like(v) for v in direction(model)]

    @tf.function
    def add(totals, x, y):
        return [total + float(len(x)) * p for total, p in zip(totals, product(x, y), strict=True)]

    def prepare(x, y):
        batches = batches_of(x, y)
        count = sum(len(x) for x, _ in batches)

        def run():
            totals = zeros
            for x, y in batches:
                totals = add(totals, x, y)
            return [total / count for total in totals]

        return run

    return with_preparation(prepare)


def accumulated_hvp(model, compiler):
    return _over_batches(model, hvp(model, compiler))


def accumulated_ggnvp(model, compiler):
    return _over_batches(model, ggnvp(model, compiler))


def dense_hessian(model, compiler):
    """Computes the rows of one variable after another, in chunks."""
    weights = _weights(model)

    @compiler
    def rows(x, y):
        with tf.GradientTape(watch_accessed_variables=False, persistent=True) as outer:
            outer.watch(weights)
            with tf.GradientTape(watch_accessed_variables=False) as inner:
                inner.watch(weights)
                value = loss(y, model(x))
            gradient = inner.gradient(value, weights)
        parts = []
        for part in gradient:

            def one(v, part=part):
                return outer.gradient(part, weights, output_gradients=v, unconnected_gradients="zero")

            basis = _basis(part.shape)
            for start in range(0, len(basis), HESSIAN_CHUNK):
                found = tf.vectorized_map(one, basis[start : start + HESSIAN_CHUNK])
                parts.append(tf.concat([tf.reshape(f, (f.shape[0], -1)) for f in found], 1))
        return tf.concat(parts, 0)

    return lambda x, y: rows(x, y).numpy()


def guide_batch_jacobian(model, compiler):
    layer1, layer2 = model.layers

    def guide(x, y):
        with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
            tape.watch(x)
            outputs = layer2(layer1(x))
        return tape.batch_jacobian(outputs, x)

    return guide


def guide_jacobian(model, compiler):
    (layer,) = model.layers
    kernel = layer.kernel.value

    def guide(x, y):
        with tf.GradientTape(persistent=True) as tape:
            outputs = layer(x)
        return tape.jacobian(outputs, kernel)

    return guide


def guide_hessian(model, compiler):
    layer1, layer2 = model.layers
    kernel = layer1.kernel.value

    def guide(x, y):
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                value = tf.reduce_mean(layer2(layer1(x)) ** 2)
            gradient = inner.gradient(value, kernel)
        return outer.jacobian(gradient, kernel)

    return guide
