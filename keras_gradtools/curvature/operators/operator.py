"""The base class of the curvature operators."""

import copy
import fractions
import functools
import math
from collections.abc import Iterator
from typing import Any, Self

import keras
import numpy as np
from keras import ops

from keras_gradtools import memory, nesting, validation
from keras_gradtools.annotations import ArrayLike, ChunkSize, Data, Loss, Nested, Variables, Verbose
from keras_gradtools.curvature.data import batch_sums
from keras_gradtools.curvature.data.batch_loss import BatchLoss, require_model
from keras_gradtools.curvature.data.batches import Batches, batch_size_of
from keras_gradtools.curvature.data.data_sums import DataSums, on_devices
from keras_gradtools.curvature.data.residual_loss import PointBatches, ResidualLoss, residual_loss_of
from keras_gradtools.curvature.estimators.loss_surface import LossSurface, loss_surface
from keras_gradtools.curvature.operators import dense_memory
from keras_gradtools.curvature.operators.linearized_products import fast_matvec
from keras_gradtools.curvature.operators.operator_algebra import AlgebraicOperator
from keras_gradtools.curvature.operators.parameters import Parameters
from keras_gradtools.curvature.operators.solver_vectors import solver_dtype
from keras_gradtools.curvature.operators.trials import Trials, trials_of
from keras_gradtools.display.progress import Progress
from keras_gradtools.transforms.jacobians import require_rows

# Number of columns of a matrix that are multiplied in one pass over the data. More columns were slower on every
# backend, because the activations for all of them no longer fit into the cache.
COLUMNS = 64
# Limit on the numbers in the rows that one call of a program computes. A call covers several chunks, which share one
# evaluation of the model.
_NUMBERS_OF_A_CALL = 2**24
# The share of a memory budget for the rows that a call returns, which are there twice when batches are added up.
_SHARE_OF_ROWS = 0.25


