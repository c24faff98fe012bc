"""The hand-written TensorFlow code that our code is compared with, in the style of an experienced TensorFlow user."""

import keras
import tensorflow as tf

import keras_gradtools as kg
from benchmarks.models import loss

# For each mode, the compiler for our code and the compiler for the hand-written code.
MODES = {
    "eager": (lambda fun: fun, lambda fun: fun),
    "fit": ("auto", lambda fun: fun),
    "compiled": (kg.jit, tf.function),
    "self-compiled": (lambda fun: fun, tf.function),
    "XLA": (lambda fun: tf.function(fun, jit_compile=True), lambda fun: tf.function(fun, jit_compile=True)),
}
THREADS = "tf.config.threading: 1 intra-op, 1 inter-op"


def use_one_thread():
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def block(result):
    tf.test.experimental.sync_devices()


def device():
    found = tf.config.list_physical_devices("GPU")
    return tf.config.experimental.get_device_details(found[0])["device_name"] if found else "cpu"


def gradient_by_weights(model, compiler):
    @compiler
    def gradient(x, y):
        with tf.GradientTape() as tape:
            value = loss(y, model(x))
        return tape.gradient(value, model.trainable_variables)

    return gradient


def gradient_by_inputs(model, compiler):
    @compiler
    def gradient(x, y):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(x)
            value = loss(y, model(x))
        return tape.gradient(value, x)

    return gradient


def double_backward(model, compiler):
    @compiler
    def gradient(x, y):
        with tf.GradientTape() as outer:
            with tf.GradientTape(watch_accessed_variables=False) as inner:
                inner.watch(x)
                value = loss(y, model(x))
            penalty = tf.reduce_sum(tf.square(inner.gradient(value, x)))
        return outer.gradient(penalty, model.trainable_variables)

    return gradient


def batch_jacobian(model, compiler):
    @compiler
    def jacobian(x, y):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(x)
            logits = model(x)
        return tape.batch_jacobian(logits, x)

    return jacobian


def forward(model, compiler):
    return compiler(lambda x, y: model(x))


def empty_tape():
    with tf.GradientTape():
        pass


def square_gradient(x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = keras.ops.multiply(x, x)
    return tape.gradient(y, x)
