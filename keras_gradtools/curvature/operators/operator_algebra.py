"""Sums, multiples and products of operators, which are operators themselves."""

import numbers
from typing import Any

import numpy as np

from keras_gradtools import nesting, validation
from keras_gradtools.curvature.operators.linear_operator import LinearOperator
from keras_gradtools.curvature.operators.matrix_arguments import as_real_matrix, is_symmetric
from keras_gradtools.curvature.operators.solver_vectors import in_kind_of, real_numbers


class AlgebraicOperator(LinearOperator):
    """An operator that can be added, multiplied by numbers, and multiplied by other operators.

    The other operand may also be a sparse matrix or a `LinearOperator` of SciPy, and in a sum an array or a tensor.
    """

    def __matmul__(self, other: Any) -> Any:
        if _is_operator(other):
            return ProductOperator(self, _as_operator(other))
        return self._times(other)

    def __rmatmul__(self, other: Any) -> "AlgebraicOperator":
        return ProductOperator(_as_operator(other), self) if _is_operator(other) else NotImplemented

    def _times(self, vectors):
        """The product with a vector, a matrix of columns, or nested tensors. It is of the same kind as the operand."""
        raise NotImplementedError

    def __mul__(self, factor: float) -> "AlgebraicOperator":
        return LinearCombination([(float(factor), self)]) if validation.is_number(factor) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "AlgebraicOperator":
        return self * (1.0 / divisor) if validation.is_number(divisor) else NotImplemented

    def __neg__(self) -> "AlgebraicOperator":
        return -1.0 * self

    def __add__(self, other: Any) -> "AlgebraicOperator":
        other = _as_operator(other)
        return NotImplemented if other is None else LinearCombination([(1.0, self), (1.0, other)])

    __radd__ = __add__

    def __sub__(self, other: Any) -> "AlgebraicOperator":
        other = _as_operator(other)
        return NotImplemented if other is None else LinearCombination([(1.0, self), (-1.0, other)])

    def __rsub__(self, other: Any) -> "AlgebraicOperator":
        other = _as_operator(other)
        return NotImplemented if other is None else LinearCombination([(1.0, other), (-1.0, self)])


class LinearCombination(AlgebraicOperator):
    """The sum of multiples of operators, $c_1 A_1 + c_2 A_2 + ...$.

    Args:
        terms: A list of pairs, a number and an operator.
    """

    def __init__(self, terms):
        self._terms: list[tuple[float, LinearOperator]] = [
            (factor * f, operator)
            for factor, given in terms
            for f, operator in (given._terms if isinstance(given, LinearCombination) else [(1.0, given)])
        ]
        operators = [operator for _, operator in self._terms]
        super().__init__(_common_shape(operators), np.result_type(*(a.dtype for a in operators)), _verbose(operators))
        self.is_symmetric = all(a.is_symmetric for a in operators)

    def _times(self, vectors):
        products = [operator @ vectors for _, operator in self._terms]
        if not nesting.is_nested(products[0]):
            return self._combined(products)
        leaves = zip(*map(nesting.flatten, products), strict=True)
        return nesting.pack_as(products[0], map(self._combined, leaves))

    def _combined(self, products):
        (first, _), *others = self._terms
        total = first * products[0]
        for (factor, _), product in zip(others, products[1:], strict=True):
            total = total + factor * product
        return total

    def _rows(self):
        return [("terms", " + ".join(f"{factor:g} {operator!r}" for factor, operator in self._terms)), *super()._rows()]

    @property
    def T(self):  # noqa: N802
        terms = [(factor, a.T) for factor, a in self._terms]
        return self if terms == self._terms else LinearCombination(terms)

    def dense(self):
        return self._combined([operator.dense() for _, operator in self._terms])

    def _fast_matvec(self):
        matvecs = [operator._fast_matvec() for _, operator in self._terms]
        return lambda vector: self._combined([matvec(vector) for matvec in matvecs])


