"""Hand-written training steps for TensorFlow, in the style of an experienced TensorFlow user."""

import keras
import tensorflow as tf

from benchmarks.rows.regularized_step import STEP_SIZE, WEIGHT, Handwritten, compiled, copy_of, example_losses


class Regularized(Handwritten):
    """A training step on an objective that subclasses define."""

    def objective(self, x, y):
        raise NotImplementedError

    def train_step(self, data):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        x = tf.convert_to_tensor(x)
        with tf.GradientTape() as outer:
            total, penalty, norm = self.objective(x, y)
        self.optimizer.apply(outer.gradient(total, self.trainable_variables), self.trainable_variables)
        for metric, value in zip(self.metrics, (total, penalty, norm), strict=True):
            metric.update_state(value, sample_weight=tf.shape(x)[0])
        return self.get_metrics_result()


class DoubleBackward(Regularized):
    def objective(self, x, y):
        size = tf.cast(tf.shape(x)[0], x.dtype)
        with tf.GradientTape(watch_accessed_variables=False) as inner:
            inner.watch(x)
            value = self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
        squares = tf.reduce_sum(tf.square(size * inner.gradient(value, x)), axis=[1, 2, 3])
        penalty = tf.reduce_mean(squares)
        return value + WEIGHT * penalty, penalty, tf.reduce_mean(tf.sqrt(tf.stop_gradient(squares)))


class FiniteDifference(Regularized):
    def objective(self, x, y):
        with tf.GradientTape(watch_accessed_variables=False) as inner:
            inner.watch(x)
            losses = example_losses(y, self(x, training=True))
        by_input = tf.stop_gradient(inner.gradient(losses, x))
        norms = tf.sqrt(tf.reduce_sum(tf.square(by_input), axis=[1, 2, 3], keepdims=True))
        further = example_losses(y, self(x + STEP_SIZE * by_input / norms, training=True))
        penalty = tf.reduce_mean(tf.square((further - losses) / STEP_SIZE))
        return tf.reduce_mean(losses) + WEIGHT * penalty, penalty, tf.reduce_mean(norms)


def exact_step(model, compiler):
    return compiled(DoubleBackward(copy_of(model))).train_on_batch


def finite_difference_step(model, compiler):
    return compiled(FiniteDifference(copy_of(model))).train_on_batch
