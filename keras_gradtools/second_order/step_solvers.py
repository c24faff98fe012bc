"""Solvers of Newton's equation for one damping: by a factorization, or by conjugate gradients."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from keras_gradtools.curvature.estimators.krylov_basis import dot, norm
from keras_gradtools.curvature.operators.gauss_newton import GaussNewton
from keras_gradtools.curvature.operators.hessian import Hessian
from keras_gradtools.curvature.operators.solver_vectors import solver_dtype
from keras_gradtools.curvature.solvers import conjugate_gradient_loop as loop
from keras_gradtools.curvature.solvers.conjugate_gradients import conjugate_gradients
from keras_gradtools.second_order import newton_program
from keras_gradtools.second_order.newton_equation import SMALLEST_SHARE
from keras_gradtools.second_order.newton_program import Iterate

CURVATURES = {"hessian": Hessian, "gauss_newton": GaussNewton}
# The next conjugate gradient iterate is stored when the iteration number has grown by this factor since the last one.
_LEAST_GROWTH = 1.5


def require_enough_outputs(owner, operator, examples):
    """Raises `ValueError` if the examples have fewer outputs than there are weights."""
    weights, outputs = operator.shape[0], operator.outputs_of_example()
    if outputs is not None and examples * outputs < weights:
        raise ValueError(
            f"{owner} forms the matrix of {weights} weights, and needs at least as many outputs for it. Received: "
            f"{examples} examples with {examples * outputs} outputs in all. Take at least {-(-weights // outputs)} "
            "examples at a time, use fewer variables, or use a method with conjugate gradients. Or pass "
            "`allow_underdetermined=True`, so that damping determines the remaining directions."
        )


class Proposal(NamedTuple):
    """Steps proposed by a solver for one damping.

    Attributes:
        iterates: Each an `Iterate`, to try in this order until the loss goes down. Empty if a number is not finite.
        damping: The damping of the steps.
        iterations: Number of conjugate gradient iterations.
        size: The scale of the matrix. The least damping after a rejected step is relative to it.
        least_damping: The least damping for the next step.
    """

    iterates: Sequence
    damping: float
    iterations: int
    size: float
    least_damping: float = 0.0


class _Solver:
    """What the solvers share: the precision of the weights, and the scale of their steps."""

    def __init__(self, dtype):
        self.dtype, self._scale = np.dtype(dtype), 1.0

    def _iterate(self, x, slope, curved):
        """The `Iterate` of a NumPy array."""
        return Iterate(lambda: (self._scale * x).astype(self.dtype), slope, curved)


class DenseSolver(_Solver):
    """Solves Newton's equation by factorizing its matrix, in double precision.

    Args:
        system: A function without arguments that returns the loss, its gradient, and the equation: a `WeightSpace` or
            a `ResidualSpace`.
        dtype: The dtype of the weights.
        acceleration: A `GeodesicAcceleration`. None for none.
    """

    def __init__(self, system, dtype, acceleration=None):
        super().__init__(dtype)
        self._system, self._acceleration = system, acceleration

    def start(self, objective, damping, scale):
        self._scale = scale
        loss, gradient, self._equation = self._system()
        return loss, np.asarray(gradient, "float64")

    def solve(self, gradient, damping):
        equation = self._equation
        if not equation.is_finite:
            return Proposal((), damping, 0, 0.0)
        step, damping = equation.solve(damping)
        iterates = [self._iterate(step, dot(gradient, step), equation.curved(step))]
        if self._acceleration is not None and step.any():
            accelerated = self._acceleration.of(equation, step, damping)
            if accelerated is not None:
                # The correction follows the model, not the loss: the decrease that is predicted stays that of the step.
                iterates.insert(0, self._iterate(accelerated, *iterates[0][1:3]))
        return Proposal(iterates, damping, 0, equation.size)


class ConjugateGradientsSolver(_Solver):
    """Solves Newton's equation by conjugate gradients, using only products.

    A direction of negative curvature ends the iteration, and the step is the iterate before it. If the first direction
    has negative curvature, the step goes along that direction, to the minimum of a parabola with the absolute value of
    the curvature. See Nocedal & Wright, algorithm 7.1.

    Args:
        operator: A curvature operator. Its `linearized()` is used.
        max_iterations: Maximum number of products for each damping.
        rtol: Tolerance for the residual relative to the gradient. None for the smaller of 1/2 and the square root of
            the norm of the gradient.
        progress_tol: As for `kg.curvature.conjugate_gradients`.
        preconditioner: A `RecycledPreconditioner`, which is updated after every system. None for no preconditioner.
    """

    def __init__(self, operator, max_iterations, rtol=None, progress_tol=None, preconditioner=None):
        super().__init__(solver_dtype(operator.dtype))
        self._operator = operator
        self._max_iterations, self._rtol, self._progress_tol = max_iterations, rtol, progress_tol
        self._preconditioner = preconditioner

    def start(self, objective, damping, scale):
        self._linearized, self._scale = None, scale
        if self._preconditioner is not None:
            self._preconditioner.begin()
        self._in_one_program = self._operator.can_loop_over_products()
        if not self._in_one_program:
            return objective.loss_and_gradient()
        # One program computes the gradient and solves the equation with the first damping.
        self._solved = self._solve_in_one_program(damping)
        return self._solved.loss, self._solved.gradient

    def solve(self, gradient, damping):
        if self._in_one_program:
            found, self._solved = self._solved or self._solve_in_one_program(damping), None
            iterates, is_negative, length = found.iterates, found.reason == loop.NEGATIVE, found.length
        else:
            length = norm(gradient)
            found = self._solve_by_products(gradient, damping, length)
            iterates = self._iterates_of(found, gradient, damping)
            is_negative = found.reason == "negative_curvature"
        if self._preconditioner is not None:
            self._preconditioner.finish()
        if iterates is None:
            return Proposal((), damping, found.iterations, 0.0)
        size = length if found.curvature is None else max(length, abs(found.curvature - damping))
        # The smallest damping that removes this negative curvature.
        least = damping - found.curvature if is_negative else 0.0
        return Proposal(iterates, damping, found.iterations, size, least)

    def _solve_in_one_program(self, damping):
        """The `Solved` of one damping."""
        preconditioner, most, known, record = self._preconditioner, self._max_iterations, None, None
        if preconditioner is not None:
            # As many products as the preconditioner holds before it is updated.
            most, record = min(most, len(preconditioner.values)), preconditioner.record_all
            known = preconditioner.pairs_of(damping)
        options = loop.Options(
            self._max_iterations,
            self._progress_tol,
            most,
            _stored(self._max_iterations),
            record is not None,
            self._rtol,
        )
        run = self._operator.compute_with_product
        return newton_program.solve(run, damping, self._scale, options, self.dtype, known, record)

    def _solve_by_products(self, gradient, damping, length):
        """The result of conjugate gradients, by one product after the other. Some iterates are stored."""
        if self._linearized is None:
            linearized = self._operator.linearized()
            recorded = self._preconditioner is not None
            self._linearized = _Recorded(linearized, self._preconditioner) if recorded else linearized
        self._stored: list[Any] = []
        numbers = set(_stored(self._max_iterations))

        def store(i, x, _):
            if i in numbers:
                self._stored.append((i, x))

        return conjugate_gradients(
            self._linearized,
            -gradient.astype(self.dtype),
            damping=damping,
            preconditioner=None if self._preconditioner is None else self._preconditioner.of(damping),
            rtol=min(newton_program.LARGEST_RESIDUAL, length**0.5) if self._rtol is None else self._rtol,
            progress_tol=self._progress_tol,
            max_iterations=self._max_iterations,
            callback=store,
        )

    def _iterates_of(self, found, gradient, damping):
        """The solution and earlier iterates, as a list of `Iterate`. None if a number is not finite."""
        x = np.asarray(found.x, "float64")
        if found.reason == "not_finite" or not np.isfinite(x).all():
            return None
        # x'(B + damping) x = x'(b - r), and the residual r of conjugate gradients is orthogonal to x.
        steps = [x, *(x for i, x in reversed(self._stored) if i < found.iterations)]
        if found.reason == "negative_curvature" and not x.any():
            # The minimum along the first direction, if the sign of its curvature is changed.
            x = np.asarray(found.negative_curvature, "float64")
            x = -dot(gradient, x) / dot(x, x) / max(abs(found.curvature), SMALLEST_SHARE) * x
            return [self._iterate(x, dot(gradient, x), (found.curvature - damping) * dot(x, x))]
        slopes = [dot(gradient, x) for x in steps]
        return [self._iterate(x, slope, -slope - damping * dot(x, x)) for x, slope in zip(steps, slopes, strict=True)]


def _stored(limit):
    """The numbers of the iterates that are stored."""
    numbers = [1]
    while (following := math.ceil(_LEAST_GROWTH * numbers[-1])) <= limit:
        numbers.append(following)
    return tuple(numbers)


class _Recorded:
    """A matrix that records its products in the preconditioner."""

    __array_ufunc__ = None

    def __init__(self, matrix, preconditioner):
        self.shape, self._matrix, self._preconditioner = matrix.shape, matrix, preconditioner

    def __matmul__(self, vector):
        product = self._matrix @ vector
        self._preconditioner.record(vector, product)
        return product