class CurvatureOperator(AlgebraicOperator):
    """A symmetric curvature matrix of a loss with respect to the weights of a model, known by its products.

    This is the base class. To make an operator, use `kg.curvature.Hessian`, `GaussNewton` or `Fisher`.

    The matrix is only formed by `dense` and `blocks`. Operators of the same shape can be added, multiplied by numbers,
    and multiplied by one another (`2 * h + g`, `g @ h @ g`). The result is an operator for the estimators and solvers
    of `kg.curvature`. SciPy takes an operator wherever it takes its own `LinearOperator`.

    Attributes:
        model: The model that has the weights. For a wrapper of `kg.models`, the wrapped model.
        variables: The variables of the derivatives, in a list.
        slices: For each variable, the slice of its elements in a flat vector, in the order of
            `keras.ops.reshape(v, -1)`.
        shape: `(n, n)`, where n is the total number of elements of the variables.
        dtype: The NumPy dtype of the products, the common dtype of the variables.
        verbose: 1 for a progress bar, 0 for none, `"auto"` for a progress bar if the work takes more than 3 seconds.
    """

    # What errors name, if it is not the class: the callback or the optimizer that the user called.
    _owner: str | None = None

    def __init__(
        self,
        model: keras.Layer,
        loss: Loss,
        data: Data,
        variables: Variables = None,
        training: bool = False,
        *,
        batch_size: int = 256,
        verbose: Verbose = "auto",
    ) -> None:
        owner = self._owner or type(self).__name__
        validation.require_loss(owner, loss)
        validation.require_verbose(owner, verbose)
        self.model: keras.Layer = require_model(owner, model)
        self._parameters = Parameters(owner, self.model, variables)
        # A wrapper is compiled itself, so the compiled loss is that of `model`, not of the wrapped model.
        residuals = residual_loss_of(model, loss)
        if residuals is None:
            of = model if loss is None else self.model
            self._loss = BatchLoss(owner, of, loss, self._parameters.variables, training)
            batches = Batches(owner, data, batch_size, must_repeat=True)
        else:
            self._loss = ResidualLoss(owner, residuals, self._parameters.variables, training)
            batches = PointBatches(owner, data, must_repeat=True)
        self._sums = DataSums(
            owner, type(self).__name__, self.model, self._loss, self._make_spec(), self._parameters, batches, model
        )
        self._outputs = None
        self.variables: list[keras.Variable] = list(self._parameters.variables)
        self.slices: list[slice] = list(self._parameters.slices)
        super().__init__((self._parameters.size, self._parameters.size), self._parameters.dtype, verbose)

    @classmethod
    def of_callback(cls, owner: str, *args: Any, **options: Any) -> Self:
        """The operator of a callback or an optimizer, which errors name as the `owner`."""
        operator = cls.__new__(cls)
        operator._owner = owner
        cls.__init__(operator, *args, **options)
        return operator

    def _make_spec(self):
        """Returns the `OfBatch` that makes the linear map of one batch."""
        raise NotImplementedError

    def _times(self, vectors):
        parts, count, in_kind = self._parameters.received(vectors)
        if count is None or count <= COLUMNS:
            return in_kind(self._sums.product(parts, count))
        owner, chunks = type(self).__name__, []
        with Progress(math.ceil(count / COLUMNS), f"{owner} @ matrix", self.verbose) as progress:
            for start in range(0, count, COLUMNS):
                chunk = [part[start : start + COLUMNS] for part in parts]
                chunks.append(progress.after(self._sums.product(chunk, chunk[0].shape[0])))
        return in_kind([ops.concatenate(of_variable, axis=0) for of_variable in zip(*chunks, strict=True)])

    def _fast_matvec(self):
        return fast_matvec(self._sums) or super()._fast_matvec()

    def dense(self, chunk_size: ChunkSize = None, memory_budget: int | None = None) -> np.ndarray:
        """The matrix as a NumPy array of shape `(n, n)`.

        The matrix is exactly symmetric: a block of two variables is computed once and copied to its mirror image, and
        the block of a variable with itself is averaged with its transpose.

        Args:
            chunk_size: Number of rows to compute at once, 64 by default. It bounds the memory and changes no value.
                `"auto"` computes as many rows as fit into `memory_budget`, at most 64.
            memory_budget: The number of bytes that the computation may take besides the matrix, with
                `chunk_size="auto"`. By default a quarter of the free memory. A row is taken to need as much as all
                tensors that a second row computes, which is more than it needs at any one time.

        Raises:
            ValueError: If `chunk_size` or `memory_budget` is not a positive integer, or if both are.
            MemoryError: If the matrix would take more than half of the machine's memory.

        Cost:
            About n products. To estimate the memory, `"auto"` computes three rows more. On JAX it only traces them.
        """
        chunk_size, memory_budget = require_rows(f"{type(self).__name__}.dense", chunk_size, memory_budget)
        n, dtype = self._parameters.size, solver_dtype(self.dtype)
        owner = type(self).__name__
        dense_memory.require_room(owner, n, dtype)
        matrix = np.empty((n, n), dtype)
        chunk_size, numbers = self._rows_that_fit(chunk_size, memory_budget)
        per_call = max(numbers // max(n, 1) // chunk_size, 1) * chunk_size
        tasks = [
            (place, start, min(per_call, s.stop - s.start))
            for place, s in enumerate(self.slices)
            for start in range(0, s.stop - s.start, per_call)
        ]
        with Progress(len(tasks), f"{owner}.dense", self.verbose) as progress:
            for place, start, size in tasks:
                first, last = self.slices[place].start + start, self.slices[place].stop
                totals, count = self._sums.rows(place, start, size, chunk_size)
                for total, columns in zip(totals, self.slices[place:], strict=True):
                    rows = ops.convert_to_numpy(total)[: last - first].reshape(-1, columns.stop - columns.start)
                    np.divide(rows, count, out=matrix[first : first + len(rows), columns])
                progress.update()
        dense_memory.symmetrize(matrix, self.slices)
        return matrix

    def _rows_that_fit(self, chunk_size, budget):
        """How many rows to compute at once, and how many numbers a call may return."""
        if chunk_size != "auto":
            return chunk_size or COLUMNS, _NUMBERS_OF_A_CALL
        budget = budget or memory.budget()
        returned = int(_SHARE_OF_ROWS * budget)
        one, two = self._sums.bytes_of_rows(1), self._sums.bytes_of_rows(2)
        # What one row computes beyond that is shared, such as the evaluation of the model.
        more = (budget - returned - one) // max(two - one, 1)
        return min(max(1 + more, 1), COLUMNS), min(returned // self.dtype.itemsize, _NUMBERS_OF_A_CALL)

    def blocks(self, chunk_size: ChunkSize = None, memory_budget: int | None = None) -> Nested:
        """The matrix as nested blocks like those of `kg.hessian`, NumPy arrays of shape `(*in_i, *in_j)`.

        `blocks[i][j]` is the block of the i-th and the j-th variable. The arguments are those of `dense`.
        """
        matrix = self.dense(chunk_size, memory_budget)
        shapes = self._parameters.shapes
        rows = [
            [matrix[a, b].reshape(*s, *t) for b, t in zip(self.slices, shapes, strict=True)]
            for a, s in zip(self.slices, shapes, strict=True)
        ]
        structure = self._parameters.structure
        return nesting.pack_as(structure, [nesting.pack_as(structure, row) for row in rows])

    def loss(self, offset: Nested = None) -> float:
        """The loss $L$ whose curvature this is, as a float.

        Args:
            offset: A vector, in any form that `@` accepts, that is added to the weights for this evaluation. None for
                no offset. The weights of the model do not change.

        Cost:
            One evaluation of the loss over the data.
        """
        return self._sums.loss_at(self._offset("loss", offset))

    def gradient(self, offset: Nested = None) -> np.ndarray:
        """The gradient of the loss, a NumPy array of shape `(n,)`. `offset` is as for `loss`."""
        return self.loss_and_gradient(offset)[1]

    def loss_and_gradient(self, offset: Nested = None) -> tuple[float, np.ndarray]:
        """Returns `(loss, gradient)`, at the cost of the gradient. `offset` is as for `loss`."""
        return self._sums.loss_and_gradient_at(self._offset("loss_and_gradient", offset))

    def loss_surface(
        self, directions: ArrayLike = None, distance: float = 1.0, points: int = 21, seed: int = 0
    ) -> LossSurface:
        """A `LossSurface` over a plane through the weights: see `kg.curvature.loss_surface`."""
        return loss_surface(self, directions, distance, points, seed)

    def move(self, offset: Nested) -> None:
        """Adds a vector, in any form that `@` accepts, to the variables. After an error, none of them has changed."""
        if offset is None:
            raise ValueError("move expects a vector as `offset`. Received: offset=None.")
        self._parameters.move(self._offset("move", offset))

    def moved(self, offset: Any) -> list[Any]:
        """The current values of the variables plus a flat vector, as a tensor for each."""
        return self._parameters.moved(offset)

    def _offset(self, name, offset):
        if offset is None:
            return None
        return self._parameters.flat(name, offset)

    def __repr__(self) -> str:
        names = ", ".join(v.path for v in self.variables[:3]) + (", ..." if len(self.variables) > 3 else "")
        owner = type(self).__name__
        return f"<{owner} of {self.model.name!r} by {names}, shape {self.shape}, dtype {self.dtype}>"

    def _rows(self):
        variables = ", ".join(f"{v.path} {tuple(v.shape)}" for v in self.variables)
        return [("model", self.model.name), ("variables", variables), *super()._rows()]

    # --- the data ---

    def batches(self) -> Iterator[tuple[Any, Any, Any]]:
        """Iterates over the batches of the data, `(x, y, sample_weight)` as tensors."""
        return iter(self._sums.batches)

    def count_examples(self) -> int:
        """The number of examples in the data."""
        return sum(map(batch_size_of, self._sums.batches))

    def of_batch(self, batch: Any, draws_anew: bool = True) -> Self:
        """The same operator on a single batch, `(x, y, sample_weight)` as tensors.

        With `draws_anew`, its random numbers start from the current states of the seeds. Otherwise they are those of
        this operator.
        """
        other = copy.copy(self)
        other._sums = self._sums.of_batch(batch)
        if draws_anew:
            other.draw_anew()
            # Both share the set of passed checks. The seeds that a check finds are kept for the next batch.
            other._sums.prepare()
            self._sums.draws = other._sums.draws
        return other

    def compute(self, what: Any, body: Any, batch: Any, *args: Any) -> Any:
        """Runs `body(spec, loss, parameters, model, batch, *args)` compiled, with the random numbers of this operator.

        `what` identifies the program in the cache. `spec` is the `OfBatch` of the operator, `loss` its `BatchLoss`, and
        `parameters` its `Parameters`.
        """
        return self._sums.run(what, body, on_devices(batch), *args)

    def can_loop_over_products(self) -> bool:
        """Whether `compute_with_product` can be used, and is faster than one program for each product."""
        return self._sums.can_loop()

    def compute_with_product(self, what: Any, body: Any, *args: Any) -> Any:
        """Runs `body(product, loss_at, loss_and_gradient, *args)` compiled, if `can_loop_over_products()`.

        `what` identifies the program in the cache. `product` multiplies a flat vector in tensors. The others are as for
        `compute_with_loss`.
        """
        self._sums.prepare("gradient")
        return self._sums.of_one_batch(("with product", what), functools.partial(batch_sums.with_product, body), args)

    def can_evaluate_at_once(self) -> bool:
        """Whether one program can evaluate the loss several times, without taking long to trace."""
        return self._sums.can_evaluate_at_once()

    def compute_with_loss(self, what: Any, body: Any, *args: Any) -> Any:
        """Runs `body(loss_at, loss_and_gradient, *args)` compiled, if `can_evaluate_at_once()`.

        `what` identifies the program in the cache. `loss_at` takes a flat offset to the weights in tensors, and
        `loss_and_gradient` takes nothing.
        """
        body = functools.partial(batch_sums.with_loss, body)
        return self._sums.of_one_batch(("with loss", what), body, args, needs="gradient")

    def draw_anew(self) -> None:
        """Takes the current states of the model's seeds, so that dropout uses new masks from here on.

        Until this is called, all products, losses and gradients use the masks from when the operator was created,
        whatever is called in between, and also after `move`.
        """
        self._sums.draw_anew()

    def check(self, of: str = "product") -> None:
        """Runs the checks of the first product now. With `of="gradient"`, those of the first loss or gradient."""
        self._sums.prepare(of)

    def trials(self) -> Trials:
        """`Trials` of the loss of a single batch. Runs the checks of the first gradient."""
        return trials_of(self._sums)

    def loss_state(self) -> Any:
        """What the loss of a single batch depends on now, a `LossState`. None if the loss may change by itself."""
        return self._sums.loss_state()

    @property
    def is_of_logits(self) -> bool:
        """Whether the model returns probabilities, and the matrix is that of the loss of their logits."""
        return self._sums.spec.loss is not self._sums.loss

    def outputs_of_example(self) -> int | fractions.Fraction | None:
        """The number of outputs of the model for one example. None if there are regularizers, which add to the rank.

        For a `SquaredResiduals`, the number of residuals over that of the examples, which may be a fraction.
        """
        if self._outputs is None:
            self._outputs = self._sums.outputs_of_example()
        return self._outputs
