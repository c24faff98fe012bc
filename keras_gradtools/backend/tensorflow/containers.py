"""The containers of TensorFlow: dataclasses with the methods `__tf_flatten__` and `__tf_unflatten__` of `tf.nest`."""

import dataclasses

from keras_gradtools.nesting import Outline, Registry


@dataclasses.dataclass
class Leaves:
    """A nested structure that a `tf.function` can return, even with containers that TensorFlow does not know."""

    outline: Outline
    leaves: list

    def __tf_flatten__(self):
        return (self.outline,), (self.leaves,)

    @classmethod
    def __tf_unflatten__(cls, metadata, components):
        return cls(*metadata, *components)


def containers():
    return Registry(
        lambda x: not isinstance(x, type) and hasattr(x, "__tf_flatten__") and hasattr(x, "__tf_unflatten__"),
        _open,
        lambda constants, entries: constants[0].__tf_unflatten__(constants[1], tuple(entries)),
    )


def _open(x):
    metadata, entries = x.__tf_flatten__()
    return entries, (type(x), metadata)
