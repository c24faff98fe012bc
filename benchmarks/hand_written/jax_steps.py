"""Hand-written training steps for JAX, in the style of an experienced JAX user."""

import jax
import jax.numpy as jnp
import keras

from benchmarks.rows.regularized_step import STEP_SIZE, WEIGHT, Handwritten, compiled, copy_of, example_losses


class Regularized(Handwritten):
    """A training step on an objective that subclasses define."""

    def objective(self, trainable, non_trainable, x, y):
        raise NotImplementedError

    def train_step(self, state, data):
        trainable, non_trainable, optimizer, metrics = state
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        (total, (penalty, norm, non_trainable)), gradients = jax.value_and_grad(self.objective, has_aux=True)(
            trainable, non_trainable, x, y
        )
        trainable, optimizer = self.optimizer.stateless_apply(optimizer, gradients, trainable)
        logs, new_metrics = {}, []
        for metric, value in zip(self.metrics, (total, penalty, norm), strict=True):
            variables = metrics[len(new_metrics) : len(new_metrics) + len(metric.variables)]
            variables = metric.stateless_update_state(variables, value, sample_weight=x.shape[0])
            logs[metric.name] = metric.stateless_result(variables)
            new_metrics += variables
        return logs, (trainable, non_trainable, optimizer, new_metrics)


class DoubleBackward(Regularized):
    def objective(self, trainable, non_trainable, x, y):
        size = x.shape[0]

        def loss_of(x):
            y_pred, new = self.stateless_call(trainable, non_trainable, x, training=True)
            return self.compute_loss(x=x, y=y, y_pred=y_pred), new

        (value, new), by_input = jax.value_and_grad(loss_of, has_aux=True)(x)
        squares = jnp.sum(jnp.square(size * by_input).reshape(size, -1), axis=1)
        penalty = jnp.mean(squares)
        return value + WEIGHT * penalty, (penalty, jnp.mean(jnp.sqrt(jax.lax.stop_gradient(squares))), new)


class FiniteDifference(Regularized):
    def objective(self, trainable, non_trainable, x, y):
        def losses_of(x):
            y_pred, new = self.stateless_call(trainable, non_trainable, x, training=True)
            return example_losses(y, y_pred), new

        losses, pull, new = jax.vjp(losses_of, x, has_aux=True)
        by_input = jax.lax.stop_gradient(pull(jnp.ones_like(losses))[0])
        norms = jnp.sqrt(jnp.sum(jnp.square(by_input), axis=(1, 2, 3), keepdims=True))
        further, _ = losses_of(x + STEP_SIZE * by_input / norms)
        penalty = jnp.mean(jnp.square((further - losses) / STEP_SIZE))
        return jnp.mean(losses) + WEIGHT * penalty, (penalty, jnp.mean(norms), new)


def exact_step(model, compiler):
    return compiled(DoubleBackward(copy_of(model))).train_on_batch


def finite_difference_step(model, compiler):
    return compiled(FiniteDifference(copy_of(model))).train_on_batch
