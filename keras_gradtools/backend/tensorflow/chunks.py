"""Chunks of rows inside a graph, where the number of rows may be unknown."""

import tensorflow as tf

from keras_gradtools.backend import chunks


def map_chunks(fun, count, chunk_size):
    if tf.executing_eagerly():
        return chunks.loop(fun, count, chunk_size)
    number = -(-count // chunk_size)
    if not isinstance(count, int):
        # With unknown shapes, `tf.map_fn` cannot loop over nothing. Indices past the last one only add rows to cut off.
        number = tf.maximum(number, 2)
    index = tf.reshape(tf.range(number * chunk_size), (number, chunk_size))
    # The first chunk shows which results are None, and the shapes of the others. The rest must not run before it ends.
    first = fun(index[0])
    present = chunks.Present(fun)
    connected = [r for r in first if r is not None]
    if not connected:
        return first
    with tf.control_dependencies(connected):
        signature = [tf.TensorSpec(r.shape, r.dtype) for r in connected]
        rest = tf.map_fn(present, index[1:], fn_output_signature=signature, parallel_iterations=1)
    joined = [tf.concat([a, _merged(b)], 0)[:count] for a, b in zip(connected, rest, strict=True)]
    return present.restore(joined)


def _merged(chunks_of_rows):
    return tf.reshape(chunks_of_rows, tf.concat([[-1], tf.shape(chunks_of_rows)[2:]], 0))
