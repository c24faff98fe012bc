"""Nested structures: flattening them into leaves, and packing leaves again.

Lists, tuples and dicts are handled here, which is faster than with any registry. Other containers are looked up in
two registries: that of the framework, in which users may register their dataclasses, and that of `optree`, which
`keras.tree` uses on two backends. Anything that neither knows is a leaf. None is a leaf too, as in `keras.tree`.
"""

import collections
import numbers
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import optree


class Registry(NamedTuple):
    """Opens containers, one level at a time.

    Attributes:
        knows: A function that says whether a value is a container of this registry. Depends only on its type.
        open: A function that returns the entries of a container, and its metadata for comparison and for `close`.
        close: A function that makes a container from metadata and entries.
    """

    knows: Callable
    open: Callable
    close: Callable


def use_registry(load):
    """Adds a registry for containers. `load()` returns the `Registry`, and is called only when it is needed."""
    _registries.insert(0, load)


def flatten(structure):
    """The leaves of a nested structure as a list. Dicts are sorted by key, an `OrderedDict` is in its own order."""
    leaves: list = []
    _extend(leaves, structure)
    return leaves


def pack_as(structure, flat):
    """The structure with other leaves, which may themselves be nested structures."""
    return outline(structure).pack(flat)


def map_structure(fun, structure):
    """The structure with `fun` applied to each leaf."""
    return pack_as(structure, [fun(x) for x in flatten(structure)])


def is_nested(x):
    """Whether `x` is a container."""
    return _kind(x) is not None


def paths(structure):
    """The path to each leaf: a tuple of dict keys, field names of named tuples, and positions."""
    kind = _kind(structure)
    if kind is None:
        return [()]
    inside = entries(structure)
    if isinstance(structure, dict):
        names = list(structure) if kind is collections.OrderedDict else _sorted(structure)
    else:
        names = getattr(structure, "_fields", None) or range(len(inside))
    return [(name, *rest) for name, entry in zip(names, inside, strict=True) for rest in paths(entry)]


def entries(x):
    """The entries of a container in the order of `flatten`. Empty for a leaf."""
    kind = _kind(x)
    return [] if kind is None else list(_opened(kind, x)[1])


def same_structure(a, b):
    """Whether two nested structures differ at most in their leaves."""
    return outline(a).describes(b)


def outline(structure):
    """The `Outline` of a nested structure."""
    return Outline(_outlined(structure, []))


def split(structure):
    """The `Outline` of a nested structure, and its leaves as a list."""
    leaves: list = []
    return Outline(_outlined(structure, leaves)), leaves


class Outline(NamedTuple):
    """A nested structure without its leaves. Hashable, and equal for the same containers with the same metadata."""

    # None for a leaf. Otherwise the kind of the container, its metadata, and the nodes of its entries.
    node: Any

    def pack(self, flat):
        """The structure of this outline with the given leaves, which may themselves be nested structures."""
        return _packed(self.node, iter(flat))

    def matched(self, given, any_sequence=False):
        """The values of `given` at the leaves of this outline, or None if `given` has another structure.

        If `given` has None for a whole branch, each leaf of that branch gets None. With `any_sequence`, lists, tuples
        and named tuples of the same length count as the same container.
        """
        found: list = []
        return found if _match(self.node, given, found, True, any_sequence) else None

    def describes(self, given):
        """Whether `given` has this structure."""
        return _match(self.node, given, [])

    def __str__(self) -> str:
        return _written(self.node).strip("'") if self.node is None else _written(self.node)


class Places(NamedTuple):
    """The places of some of the leaves of a nested structure, without the leaves. Hashable, like an outline."""

    outline: Outline
    are_taken: tuple

    def pack(self, flat):
        """The structure with the entries of `flat` in these places, and None in all others."""
        taken = iter(flat)
        return self.outline.pack([next(taken) if is_taken else None for is_taken in self.are_taken])


class _Constants:
    """The metadata of a registered container. The hash is constant, because the metadata may not be hashable."""

    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other):
        try:
            return self.value is other.value or bool(self.value == other.value)
        except Exception:  # for instance if the metadata contains arrays
            return False


# Exactly these types: a subclass, such as a named tuple, has its own constructor.
_PLAIN = (list, tuple, dict, collections.OrderedDict, collections.defaultdict)
_DICTS = (dict, collections.OrderedDict, collections.defaultdict)
# Packages whose classes are never garbage-collected, so that they can be held strongly.
_FRAMEWORKS = ("builtins", "numpy", "jax", "jaxlib", "tensorflow", "torch", "keras")
# Always leaves, so their types are remembered, as those of arrays are. Any other class may still be registered later.
_LEAVES = (type(None), str, bytes, numbers.Number, keras.Variable, keras.KerasTensor, keras.Layer)


def _one_level(x):
    return {"is_leaf": lambda y: y is not x, "none_is_leaf": True, "namespace": "keras"}


def _optree():
    return Registry(
        lambda x: not optree.tree_is_leaf(x, none_is_leaf=True, namespace="keras"),
        lambda x: optree.tree_flatten(x, **_one_level(x)),
        optree.tree_unflatten,
    )


