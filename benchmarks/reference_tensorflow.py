"""The hand-written code on TensorFlow that ours is compared with, as one who knows it well would write it."""

import keras
import tensorflow as tf

import keras_gradtools as kg
from benchmarks.models import loss
from benchmarks.rows.regularized_step import WEIGHT, compiled, copy_of

# Of each mode: what ours is compiled with, and what the hand-written code is.
MODES = {
    "eager": (lambda fun: fun, lambda fun: fun),
    "fit": (lambda fun: fun, lambda fun: fun),
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


class DoubleBackward(keras.Model):
    """The penalty by double backward, in a training step written for TensorFlow."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.penalty_tracker = keras.metrics.Mean(name="penalty")
        self.built = True

    def call(self, x, training=None):
        return self.model(x, training=training)

    def train_step(self, data):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        x = tf.convert_to_tensor(x)
        size = tf.cast(tf.shape(x)[0], x.dtype)
        with tf.GradientTape() as outer:
            with tf.GradientTape(watch_accessed_variables=False) as inner:
                inner.watch(x)
                value = self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
            by_input = size * inner.gradient(value, x)
            penalty = tf.reduce_sum(tf.square(by_input)) / size
            total = value + WEIGHT * penalty
        self.optimizer.apply(outer.gradient(total, self.trainable_variables), self.trainable_variables)
        self._loss_tracker.update_state(total, sample_weight=size)
        self.penalty_tracker.update_state(penalty, sample_weight=size)
        return self.get_metrics_result()


def regularized_step(model, compiler):
    return compiled(DoubleBackward(copy_of(model))).train_on_batch


def plain_step(model, compiler):
    return compiled(copy_of(model)).train_on_batch
