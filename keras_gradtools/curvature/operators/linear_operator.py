"""A matrix that is known by its products, as SciPy and the estimators take it."""

from typing import Any, Literal

import numpy as np
from keras import ops

from keras_gradtools import validation
from keras_gradtools.annotations import Nested, Verbose
from keras_gradtools.curvature.estimators.diagonal import diagonal
from keras_gradtools.curvature.estimators.eigenvalues import eigsh
from keras_gradtools.curvature.estimators.estimate import Estimate
from keras_gradtools.curvature.estimators.spectral_density import SpectralDensity, spectral_density
from keras_gradtools.curvature.estimators.trace import trace
from keras_gradtools.curvature.operators import dense_memory
from keras_gradtools.curvature.operators.solver_vectors import solver_dtype
from keras_gradtools.display import html
from keras_gradtools.display.progress import Progress


class LinearOperator:
    """A real square matrix that is known by its products.

    `operator @ v` takes a vector of shape `(n,)` or a matrix of columns, arrays or tensors, and returns the same kind.
    SciPy takes an operator wherever it takes its own `LinearOperator`.

    Attributes:
        shape: `(n, n)`.
        dtype: The NumPy dtype of the products.
        is_symmetric: Whether the matrix is symmetric. A matrix whose elements are not known counts as symmetric.
        verbose: 1 for a progress bar, 0 for none, `"auto"` for a progress bar if the work takes more than 3 seconds.
    """

    # Makes NumPy leave `array + operator` to the operator, and raise a TypeError for `array @ operator`. Otherwise it
    # would apply the operation to each element of the array.
    __array_ufunc__ = None

    is_symmetric = True

    def __init__(self, shape: tuple[int, int], dtype: Any, verbose: Verbose = "auto") -> None:
        self.shape: tuple[int, ...] = tuple(shape)
        self.dtype: np.dtype = np.dtype(dtype)
        self.verbose: Verbose = verbose

    def __matmul__(self, vectors: Nested) -> Any:
        raise NotImplementedError

    @property
    def T(self) -> "LinearOperator":  # noqa: N802
        """The transpose, which is the operator itself if that is known to be symmetric."""
        return self

    def matvec(self, vector: Nested) -> Any:
        """The product with a vector of shape `(n,)` or `(n, 1)`, in that shape, as SciPy calls it."""
        n, shape = self.shape[0], tuple(np.shape(vector))
        if shape not in ((n,), (n, 1)):
            raise ValueError(
                f"matvec expects a vector of shape ({n},) or ({n}, 1). Received: {validation.describe(vector)}."
            )
        if len(shape) == 1:
            return self @ vector
        reshape = ops.reshape if ops.is_tensor(vector) else np.reshape
        return reshape(self @ reshape(vector, (n,)), (n, 1))

    def matmat(self, matrix: Nested) -> Any:
        """The product with a matrix of columns, of shape `(n, columns)`."""
        if len(np.shape(matrix)) != 2:
            raise ValueError(
                f"matmat expects a matrix of shape ({self.shape[0]}, columns). Received: {validation.describe(matrix)}."
            )
        return self @ matrix

    def rmatvec(self, vector: Nested) -> Any:
        """The product of the transpose with a vector, as for `matvec`."""
        return self.T.matvec(vector)

    def rmatmat(self, matrix: Nested) -> Any:
        """The product of the transpose with a matrix of columns, of shape `(n, columns)`."""
        return self.T.matmat(matrix)

    def dense(self) -> np.ndarray:
        """The matrix as a NumPy array of shape `(n, n)`, from `n` products.

        Raises:
            MemoryError: If the matrix would take more than half of the machine's memory.
        """
        n, dtype = self.shape[0], solver_dtype(self.dtype)
        dense_memory.require_room(type(self).__name__, n, dtype)
        return self @ np.eye(n, dtype=dtype)

    def trace(self, matvecs: int = 99, method: Literal["hutch++", "hutchinson"] = "hutch++", seed: int = 0) -> Estimate:
        """An `Estimate` of the trace: see `kg.curvature.trace`."""
        return trace(self, matvecs, method, seed)

    def diagonal(self, matvecs: int = 99, seed: int = 0) -> Estimate:
        """An `Estimate` of the diagonal: see `kg.curvature.diagonal`."""
        return diagonal(self, matvecs, seed)

    def eigsh(
        self,
        k: int = 6,
        which: Literal["LA", "SA", "LM", "BE"] = "LA",
        *,
        ncv: int | None = None,
        max_restarts: int | None = None,
        tol: float | None = None,
        seed: int = 0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Some eigenvalues and their eigenvectors: see `kg.curvature.eigsh`."""
        return eigsh(self, k, which, ncv=ncv, max_restarts=max_restarts, tol=tol, seed=seed)

    def spectral_density(
        self, probes: int = 10, steps: int = 50, *, points: int = 1000, width: float | None = None, seed: int = 0
    ) -> SpectralDensity:
        """A `SpectralDensity` of the eigenvalues: see `kg.curvature.spectral_density`."""
        return spectral_density(self, probes, steps, points=points, width=width, seed=seed)

    def linearized(self) -> "LinearOperator":
        """The matrix at the current weights, for many products with NumPy vectors.

        If the data of a curvature operator is one batch, products with the result are faster than with the operator. On
        torch, everything that does not depend on the vector is computed once and kept while the result exists, which
        halves the time. On the other backends, one program takes and returns flat vectors, which saves a few
        milliseconds.
        """
        return LinearizedOperator(self, self._fast_matvec())

    def _fast_matvec(self):
        """A function from a flat NumPy vector to its product at the current weights, faster than `@` if possible."""
        return lambda vector: self @ vector

    def to_scipy(self) -> Any:
        """This operator as a `scipy.sparse.linalg.LinearOperator`, in single or double precision.

        Raises:
            ImportError: If SciPy is not installed.
        """
        try:
            from scipy.sparse import linalg
        except ImportError:
            raise ImportError('`to_scipy` needs SciPy: pip install "keras-gradtools[solvers]".') from None
        return linalg.LinearOperator(
            self.shape, matvec=self.matvec, matmat=self.matmat, rmatvec=self.rmatvec, rmatmat=self.rmatmat,
            dtype=solver_dtype(self.dtype),
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of shape {self.shape}, dtype {self.dtype}>"

    def _repr_html_(self):
        return html.fragment(type(self).__name__, [html.Table(self._rows())])

    def _rows(self):
        """The names and values of the table that a notebook shows."""
        size = self.shape[0] ** 2 * solver_dtype(self.dtype).itemsize / 2**20
        kind = "symmetric" if self.is_symmetric else "not symmetric"
        return [
            ("shape", self.shape),
            ("dtype", self.dtype),
            ("matrix", f"{kind}, {size:.3g} MiB if formed by dense()"),
        ]

    def _progress(self, what, total, unit="product"):
        return Progress(total, f"{type(self).__name__}.{what}", self.verbose, unit)


class LinearizedOperator(LinearOperator):
    """An operator at fixed weights, known by its product with a flat NumPy vector."""

    def __init__(self, operator, matvec):
        super().__init__(operator.shape, operator.dtype, operator.verbose)
        self.is_symmetric, self._matvec = operator.is_symmetric, matvec

    def __matmul__(self, vector):
        if np.shape(vector) != self.shape[:1]:
            raise ValueError(
                f"A linearized operator multiplies a NumPy vector of shape {self.shape[:1]}. Received: "
                f"{validation.describe(vector)}. The operator itself multiplies matrices and nested tensors, too."
            )
        return self._matvec(vector)

    def linearized(self):
        """This operator itself."""
        return self
