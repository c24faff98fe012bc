"""Reverse mode on TensorFlow."""

import tensorflow as tf

from keras_gradtools.backend.tensorflow import closed_over, kept_programs
from keras_gradtools.backend.tensorflow.vectorize import loop_connected, map_connected, pays


def pullback(tape, targets, sources, cotangents):
    return tape.gather(sources, lambda values: gradients_of(tape, targets, values, cotangents))


def constant_pullback(tape, targets, sources, cotangents):
    return [None if g is None else tf.stop_gradient(g) for g in pullback(tape, targets, sources, cotangents)]


def pullback_batch(tape, targets, sources, cotangents):
    if isinstance(tape, kept_programs.Replay):
        return tape.pullback_batch(sources, cotangents)
    map_rows = map_connected if pays(cotangents, (*targets, *sources)) else loop_connected
    return map_rows(lambda rows: pullback(tape, targets, sources, rows), cotangents)


def gradients_of(tape, targets, values, cotangents):
    gradients = tape.native.gradient(targets, values, output_gradients=cotangents)
    if tape.custom_gradients:
        closed_over.require_connected(tape, targets, values, gradients)
    return dense(gradients)


def dense(gradients):
    return [None if g is None else tf.convert_to_tensor(g) for g in gradients]
