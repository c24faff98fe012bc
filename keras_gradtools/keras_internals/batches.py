"""What Keras' training loop on JAX hands to a train function."""

import itertools

import keras

from keras_gradtools.keras_internals.lookup import find

# From Keras 3.16 on: the batches that are left at the end of an epoch.
_PartialBatchList = getattr(find("keras.src.trainers.data_adapters.data_adapter_utils"), "PartialBatchList", None)


def of_execution(iterator, steps):
    """The batches of one execution of `steps` steps, or what is left of the epoch, in a list."""
    item = next(iterator)
    if _PartialBatchList is None or steps == 1:
        return [item, *itertools.islice(iterator, steps - 1)]
    if isinstance(item, _PartialBatchList):
        return list(item)
    # They are stacked, for a loop in one program.
    count = next(x.shape[0] for x in keras.tree.flatten(item) if x is not None)
    return [_part(item, i) for i in range(count)]


def _part(item, i):
    return keras.tree.map_structure(lambda x: x if x is None else x[i], item)
