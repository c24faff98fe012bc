"""Batches that the replicas of a `tf.distribute` strategy share."""

import keras
import tensorflow as tf

from keras_gradtools import nesting


def summed_over_replicas(fun, batch, variable):
    strategy = _sharing_strategy(batch, variable)
    if strategy is None:
        return fun(batch)
    with strategy.scope():
        return strategy.reduce(tf.distribute.ReduceOp.SUM, _on_replicas(strategy, fun, batch), axis=None)


def is_shared_by_replicas(batch, variable):
    return _sharing_strategy(batch, variable) is not None


def replica_results(fun, batch, variable):
    strategy = _sharing_strategy(batch, variable)
    if strategy is None:
        return [fun(batch)]
    with strategy.scope():
        found = _on_replicas(strategy, fun, batch)
    leaves = [strategy.experimental_local_results(x) for x in nesting.flatten(found)]
    return [nesting.pack_as(found, list(of_replica)) for of_replica in zip(*leaves, strict=True)]


def _sharing_strategy(batch, variable):
    """The strategy whose replicas share a batch. None if the batch is not shared."""
    strategy = getattr(variable._value, "distribute_strategy", None)
    if strategy is None or (tf.distribute.has_strategy() and not tf.distribute.in_cross_replica_context()):
        return None
    count, size = strategy.num_replicas_in_sync, nesting.flatten(batch)[0].shape[0]
    return None if count == 1 or size is None or size < count else strategy


def _on_replicas(strategy, fun, batch):
    count, size = strategy.num_replicas_in_sync, nesting.flatten(batch)[0].shape[0]

    def on_replica():
        i = int(tf.get_static_value(tf.distribute.get_replica_context().replica_id_in_sync_group))
        places = slice(i * size // count, (i + 1) * size // count)
        return fun(nesting.map_structure(lambda x: x if x is None else x[places], batch))

    return strategy.run(on_replica)


def can_step_directly(model):
    return model.distribute_strategy.num_replicas_in_sync == 1


def train_function(model, step):
    """Joins a batch that Keras has split between replicas, and passes it to `step`."""
    strategy = model.distribute_strategy

    def whole(x):
        if isinstance(x, tf.experimental.Optional):
            return None
        parts = strategy.experimental_local_results(x)
        return parts[0] if len(parts) == 1 else tf.concat(parts, 0)

    def function(iterator):
        logs = None
        for _, batch in zip(range(model.steps_per_execution), iterator, strict=False):
            logs = step(keras.tree.map_structure(whole, batch))
        if logs is None:
            raise StopIteration
        return logs

    return function