class ProductOperator(AlgebraicOperator):
    """The product of operators. It is symmetric if all are symmetric and their order reads the same backwards."""

    def __init__(self, *operators):
        self._factors: list[LinearOperator] = [
            factor for a in operators for factor in (a._factors if isinstance(a, ProductOperator) else [a])
        ]
        factors = self._factors
        super().__init__(_common_shape(factors), np.result_type(*(a.dtype for a in factors)), _verbose(factors))
        pairs = zip(factors, reversed(factors), strict=True)
        self.is_symmetric = all(a is b and a.is_symmetric for a, b in pairs)

    def _times(self, vectors):
        for factor in reversed(self._factors):
            vectors = factor @ vectors
        return vectors

    def _rows(self):
        return [("factors", " @ ".join(map(repr, self._factors))), *super()._rows()]

    @property
    def T(self):  # noqa: N802
        factors = [a.T for a in reversed(self._factors)]
        return self if factors == self._factors else ProductOperator(*factors)

    def _fast_matvec(self):
        matvecs = [a._fast_matvec() for a in reversed(self._factors)]

        def matvec(vector):
            for each in matvecs:
                vector = each(vector)
            return vector

        return matvec


class MatrixOperator(AlgebraicOperator):
    """A matrix of another library as an operator: an array, a sparse matrix or a `LinearOperator` of SciPy."""

    def __init__(self, matrix):
        super().__init__(matrix.shape, np.result_type(matrix.dtype, np.float32))
        self._matrix = matrix
        self.is_symmetric = is_symmetric(matrix)

    def _times(self, vectors):
        n = self.shape[0]
        is_numbers = nesting.is_nested(vectors) and all(map(validation.is_number, nesting.flatten(vectors)))
        given = np.asarray(nesting.flatten(vectors)) if is_numbers else vectors
        array = None if nesting.is_nested(given) else real_numbers(given)
        if array is None or array.ndim not in (1, 2) or array.shape[0] != n:
            raise ValueError(
                f"A matrix of shape ({n}, {n}) multiplies a vector of shape ({n},) or a matrix of shape ({n}, columns) "
                f"of real numbers. Received: {validation.describe(vectors)}."
            )
        return in_kind_of(given, np.asarray(self._matrix @ array))

    def dense(self):
        if isinstance(self._matrix, np.ndarray):
            return self._matrix.copy()
        return self._matrix.toarray() if hasattr(self._matrix, "toarray") else super().dense()

    @property
    def T(self):  # noqa: N802
        # Whether a `LinearOperator` of SciPy is symmetric is not known.
        is_known = isinstance(self._matrix, np.ndarray) or hasattr(self._matrix, "tocsr")
        return self if is_known and self.is_symmetric else MatrixOperator(self._matrix.T)


def _is_operator(x):
    """Whether `x` is an operator or a matrix that is not a tensor, so that a product with it is an operator."""
    return isinstance(x, LinearOperator) or hasattr(x, "tocsr") or hasattr(x, "matvec")


def _as_operator(x):
    """`x` as an operator. None if it is not a matrix. Raises `ValueError` if it is not real and square."""
    if isinstance(x, LinearOperator):
        return x
    if not hasattr(x, "shape") or not hasattr(x, "__matmul__") or isinstance(x, numbers.Number):
        return None
    matrix = as_real_matrix(x)
    if matrix is None or len(matrix.shape) != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(
            "An operator can be added to, and multiplied by, real square matrices and operators. Received: "
            f"{validation.describe(x)}."
        )
    return MatrixOperator(matrix)


def _common_shape(operators):
    shapes = list(dict.fromkeys(a.shape for a in operators))
    if len(shapes) > 1:
        raise ValueError(f"Operators to add or multiply must have the same shape. Received: the shapes {shapes}.")
    return shapes[0]


def _verbose(operators):
    """0 if one of the operators is silent, 1 if one always shows a bar, otherwise `"auto"`."""
    given = [a.verbose for a in operators]
    return next((choice for choice in (0, 1) if choice in given), "auto")
