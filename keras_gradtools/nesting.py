"""`keras.tree`, with a short way for the structures that derivatives are mostly asked for: a tensor, a flat list.

Keras' own functions walk every structure in Python on torch, which takes longer than a small gradient does.
"""

import weakref

import keras


def flatten(structure):
    """As `keras.tree.flatten`."""
    if not _is_nested_type(structure):
        return [structure]
    if _is_flat(structure):
        return list(structure)
    return keras.tree.flatten(structure)


def pack_as(structure, flat):
    """As `keras.tree.pack_sequence_as`."""
    if _is_flat(structure):
        return type(structure)(flat)
    if len(flat) == 1 and not _is_nested_type(structure):
        return flat[0]
    return keras.tree.pack_sequence_as(structure, flat)


def _is_flat(structure):
    # Of these two types exactly: a subclass, such as a named tuple, is made in its own way.
    return type(structure) in (list, tuple) and not any(_is_nested_type(x) for x in structure)


def _is_nested_type(x):
    # Whether something is a container goes by its type alone.
    nested = _nested_types.get(type(x))
    if nested is None:
        nested = _nested_types[type(x)] = keras.tree.is_nested(x)
    return nested


_nested_types: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
