"""The containers that are registered with torch as pytrees, such as users' dataclasses, for nested structures."""

from torch.utils import _pytree as pytree

from keras_gradtools.nesting import Registry


def containers():
    return Registry(
        lambda x: not pytree.tree_is_leaf(x),
        lambda x: pytree.tree_flatten(x, is_leaf=lambda y: y is not x),
        lambda spec, entries: pytree.tree_unflatten(entries, spec),
    )
