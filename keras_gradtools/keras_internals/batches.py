"""Reads the batches that Keras' training loop on JAX passes to a train function.

With `steps_per_execution > 1`, Keras 3.16 and newer pass stacked batches, or a list at the end of an epoch. Older
versions pass one batch at a time. `of_execution` returns a list of batches in all cases.
"""

import itertools

import keras

from keras_gradtools.keras_internals.lookup import find

# Since Keras 3.16: the type of the list of batches left at the end of an epoch.
_PartialBatchList = getattr(find("keras.src.trainers.data_adapters.data_adapter_utils"), "PartialBatchList", None)


def of_execution(iterator, steps):
    """The next `steps` batches in a list, or fewer at the end of an epoch."""
    item = next(iterator)
    if _PartialBatchList is None or steps == 1:
        return [item, *itertools.islice(iterator, steps - 1)]
    if isinstance(item, _PartialBatchList):
        return list(item)
    # Keras has stacked the batches along axis 0, to loop over them inside one compiled program.
    count = next(x.shape[0] for x in keras.tree.flatten(item) if x is not None)
    return [_part(item, i) for i in range(count)]


def _part(item, i):
    return keras.tree.map_structure(lambda x: x if x is None else x[i], item)
