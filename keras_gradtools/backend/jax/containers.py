"""The containers that are registered with JAX as pytrees, such as users' dataclasses, for nested structures."""

import jax

from keras_gradtools.nesting import Registry


def containers():
    return Registry(
        lambda x: not jax.tree_util.all_leaves([x]),
        lambda x: jax.tree.flatten(x, is_leaf=lambda y: y is not x),
        jax.tree.unflatten,
    )
