"""Trees of containers and what is in their places."""

import collections

import keras
import numpy as np
import pytest

from keras_gradtools import nesting
from tests.containers import CONTAINERS, Frozen, Named, Pair

every_container = pytest.mark.parametrize("container", CONTAINERS, ids=lambda c: c.name)


@every_container
def test_there_and_back(container):
    x = container.make(1.0, [2.0, None])
    assert nesting.is_nested(x)
    leaves = nesting.flatten({"x": x, "y": (3.0,)})
    assert sorted(leaves, key=repr) == [1.0, 2.0, 3.0, None]
    back = nesting.pack_as({"x": x, "y": (3.0,)}, leaves)
    assert type(back) is dict and back["y"] == (3.0,)
    a, b = container.parts(back["x"])
    assert a == 1.0 and list(b) == [2.0, None]
    a, b = container.parts(nesting.map_structure(lambda leaf: (leaf, 0), x))
    assert a == (1.0, 0) and list(b) == [(2.0, 0), (None, 0)]


@every_container
def test_outlines_are_equal_for_the_same_containers_only(container):
    outline = nesting.outline(container.make(1.0, (2.0, None)))
    same = nesting.outline(container.make(None, ("abc", 7)))
    assert outline == same and hash(outline) == hash(same)
    others = [nesting.outline(other.make(1.0, (2.0, None))) for other in CONTAINERS if other.name != container.name]
    assert outline not in others
    assert outline != nesting.outline(container.make(1.0, [2.0, None]))
    assert outline != nesting.outline(container.make(1.0, (2.0,)))
    assert outline != nesting.outline(1.0)


@every_container
def test_an_outline_is_packed_without_its_tree(container):
    outline = nesting.outline(container.make(1.0, (2.0, None)))
    leaves = outline.matched(container.make("A", ("B", "C")))
    a, b = container.parts(outline.pack(leaves))
    assert a == "A" and b == ("B", "C")


@every_container
def test_none_stands_for_a_whole_branch(container):
    outline = nesting.outline(container.make(1.0, (2.0, 3.0)))
    assert outline.matched(None) == [None, None, None]
    a, b = container.parts(outline.pack(outline.matched(container.make("A", None))))
    assert a == "A" and b == (None, None)
    assert outline.matched(container.make(None, 2.0)) is None
    assert outline.matched(1.0) is None
    assert nesting.outline(1.0).matched(container.make(1.0, 2.0)) is None


def test_the_constants_of_a_container_are_a_part_of_its_outline():
    x, y = Frozen(1.0, None), Frozen(1.0, None)
    assert nesting.outline(x) == nesting.outline(y)
    y.name = "another"
    assert nesting.outline(x) != nesting.outline(y)
    assert not nesting.same_structure(x, y)


def test_dicts_of_several_kinds_are_alike_by_their_keys():
    outline = nesting.outline({"b": 1, "a": 2})
    assert outline.matched(collections.OrderedDict(b=1, a=2)) == [2, 1]
    assert nesting.outline(collections.OrderedDict(b=1, a=2)).matched({"a": 2, "b": 1}) == [1, 2]
    assert outline.matched({"b": 1, "c": 2}) is None


def test_the_order_of_keys_stays():
    assert list(nesting.map_structure(str, {"b": 1, "a": 2})) == ["b", "a"]
    assert nesting.flatten({"b": 1, "a": 2}) == [2, 1]
    assert list(nesting.outline(collections.OrderedDict(b=1, a=2)).pack([1, 2])) == ["b", "a"]


def test_keys_that_cannot_be_compared():
    x = {1: "one", "two": 2, None: 3}
    assert nesting.pack_as(x, nesting.flatten(x)) == x


def test_containers_of_another_size_or_type_are_not_alike():
    assert not nesting.same_structure(Named(1, 2), (1, 2))
    assert not nesting.same_structure([1, 2], (1, 2))
    assert not nesting.same_structure([1, 2], [1, 2, 3])
    assert nesting.same_structure(Pair(1, 2), Pair(3, 4))


def test_what_is_a_leaf():
    class Unknown:
        a = b = 1

    for x in (None, 1, 1.5, "abc", np.ones(2), keras.Variable(1.0), keras.layers.Dense(1), {1, 2}, Unknown(), len):
        assert not nesting.is_nested(x)
        assert nesting.flatten(x) == [x]


def test_a_class_that_is_registered_after_it_was_met(backend):
    class Late(Pair):
        pass

    assert not nesting.is_nested(Late(1, 2))
    if backend == "jax":
        import jax

        jax.tree_util.register_pytree_node(Late, lambda x: ((x.a, x.b), None), lambda _, c: Late(*c))
    else:
        import optree

        optree.register_pytree_node(Late, lambda x: ((x.a, x.b), None), lambda _, c: Late(*c), namespace="keras")
    assert nesting.flatten(Late(1, 2)) == [1, 2]


def test_what_leads_to_a_leaf():
    x = {"b": [1, Named(2, {"c": 3})], "a": (4,)}
    assert list(zip(nesting.flatten(x), nesting.paths(x), strict=True)) == [
        (4, ("a", 0)),
        (1, ("b", 0)),
        (2, ("b", 1, "a")),
        (3, ("b", 1, "b", "c")),
    ]
    assert nesting.paths(1) == [()]


def test_an_outline_reads_as_python_writes_it():
    assert str(nesting.outline({"a": 1, "b": [2, (3,)]})) == "{'a': '*', 'b': ['*', ('*',)]}"
    assert str(nesting.outline(Named(1, Pair(2, 3)))) == "Named(a='*', b=Pair('*', '*'))"
    assert str(nesting.outline(1.0)) == "*"