_registries: list[Callable] = [_optree]
_kinds: dict = {cls: cls for cls in _PLAIN}  # plain containers, and leaf types of the frameworks
_kinds_of_others: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _kind(x):
    """What opens a container: its type if that is in `_PLAIN`, otherwise a registry. None for a leaf."""
    cls = type(x)
    if cls in _kinds:
        return _kinds[cls]
    try:
        return _kinds_of_others[cls]
    except KeyError:
        pass
    if not (isinstance(x, _LEAVES) or keras.ops.is_tensor(x)):
        for load in _registries:
            registry = load()
            if registry.knows(x):
                _kinds_of_others[cls] = registry
                return registry
        if not (hasattr(x, "dtype") and hasattr(x, "shape")):
            return None  # not remembered
    is_lasting = cls.__module__.split(".")[0] in _FRAMEWORKS
    (_kinds if is_lasting else _kinds_of_others)[cls] = None
    return None


def _sorted(keys):
    try:
        return sorted(keys)
    except TypeError:
        return sorted(keys, key=lambda key: (type(key).__qualname__, repr(key)))


def _extend(leaves, structure):
    kind = _kind(structure)
    if kind is None:
        leaves.append(structure)
        return
    for x in structure if kind is list or kind is tuple else _opened(kind, structure)[1]:
        _extend(leaves, x)


def _opened(kind, x):
    """The metadata and the entries of a container."""
    if kind is list or kind is tuple:
        return None, x
    if kind is dict or kind is collections.defaultdict:
        keys = tuple(x)
        constants = keys if kind is dict else (x.default_factory, keys)
        return constants, [x[key] for key in _sorted(keys)]
    if kind is collections.OrderedDict:
        return tuple(x), list(x.values())
    entries, constants = kind.open(x)
    return (type(x), _Constants(constants)), entries


def _closed(kind, constants, entries):
    if kind is list or kind is tuple:
        return kind(entries)
    if kind is collections.OrderedDict:
        return collections.OrderedDict(zip(constants, entries, strict=True))
    if kind is dict or kind is collections.defaultdict:
        keys = constants if kind is dict else constants[1]
        by_key = dict(zip(_sorted(keys), entries, strict=True))
        ordered = {key: by_key[key] for key in keys}
        return ordered if kind is dict else collections.defaultdict(constants[0], ordered)
    return kind.close(constants[1].value, entries)


def _outlined(structure, leaves):
    kind = _kind(structure)
    if kind is None:
        leaves.append(structure)
        return None
    constants, entries = _opened(kind, structure)
    return kind, constants, tuple([_outlined(x, leaves) for x in entries])


def _packed(node, leaves):
    if node is None:
        return next(leaves)
    kind, constants, entries = node
    return _closed(kind, constants, [_packed(x, leaves) for x in entries])


def _match(node, given, found, none_for_all=False, any_sequence=False):
    """Adds the values of `given` at the leaves to `found`. False if the structures differ."""
    kind = _kind(given)
    if node is None:
        found.append(given)
        return kind is None
    if given is None and none_for_all:
        found += [None] * _count(node)
        return True
    if kind is None:
        return False
    own_kind, own_constants, entries = node
    if own_kind in _DICTS and kind in _DICTS:
        keys = own_constants[1] if own_kind is collections.defaultdict else own_constants
        if given.keys() != set(keys):
            return False
        others = [given[key] for key in (keys if own_kind is collections.OrderedDict else _sorted(keys))]
    else:
        constants, others = _opened(kind, given)
        alike = kind is own_kind and constants == own_constants
        alike = alike or any_sequence and isinstance(given, (list, tuple)) and _is_sequence(own_kind, own_constants)
        if not alike or len(others) != len(entries):
            return False
    return all(_match(x, y, found, none_for_all, any_sequence) for x, y in zip(entries, others, strict=True))


def _is_sequence(kind, constants):
    cls = kind if kind in _PLAIN else constants[0]
    return issubclass(cls, (list, tuple))


def _count(node):
    return 1 if node is None else sum(map(_count, node[2]))


def _written(node):
    """The container as Python writes it, with `'*'` for each leaf."""
    if node is None:
        return "'*'"
    kind, constants, entries = node
    inside = [_written(x) for x in entries]
    if kind in _DICTS:
        keys = constants[1] if kind is collections.defaultdict else constants
        ordered = keys if kind is collections.OrderedDict else _sorted(keys)
        by_key = dict(zip(ordered, inside, strict=True))
        shown = f"{{{', '.join(f'{key!r}: {by_key[key]}' for key in keys)}}}"
        return shown if kind is dict else f"{kind.__name__}({shown})"
    if kind is list:
        return f"[{', '.join(inside)}]"
    if kind is tuple:
        return f"({', '.join(inside)}{',' if len(inside) == 1 else ''})"
    cls = constants[0]
    names = getattr(cls, "_fields", None)
    if issubclass(cls, tuple) and names:
        inside = [f"{name}={x}" for name, x in zip(names, inside, strict=True)]
    return f"{cls.__name__}({', '.join(inside)})"
