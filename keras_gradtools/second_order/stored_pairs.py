"""The pairs of L-BFGS on the device of the model, and the inverse Hessian that they make."""

from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_gradtools import backend
from keras_gradtools.curvature.operators.trials import Direction
from keras_gradtools.second_order.compact_direction import compact_direction

# Number of elements of a variable that may be copied in order to change one row of it.
_MOST_COPIED = 2**16


class StoredPairs:
    r"""A ring of pairs, in which a step overwrites one.

    One place more than `memory` is there: a new pair overwrites a place that is not in use. An interrupted step has
    thus changed nothing as long as `place` has its old value.

    Attributes:
        places: The number of places.
        steps, changes: `Rows` for the steps and for the changes of the gradient.
        products: A variable of shape `(2, 2, places, places)`: two parts of $s_i^\top y_j$ and of $y_i^\top y_j$. See
            `backend.dots` for the parts. Those of the newest pair are not in it.
        place: A variable of two integers, the number of pairs and the place of the newest one.
    """

    def __init__(self, add_variable, memory, size, dtype):
        self._memory, self.places = memory, memory + 1
        self.steps, self.changes = (
            Rows(add_variable, name, self.places, size, dtype) for name in ("steps", "gradient_changes")
        )
        self.products = add_variable((2, 2, self.places, self.places), name="pair_products", dtype=dtype)
        self.place = add_variable((2,), name="pair_place", dtype="int32")

    @property
    def variables(self):
        return [*self.steps.blocks, *self.changes.blocks, self.products, self.place]

    def current(self):
        """The `Pairs` that are in use."""
        number, newest = self._number_and_newest()
        return Pairs(self, number, newest)

    def _number_and_newest(self):
        return map(int, ops.convert_to_numpy(ops.convert_to_tensor(self.place)))

    def add(self, pair, products):
        """Stores a pair as the newest one. `products` are those of the former pairs, as `Pairs.products` has them."""
        following, place = self._following()
        (steps, row), (changes, _) = self.steps.at(following), self.changes.at(following)
        blocks = [ops.convert_to_tensor(v) for v in (steps, changes)]
        found = _with_rows(blocks, row, [ops.convert_to_tensor(x) for x in (pair.step, pair.change)])
        steps.assign(found[0])
        changes.assign(found[1])
        if products is not None:
            self.products.assign(products)
        self.place.assign(place)

    def added(self, pair, products):
        """The arrays with which `assign` stores what `add` would store. Only if `is_small`."""
        following, place = self._following()
        return pair.step, pair.change, products, np.array(following, "int32"), place

    def assign(self, step, change, products, row, place):
        """Stores a pair, as a part of a program."""
        for (block,), vector in ((self.steps.blocks, step), (self.changes.blocks, change)):
            backend.set_row(block, row, vector)
        self.products.assign(products)
        self.place.assign(place)

    def _following(self):
        """The place of the next pair, and the value of `place` with it."""
        number, newest = self._number_and_newest()
        following = (newest + 1) % self.places
        return following, np.array([min(number + 1, self._memory), following], "int32")

    @property
    def is_small(self):
        """Whether a program can read all pairs, and overwrite one, in little more time than its call takes."""
        return len(self.steps.blocks) == 1 and self.steps.blocks[0].shape[1] <= backend.LONG

    def clear(self):
        """Forgets all pairs."""
        self.place.assign(np.zeros(2, "int32"))


class Rows:
    """A matrix of zeros with rows that can be overwritten, divided into variables of some rows each.

    To overwrite a row copies its block, which is therefore small, or has one row: as few variables as possible, since
    each of them takes time in every step.

    Attributes:
        blocks: The variables, of shape `(rows, size)`.
    """

    def __init__(self, add_variable, name, count, size, dtype):
        self._each = each = min(max(_MOST_COPIED // size, 1), count)
        shapes = [(min(each, count - start), size) for start in range(0, count, each)]
        self.blocks = [add_variable(shape, name=f"{name}_{i}", dtype=dtype) for i, shape in enumerate(shapes)]

    def matrices(self):
        return [ops.convert_to_tensor(v) for v in self.blocks]

    def at(self, place):
        """The block that has the row at a place, and the number of the row in it, an array."""
        return self.blocks[place // self._each], np.array(place % self._each, "int32")


def _with_rows(matrices, place, rows):
    """The matrices, each with another row at a place."""
    if matrices[0].shape[0] == 1:
        return [row[None] for row in rows]
    return _overwritten(matrices, place, rows)


@backend.jit
def _overwritten(matrices, place, rows):
    place = ops.reshape(ops.convert_to_tensor(place), (1, 1))
    return [ops.scatter_update(m, place, row[None]) for m, row in zip(matrices, rows, strict=True)]


class Pairs(NamedTuple):
    """The approximation of the inverse Hessian by `number` stored pairs, and by one that is not stored yet.

    Attributes:
        stored: The `StoredPairs`.
        number: The number of pairs in use.
        newest: The place of the newest one.
        pair: A `Pair` that is newer than all of them. None for none.
        products: The products, a tensor as `StoredPairs.products`, with those of the newest pair. None before they are
            computed.
    """

    stored: StoredPairs
    number: int
    newest: int
    pair: Any = None
    products: Any = None

    @property
    def is_initial(self):
        return not self.number and self.pair is None

    def initial(self):
        return self._replace(number=0, pair=None)

    def updated(self, pair):
        return self._replace(pair=pair)

    def descent(self, gradient):
        """The direction $-H g$, a tensor, its slope, and the approximation with the products that were computed."""
        direction, slope, products = _descent(ops.convert_to_tensor(gradient), *self._arguments())
        slope = ops.convert_to_numpy(slope).astype("float64").sum()
        return direction, float(slope), self._replace(products=products)

    def direction(self):
        """The `Direction` of trials, whose further tensors `descended` takes. None if it is better computed before."""
        return Direction(compact_direction, self._arguments()) if self.stored.is_small else None

    def descended(self, products):
        return self._replace(products=products)

    @property
    def can_be_added_at_once(self):
        """Whether `StoredPairs.assign` can store the new pair."""
        return self.pair is not None and self.products is not None and self.stored.is_small

    def _arguments(self):
        stored = self.stored
        block, row = stored.changes.at(self.newest)
        place = np.array([self.number, self.newest], "int32")
        tensors = [ops.convert_to_tensor(v) for v in (block, stored.products)]
        return tensors[0], row, place, tensors[1], *stored.steps.matrices(), *stored.changes.matrices()


@backend.jit
def _descent(gradient, *arguments):
    direction, products = compact_direction(gradient, *map(ops.convert_to_tensor, arguments))
    return direction, backend.dots([(direction, gradient)]), products
