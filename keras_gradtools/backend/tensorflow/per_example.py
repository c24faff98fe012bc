"""Gradients for each example of a batch on TensorFlow."""

import tensorflow as tf

from keras_gradtools.backend.tensorflow.pullbacks import pullback
from keras_gradtools.backend.tensorflow.tape import Tape
from keras_gradtools.backend.tensorflow.vectorize import map_rows, vectorize


def per_example_gradients(fun, weights, examples, must_vectorize=False):
    def gradients(example):
        tape = Tape(watch_accessed_variables=False)
        with tape, tape:
            for weight in weights:
                tape.watch(weight)
            value, aux = fun(weights, example)
        found = pullback(tape, [value], weights, [tf.ones_like(value)])
        return [tf.zeros_like(w) if g is None else g for g, w in zip(found, weights, strict=True)] + [
            tf.identity(x)
            for x in aux  # without `identity`, a tensor from outside would not be in the vectorizer's graph
        ]

    found = vectorize(gradients, examples) if must_vectorize else map_rows(gradients, examples)
    return found[: len(weights)], found[len(weights) :]
