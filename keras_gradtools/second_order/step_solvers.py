"""Solvers of Newton's equation for one damping: by a factorization, or by conjugate gradients."""

import math
from typing import Any, NamedTuple

import numpy as np

from keras_gradtools.curvature.estimators.krylov_basis import dot, norm
from keras_gradtools.curvature.operators.gauss_newton import GaussNewton
from keras_gradtools.curvature.operators.hessian import Hessian
from keras_gradtools.curvature.operators.solver_vectors import solver_dtype
from keras_gradtools.curvature.solvers import conjugate_gradient_loop
from keras_gradtools.curvature.solvers.conjugate_gradients import conjugate_gradients
from keras_gradtools.second_order.newton_equation import SMALLEST_SHARE

CURVATURES = {"hessian": Hessian, "gauss_newton": GaussNewton}
# The next conjugate gradient iterate is stored when the iteration number has grown by this factor since the last one.
_LEAST_GROWTH = 1.5
# Nocedal & Wright's forcing term: the relative residual is at most this, and at most the root of the gradient norm.
_LARGEST_RESIDUAL = 0.5


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
    r"""A step proposed by a solver, before its loss is evaluated.

    Attributes:
        step: The step $p$. None if a number is not finite.
        slope: $g^\top p$, the linear term of the quadratic model.
        curved: $p^\top B p$, twice the quadratic term.
        damping: The damping of the step.
        iterations: Number of conjugate gradient iterations.
        size: The scale of the matrix. The least damping after a rejected step is relative to it.
        shorter: Other steps, as `(step, slope, curved)`, to try in this order if the loss does not go down.
        least_damping: The least damping for the next step.
    """

    step: np.ndarray | None
    slope: float
    curved: float
    damping: float
    iterations: int
    size: float
    shorter: tuple = ()
    least_damping: float = 0.0


class DenseSolver:
    """Solves Newton's equation by factorizing its matrix, in double precision.

    Args:
        system: A function without arguments that returns the loss, its gradient, and the equation: a `WeightSpace` or
            a `ResidualSpace`.
        dtype: The dtype of the weights.
        acceleration: A `GeodesicAcceleration`. None for none.
    """

    def __init__(self, system, dtype, acceleration=None):
        self._system, self.dtype, self._acceleration = system, np.dtype(dtype), acceleration

    def start(self, objective):
        loss, gradient, self._equation = self._system()
        return loss, np.asarray(gradient, "float64")

    def solve(self, gradient, damping):
        equation = self._equation
        if not equation.is_finite:
            return Proposal(None, 0.0, 0.0, damping, 0, 0.0)
        step, damping = equation.solve(damping)
        slope, curved = dot(gradient, step), equation.curved(step)
        proposal = Proposal(step, slope, curved, damping, 0, equation.size)
        if self._acceleration is None or not step.any():
            return proposal
        accelerated = self._acceleration.of(equation, step, damping)
        if accelerated is None:
            return proposal
        # The correction follows the model, not the loss: the decrease that is predicted stays that of the step.
        return proposal._replace(step=accelerated, shorter=((step, slope, curved),))


class ConjugateGradientsSolver:
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
        self._operator, self.dtype = operator, solver_dtype(operator.dtype)
        self._max_iterations, self._rtol, self._progress_tol = max_iterations, rtol, progress_tol
        self._preconditioner = preconditioner

    def start(self, objective):
        self._linearized = None
        if self._preconditioner is not None:
            self._preconditioner.begin()
        return objective.loss_and_gradient()

    def solve(self, gradient, damping):
        if self._linearized is None:
            self._linearized = self._start()
        length = norm(gradient)
        rtol = min(_LARGEST_RESIDUAL, length**0.5) if self._rtol is None else self._rtol
        by = self._in_one_program if self._linearized is _ONE_PROGRAM else self._by_products
        found, iterates = by(-gradient.astype(self.dtype), damping, rtol)
        if self._preconditioner is not None:
            self._preconditioner.finish()
        x = np.asarray(found.x, "float64")
        if found.reason == "not_finite" or not np.isfinite(x).all():
            return Proposal(None, 0.0, 0.0, damping, found.iterations, 0.0)
        if found.reason == "negative_curvature" and not x.any():
            # The minimum along the first direction, if the sign of its curvature is changed.
            x = np.asarray(found.negative_curvature, "float64")
            x = -dot(gradient, x) / dot(x, x) / max(abs(found.curvature), SMALLEST_SHARE) * x
            curved = (found.curvature - damping) * dot(x, x)
        else:
            # x'(B + damping) x = x'(b - r), and the residual r of conjugate gradients is orthogonal to x.
            curved = -dot(gradient, x) - damping * dot(x, x)
        size = length if found.curvature is None else max(length, abs(found.curvature - damping))
        shorter = []
        for i, earlier in reversed(iterates):
            if i < found.iterations:
                slope = dot(gradient, earlier)
                shorter.append((earlier, slope, -slope - damping * dot(earlier, earlier)))
        # The smallest damping that removes this negative curvature.
        least = damping - found.curvature if found.reason == "negative_curvature" else 0.0
        return Proposal(x, dot(gradient, x), curved, damping, found.iterations, size, tuple(shorter), least)

    def _start(self):
        if self._operator.can_loop_over_products():
            return _ONE_PROGRAM
        linearized = self._operator.linearized()
        return linearized if self._preconditioner is None else _Recorded(linearized, self._preconditioner)

    def _by_products(self, b, damping, rtol):
        """The result of conjugate gradients, and some iterates with their numbers, by one product after the other."""
        iterates: list[Any] = []
        stored = set(_stored(self._max_iterations))

        def store(i, x, _):
            if i in stored:
                iterates.append((i, x))

        found: Any = conjugate_gradients(
            self._linearized,
            b,
            damping=damping,
            preconditioner=None if self._preconditioner is None else self._preconditioner.of(damping),
            rtol=rtol,
            progress_tol=self._progress_tol,
            max_iterations=self._max_iterations,
            callback=store,
        )
        return found, iterates

    def _in_one_program(self, b, damping, rtol):
        """The same, by a program that computes all of it."""
        preconditioner, most, known, record = self._preconditioner, self._max_iterations, None, None
        if preconditioner is not None:
            # As many products as the preconditioner holds before it is updated.
            most, record = min(most, len(preconditioner.values)), preconditioner.record
            known = preconditioner.pairs_of(damping)
        options = conjugate_gradient_loop.Options(
            self._max_iterations, self._progress_tol, most, _stored(self._max_iterations), record is not None
        )
        run = self._operator.compute_with_product
        return conjugate_gradient_loop.solve(run, b, damping, rtol, options, known, record)


# Takes the place of a linearized operator where one program computes all of conjugate gradients.
_ONE_PROGRAM = object()


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
