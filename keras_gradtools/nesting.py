"""`keras.tree`, with a short way for the structures that derivatives are mostly asked for: lists, tuples and dicts.

Keras' own functions walk every structure in Python on torch, with many calls for each leaf, which takes longer than a
small gradient does. What they make of other containers (named tuples, ordered or tracked ones) they do here, too.
"""

import weakref

import keras


def flatten(structure):
    """As `keras.tree.flatten`."""
    leaves = []
    _extend(leaves, structure)
    return leaves


def pack_as(structure, flat):
    """As `keras.tree.pack_sequence_as`; the leaves may be structures."""
    return _rebuild(structure, iter(flat))


def map_structure(fun, structure):
    """As `keras.tree.map_structure`, of one structure."""
    return pack_as(structure, [fun(x) for x in flatten(structure)])


def is_nested(x):
    """As `keras.tree.is_nested`."""
    return _is_nested_type(x)


def same_structure(a, b):
    """Whether `keras.tree.assert_same_structure` would pass."""
    if type(a) in _PLAIN and type(a) is type(b):
        if len(a) != len(b) or (type(a) is dict and sorted(a) != sorted(b)):
            return False
        return all(same_structure(x, y) for x, y in zip(_children(a), _children(b), strict=True))
    if not _is_nested_type(a) and not _is_nested_type(b):
        return True
    try:
        keras.tree.assert_same_structure(a, b)
    except (ValueError, TypeError):
        return False
    return True


# Of these types exactly: a subclass, such as a named tuple, is made in its own way.
_PLAIN = (list, tuple, dict)


def _children(structure):
    # The keys of a dict in order, as Keras has them.
    return [structure[key] for key in sorted(structure)] if type(structure) is dict else structure


def _extend(leaves, structure):
    if type(structure) in _PLAIN:
        for x in _children(structure):
            _extend(leaves, x)
    elif _is_nested_type(structure):
        leaves.extend(keras.tree.flatten(structure))
    else:
        leaves.append(structure)


def _rebuild(structure, leaves):
    if type(structure) is dict:
        by_key = {key: _rebuild(structure[key], leaves) for key in sorted(structure)}
        return {key: by_key[key] for key in structure}
    if type(structure) in _PLAIN:
        return type(structure)([_rebuild(x, leaves) for x in structure])
    if _is_nested_type(structure):
        taken = [next(leaves) for _ in keras.tree.flatten(structure)]
        return keras.tree.pack_sequence_as(structure, taken)
    return next(leaves)


def _is_nested_type(x):
    # Whether something is a container goes by its type alone.
    nested = _nested_types.get(type(x))
    if nested is None:
        nested = _nested_types[type(x)] = keras.tree.is_nested(x)
    return nested


_nested_types: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
