"""Nestings: what their leaves are, and the way from the leaves back.

Lists, tuples and dicts are walked here, which is faster than any registry does it. All other containers are asked of
two registries: that of the framework, in which its users have their dataclasses, and that of `optree`, which is that of
`keras.tree` on two backends. What neither knows is a leaf. So is None, as `keras.tree` has it.
"""

import collections
import numbers
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import optree


class Registry(NamedTuple):
    """What opens containers, one level at a time.

    Attributes:
        knows: whether a value is a container of it; that goes by its type alone.
        open: the entries of a container, and what else there is to it, for comparison and for `close`.
        close: the container again, of that and other entries.
    """

    knows: Callable
    open: Callable
    close: Callable


def use_registry(load):
    """Has containers that `load()`, a `Registry`, knows be opened by it; it is called when there is need."""
    _registries.insert(0, load)


def flatten(structure):
    """The leaves of a nesting, in a list; those of a dict in the order of its keys."""
    leaves: list = []
    _extend(leaves, structure)
    return leaves


def pack_as(structure, flat):
    """The nesting with other leaves, which may be nestings."""
    return outline(structure).pack(flat)


def map_structure(fun, structure):
    """The nesting with `fun` of each leaf."""
    return pack_as(structure, [fun(x) for x in flatten(structure)])


def is_nested(x):
    """Whether something is a container."""
    return _kind(x) is not None


def paths(structure):
    """For each leaf the keys of dicts, the names of fields of named tuples, and the positions that lead to it."""
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
    """What is in a container, in the order of `flatten`; nothing for a leaf."""
    kind = _kind(x)
    return [] if kind is None else list(_opened(kind, x)[1])


def same_structure(a, b):
    """Whether two nestings are the same, but for their leaves."""
    return outline(a).describes(b)


def outline(structure):
    """The `Outline` of a nesting."""
    return Outline(_outlined(structure, []))


def split(structure):
    """The `Outline` of a nesting, and its leaves in a list."""
    leaves: list = []
    return Outline(_outlined(structure, leaves)), leaves


class Outline(NamedTuple):
    """A nesting without its leaves; equal, as a key, for the same containers with the same constants in them."""

    # None for a leaf; else the kind of the container, what it is beside its entries, and theirs.
    node: Any

    def pack(self, flat):
        """The nesting of this outline with the given leaves, which may be nestings."""
        return _packed(self.node, iter(flat))

    def matched(self, given, any_sequence=False):
        """What `given` has at the leaves, None where it has that for a branch; None if it is nested otherwise.

        With `any_sequence`, a list, a tuple and a named tuple of the same length are nested alike.
        """
        found: list = []
        return found if _match(self.node, given, found, True, any_sequence) else None

    def describes(self, given):
        """Whether `given` is nested in this way."""
        return _match(self.node, given, [])

    def __str__(self):
        return _written(self.node).strip("'") if self.node is None else _written(self.node)


class Places(NamedTuple):
    """Some of the leaves of a nesting, without these leaves: a key, as an outline is."""

    outline: Outline
    are_taken: tuple

    def pack(self, flat):
        """The nesting with the entries of `flat` in these places, and None in all others."""
        taken = iter(flat)
        return self.outline.pack([next(taken) if is_taken else None for is_taken in self.are_taken])


class _Constants:
    """What a registered container has beside its entries; equal if it says so, and only by its kind if hashed."""

    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value

    def __hash__(self):
        return 0  # there may be lists in it

    def __eq__(self, other):
        try:
            return self.value is other.value or bool(self.value == other.value)
        except Exception:  # arrays do not tell whether they are equal
            return False


# Of these types exactly: a subclass, such as a named tuple, is made in its own way.
_PLAIN = (list, tuple, dict, collections.OrderedDict, collections.defaultdict)
_DICTS = (dict, collections.OrderedDict, collections.defaultdict)
# Whose classes stay.
_FRAMEWORKS = ("builtins", "numpy", "jax", "jaxlib", "tensorflow", "torch", "keras")
# What no registry is asked for, and is found by its type from then on. Another object's class may be registered later.
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
_kinds: dict = {cls: cls for cls in _PLAIN}  # plain types, and those of tensors
_kinds_of_others: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _kind(x):
    """What opens a container: its type, if that is plain, or a registry; None for a leaf."""
    cls = type(x)
    if cls in _kinds:
        return _kinds[cls]
    try:
        return _kinds_of_others[cls]
    except KeyError:
        pass
    if isinstance(x, _LEAVES) or keras.ops.is_tensor(x) or (hasattr(x, "dtype") and hasattr(x, "shape")):
        is_lasting = cls.__module__.split(".")[0] in _FRAMEWORKS
        (_kinds if is_lasting else _kinds_of_others)[cls] = None
        return None
    for load in _registries:
        registry = load()
        if registry.knows(x):
            _kinds_of_others[cls] = registry
            return registry
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
    """What a container is beside its entries, and these."""
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
    """Puts what `given` has at the leaves into `found`; False where the two differ."""
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
    """As Python writes the container, with stars for the leaves."""
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
