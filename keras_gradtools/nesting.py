"""`keras.tree`, with a short way for the structures that derivatives are mostly asked for: lists, tuples and dicts.

Keras' own functions walk every structure in Python on torch, with many calls for each leaf, which takes longer than a
small gradient does. What they make of other containers (named tuples, ordered or tracked ones) they do here, too.
"""

import weakref

import keras


def flatten(structure):
    """As `keras.tree.flatten`."""
    if type(structure) in _PLAIN:
        leaves = []
        return leaves if _extend(leaves, structure) else keras.tree.flatten(structure)
    return keras.tree.flatten(structure) if _is_nested_type(structure) else [structure]


def pack_as(structure, flat):
    """As `keras.tree.pack_sequence_as`; the leaves may be structures."""
    if type(structure) in _PLAIN and _is_plain(structure):
        leaves = iter(flat)
        return _rebuild(structure, leaves)
    if len(flat) == 1 and not _is_nested_type(structure):
        return flat[0]
    return keras.tree.pack_sequence_as(structure, flat)


def map_structure(fun, structure):
    """As `keras.tree.map_structure`, of one structure."""
    if not _is_nested_type(structure):
        return fun(structure)
    return pack_as(structure, [fun(x) for x in flatten(structure)])


def is_nested(x):
    """As `keras.tree.is_nested`."""
    return _is_nested_type(x)


def same_structure(a, b):
    """Whether `keras.tree.assert_same_structure` would pass."""
    if type(a) in _PLAIN and type(a) is type(b) and _is_plain(a) and _is_plain(b):
        return _matches(a, b)
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
    """Appends the leaves, and returns whether there was nothing in it but plain containers."""
    for x in _children(structure):
        if type(x) in _PLAIN:
            if not _extend(leaves, x):
                return False
        elif _is_nested_type(x):
            return False
        else:
            leaves.append(x)
    return True


def _is_plain(structure):
    return _extend([], structure)


def _rebuild(structure, leaves):
    parts = [_rebuild(x, leaves) if type(x) in _PLAIN else next(leaves) for x in _children(structure)]
    if type(structure) is dict:
        by_key = dict(zip(sorted(structure), parts, strict=True))
        return {key: by_key[key] for key in structure}
    return type(structure)(parts)


def _matches(a, b):
    if type(a) in _PLAIN or type(b) in _PLAIN:
        if type(a) is not type(b) or len(a) != len(b) or (type(a) is dict and sorted(a) != sorted(b)):
            return False
        return all(_matches(x, y) for x, y in zip(_children(a), _children(b), strict=True))
    return True


def _is_nested_type(x):
    # Whether something is a container goes by its type alone.
    nested = _nested_types.get(type(x))
    if nested is None:
        nested = _nested_types[type(x)] = keras.tree.is_nested(x)
    return nested


_nested_types: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
