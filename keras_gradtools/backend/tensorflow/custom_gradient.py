"""Custom gradients on TensorFlow, by `tf.custom_gradient`."""

import tensorflow as tf

from keras_gradtools.backend.tensorflow.closed_over import constant_closure


def custom_gradient(fun):
    @tf.custom_gradient
    @constant_closure
    def with_native_signature(*args):
        values, grad_fn = fun(*args)

        def grad(*upstream, variables=()):
            gradients = grad_fn(*upstream)
            # On every backend, the variables that `fun` reads are constants of its gradient.
            return (gradients, [None] * len(variables)) if variables else gradients

        return values, grad

    return with_native_signature
