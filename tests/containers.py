"""Containers of every kind that a tree may be made of, each of two entries `a` and `b`."""

import collections
import dataclasses
import typing

import keras
import optree


class Named(typing.NamedTuple):
    a: typing.Any
    b: typing.Any


@dataclasses.dataclass
class Frozen:
    """As Flax and Equinox make them: a constant beside the leaves, and checks where a user makes one."""

    a: typing.Any
    b: typing.Any
    name: str = "frozen"

    def __post_init__(self):
        assert self.name == "frozen" and not isinstance(self.a, (tuple, int)), "made with something else than it takes"


class Pair:
    """No dataclass; registered by functions."""

    def __init__(self, a, b):
        self.a, self.b = a, b


class OfOptree(Pair):
    pass


class Shaped(Pair):
    """It could be taken for an array."""

    shape = (2,)
    dtype = "float32"


def _flatten(x):
    return (x.a, x.b), type(x).__name__


def _flatten_frozen(x):
    return (x.a, x.b), x.name


def _unflatten_frozen(name, children):
    made = object.__new__(Frozen)
    made.a, made.b = children
    made.name = name
    return made


optree.register_pytree_node(OfOptree, _flatten, lambda _, children: OfOptree(*children), namespace="keras")

if keras.config.backend() == "jax":
    import jax

    for cls in (Pair, Shaped):
        jax.tree_util.register_pytree_node(cls, _flatten, lambda _, children, cls=cls: cls(*children))
    jax.tree_util.register_pytree_node(Frozen, _flatten_frozen, _unflatten_frozen)
elif keras.config.backend() == "torch":
    import torch

    for cls in (Pair, Shaped):
        torch.utils._pytree.register_pytree_node(cls, _flatten, lambda children, _, cls=cls: cls(*children))
    torch.utils._pytree.register_pytree_node(
        Frozen, _flatten_frozen, lambda children, name: _unflatten_frozen(name, children)
    )
else:
    # TensorFlow's protocol is of methods.
    def _tf_flatten(self):
        return (self.name,), (self.a, self.b)

    Frozen.__tf_flatten__ = _tf_flatten
    Frozen.__tf_unflatten__ = classmethod(lambda cls, metadata, children: _unflatten_frozen(metadata[0], children))
    for cls in (Pair, Shaped):
        optree.register_pytree_node(cls, _flatten, lambda _, children, cls=cls: cls(*children), namespace="keras")


def _of_a_layer(a, b):
    layer = keras.layers.Layer()
    layer.entries = {"a": a, "b": b}
    return layer.entries


class Container(typing.NamedTuple):
    name: str
    make: typing.Callable
    type: type

    def parts(self, x):
        """The two entries of one of these; asserts that it is one."""
        assert type(x) is self.type, type(x)
        if isinstance(x, (collections.deque, list)):
            return x[0], x[1]
        if isinstance(x, dict):
            assert sorted(x) == ["a", "b"]
            return x["a"], x["b"]
        if isinstance(x, Frozen):
            assert x.name == "frozen"
        return (x.a, x.b) if type(x) is not tuple else x


CONTAINERS = [
    Container("list", lambda a, b: [a, b], list),
    Container("tuple", lambda a, b: (a, b), tuple),
    Container("dict", lambda a, b: {"b": b, "a": a}, dict),
    Container("namedtuple", Named, Named),
    Container("OrderedDict", lambda a, b: collections.OrderedDict(b=b, a=a), collections.OrderedDict),
    Container("defaultdict", lambda a, b: collections.defaultdict(list, b=b, a=a), collections.defaultdict),
    Container("deque", lambda a, b: collections.deque([a, b]), collections.deque),
    Container("tracked by a layer", _of_a_layer, type(_of_a_layer(1, 2))),
    Container("registered with optree", OfOptree, OfOptree),
    Container("registered by functions", Pair, Pair),
    Container("registered, with a shape and a dtype", Shaped, Shaped),
    Container("dataclass", Frozen, Frozen),
]
