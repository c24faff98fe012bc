"""The direction of L-BFGS from its pairs, in the compact representation, as a part of compiled programs."""

from keras import ops

from keras_gradtools import backend
from keras_gradtools.backend.base import in_two_parts


def compact_direction(gradient, block, row, place, products, *rows):
    r"""The direction $-H g$, and the products with those of the newest pair.

    Only the products of the gradient and of the newest change with all stored vectors are needed, and then one
    combination of these vectors: each of them is read twice.

    Args:
        gradient: $g$.
        block: The changes of the gradient, or some of them with the newest one.
        row: The number of the newest change among these.
        place: Two integers, the number of pairs and the place of the newest one. Without pairs, H is the identity.
        products: As `StoredPairs.products`.
        *rows: All steps and then all changes, as matrices of some rows each.

    Source: Byrd, Nocedal & Schnabel, "Representations of quasi-Newton matrices and their use in limited memory methods"
    (1994), theorem 2.2.
    """
    found = backend.products(rows, [gradient, ops.take(block, row, axis=0)])
    with backend.in_double_precision():
        found, products = (_sum_of_parts(x) for x in (found, products))
        products = _with_newest(products, found[:, 1], place[1])
        factors = in_two_parts(-_factors(products, found[:, 0], place), gradient.dtype)
        products = in_two_parts(products, gradient.dtype)
    return backend.combination(factors, [*rows, gradient[None]]), products


def _with_newest(products, found, newest):
    """The products of shape `(2, places, places)`, with those of the newest change with all steps and all changes."""
    places = products.shape[1]
    is_newest = ops.equal(ops.arange(places, dtype="int32"), newest)
    mixed = ops.where(is_newest[None, :], found[:places, None], products[0])
    squares = ops.where(is_newest[None, :], found[places:, None], products[1])
    return ops.stack([mixed, ops.where(is_newest[:, None], found[None, places:], squares)])


def _factors(products, along, place):
    r"""The factors of the steps, of the changes and of the gradient in $H g$, of shape `(2 * places + 1,)`.

    `along` are the products $s_i^\top g$ and then $y_i^\top g$.
    """
    places, (number, newest) = products.shape[1], (place[0], place[1])
    numbers = ops.arange(places, dtype="int32")
    # By age, with the oldest pair first. Those that are not in use count as rows of the identity.
    order = ops.mod(newest + 1 + numbers, places)
    is_used = numbers >= places - number
    both_used = is_used[:, None] & is_used[None, :]
    identity = ops.cast(~is_used, products.dtype)
    both = ops.reshape(order[:, None] * places + order[None, :], (-1,))
    products = ops.reshape(ops.take(ops.reshape(products, (2, -1)), both, axis=1), products.shape)
    products = ops.where(both_used, products, 0.0)
    along = ops.where(is_used, ops.take(ops.reshape(along, (2, places)), order, axis=1), 0.0)
    mixed, squares = products[0], products[1]
    upper = ops.triu(mixed) + ops.diag(identity)
    scale = ops.where(number > 0, mixed[-1, -1] / squares[-1, -1], 1.0)
    changes = ops.solve_triangular(upper, along[0])
    right = ops.diagonal(mixed) * changes + scale * ((squares @ changes[:, None])[:, 0] - along[1])
    steps = ops.solve_triangular(ops.transpose(upper), right, lower=True)
    # Back in the order of the places.
    back = ops.mod(numbers - newest - 1, places)
    factors = ops.take(ops.stack([steps, -scale * changes]), back, axis=1)
    return ops.concatenate([ops.reshape(factors, (-1,)), scale[None]])


def _sum_of_parts(x):
    x = ops.cast(x, "float64")
    return x[0] + x[1]
