"""The pairs of L-BFGS on the device of the model, and the inverse Hessian that they make."""

from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_gradtools import backend
from keras_gradtools.curvature.estimators.krylov_basis import dot

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
        self.multiply, self.combine = backend.jit(self._multiply), backend.jit(self._combine)

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
        number, newest = self._number_and_newest()
        following = (newest + 1) % self.places
        (steps, row), (changes, _) = self.steps.at(following), self.changes.at(following)
        blocks = [ops.convert_to_tensor(v) for v in (steps, changes)]
        found = _with_rows(blocks, row, [ops.convert_to_tensor(x) for x in (pair.step, pair.change)])
        steps.assign(found[0])
        changes.assign(found[1])
        if products is not None:
            self.products.assign(in_two_parts(products, self.products.dtype))
        self.place.assign(np.array([min(number + 1, self._memory), following], "int32"))

    def clear(self):
        """Forgets all pairs."""
        self.place.assign(np.zeros(2, "int32"))

    def _multiply(self, gradient, block, row):
        """The products of the gradient, and of a row of a block, with all steps and all changes."""
        vectors = [ops.convert_to_tensor(gradient), ops.take(block, ops.convert_to_tensor(row), axis=0)]
        return backend.products([*self.steps.matrices(), *self.changes.matrices()], vectors)

    def _combine(self, factors, gradient):
        """A combination of all steps, all changes and the gradient, and its products with the gradient."""
        gradient = ops.convert_to_tensor(gradient)
        rows = [*self.steps.matrices(), *self.changes.matrices(), gradient[None]]
        found = backend.combination(ops.convert_to_tensor(factors), rows)
        return found, backend.dots([(found, gradient)])


class Rows:
    """A matrix of zeros with rows that can be overwritten, divided into variables of some rows each.

    To overwrite a row copies its block, which is therefore small, or has one row: as few variables as possible, since
    each of them takes time in every step.

    Attributes:
        blocks: The variables, of shape `(rows, size)`.
        ends: Where all of them but the last one end.
    """

    def __init__(self, add_variable, name, count, size, dtype):
        self._each = each = min(max(_MOST_COPIED // size, 1), count)
        shapes = [(min(each, count - start), size) for start in range(0, count, each)]
        self.ends = list(range(each, count, each))
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
        products: The products in double precision, of shape `(2, places, places)`, once they are known.
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
        r"""The direction $-H g$, a tensor, its slope, and the approximation with the products that were computed.

        In the compact representation, only the products of the gradient and of the newest change with all stored
        vectors are needed, and then one combination of these vectors: each of them is read twice.

        Source: Byrd, Nocedal & Schnabel, "Representations of quasi-Newton matrices and their use in limited memory
        methods" (1994), theorem 2.2.
        """
        stored, newest, places = self.stored, self.newest, self.stored.places
        block, row = stored.changes.at(newest)
        found = _sum_of_parts(stored.multiply(gradient, ops.convert_to_tensor(block), row))
        products = _sum_of_parts(stored.products)
        products[0, :, newest] = found[:places, 1]
        products[1, :, newest] = products[1, newest] = found[places:, 1]
        used = [(newest - age) % places for age in reversed(range(self.number))]
        factors = np.zeros(2 * places + 1)
        changes = np.add(used, places)
        mixed, squares = products[:, used][:, :, used]
        found = _factors(mixed, squares, found[used, 0], found[changes, 0])
        factors[used], factors[changes], factors[-1] = found
        direction, slope = stored.combine(in_two_parts(-factors, stored.products.dtype), gradient)
        return direction, float(_sum_of_parts(slope)[0]), self._replace(products=products)


def _factors(mixed, squares, along_steps, along_changes):
    r"""The factors of the steps, of the changes and of the gradient in $H g$.

    Args:
        mixed: $s_i^\top y_j$, with the oldest pair first.
        squares: $y_i^\top y_j$.
        along_steps: $s_i^\top g$.
        along_changes: $y_i^\top g$.
    """
    upper, curvatures = np.triu(mixed), np.diag(mixed)
    scale = curvatures[-1] / squares[-1, -1]
    changes = np.linalg.solve(upper, along_steps)
    right = curvatures * changes + scale * (squares @ changes - along_changes)
    # Both are upper triangular, with the order reversed in the second one, so that no rows are exchanged.
    steps = np.linalg.solve(upper.T[::-1, ::-1], right[::-1])[::-1]
    return steps, -scale * changes, scale


def from_arrays(steps, changes, stored):
    """The values of `stored.variables` for pairs in the form that was saved before there was a ring.

    This is two arrays, with the newest pair first and rows of zeros at the end.
    """
    count = int(np.any(steps != 0.0, axis=1).sum())
    rows = np.zeros((2, stored.places, steps.shape[1]), steps.dtype)
    for row, given in zip(rows, (steps, changes), strict=True):
        row[:count] = given[:count][::-1]
    products = np.zeros((2, stored.places, stored.places))
    for i in range(count):
        for j in range(count - 1):
            products[:, i, j] = dot(rows[0, i], rows[1, j]), dot(rows[1, i], rows[1, j])
            products[1, j, i] = products[1, i, j]
    place = np.array([count, max(count - 1, 0)], "int32")
    blocks = [part for row in rows for part in np.split(row, stored.steps.ends)]
    return [*blocks, in_two_parts(products, steps.dtype), place]


def in_two_parts(x, dtype):
    """Numbers in double precision as the sum of two arrays of a dtype, stacked."""
    rounded = x.astype(dtype)
    return np.stack([rounded, (x - rounded).astype(dtype)])


def _sum_of_parts(x):
    return ops.convert_to_numpy(ops.convert_to_tensor(x)).astype("float64").sum(axis=0)
