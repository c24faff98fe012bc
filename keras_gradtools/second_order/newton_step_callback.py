"""A callback that takes Newton steps while `fit` trains with another optimizer."""

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from keras_gradtools import validation
from keras_gradtools.annotations import Data, Loss, Variables
from keras_gradtools.curvature.data.batches import refuse_non_finite
from keras_gradtools.curvature.operators import dense_memory
from keras_gradtools.second_order.newton_step import StepReason, newton_step
from keras_gradtools.second_order.normal_equations import NormalEquations
from keras_gradtools.second_order.recycled_preconditioner import recycled_preconditioner, require_rank
from keras_gradtools.second_order.step_solvers import (
    CURVATURES,
    ConjugateGradientsSolver,
    DenseSolver,
    require_enough_outputs,
)
from keras_gradtools.training.loss_on_data import LossOnData
from keras_gradtools.training.monitor import Monitor

NAME = "NewtonStep"
SOLVERS = ("cg", "dense")


class NewtonStep(Monitor):
    r"""Takes a damped Newton step $p = -(B + \lambda I)^{-1} g$ on some weights at the end of an epoch.

    $B$ is the Hessian or the Gauss-Newton matrix. Use this callback to finish what a first-order optimizer leaves
    unfinished, such as the last layer of a classifier, or all weights at the end of training. The loss, the gradient
    $g$, the curvature $B$ and the loss after the step are all computed on the same data, in the same mode. The step is
    taken only if it lowers the loss. If it does not, the damping is multiplied by 2, 4, 8, ... and the equation is
    solved again, up to `max_attempts`. If no attempt lowers the loss, the weights do not change. After a step, the
    damping follows the ratio of the actual to the predicted decrease, see `kg.models.SecondOrder`. The state of the
    optimizer of `fit` does not change.

    It logs `newton_step_length`, `newton_damping` (of the next step), `newton_ratio` (NaN if no step was taken),
    `newton_decrease` of the loss, `newton_cg_iterations` and `newton_step_reason` (0 accepted, 1 rejected, 2 the
    gradient is zero up to rounding, 3 not finite). Callbacks after this one in the list can use them. `last_step` has
    all of these, and a message.

    Args:
        data: The data of the loss, as for `kg.curvature.Hessian`. Each evaluation and each product reads all of it.
        every: When to take a step: `"epoch"`, a string such as `"5 epochs"`, or an integer n for every n batches. See
            `kg.callbacks.Monitor`.
        variables: Trainable variables in a list, or a layer. Default: all trainable variables of the model.
        solver: `"cg"`, conjugate gradients with products only, or `"dense"`, which forms and factorizes the matrix.
        curvature: `"hessian"`, or `"gauss_newton"`, which has no negative curvature for convex losses.
        damping: The initial $\lambda$, 0 or more. The attribute `damping` holds the $\lambda$ of the next step.
        loss: A loss as `compile` takes it. Default: the compiled loss. It includes regularizers, but not the terms that
            a wrapper of `kg.models` adds, such as a penalty.
        training: Whether the model is called in training mode. If so, dropout uses one mask throughout a step, and
            another in the next step.
        max_iterations: Maximum number of conjugate gradient iterations for each damping.
        rtol: Conjugate gradients stop when the norm of the residual is at most `rtol` times that of the gradient. None
            means the smaller of 1/2 and the square root of the norm of the gradient.
        preconditioner_rank: Number of eigenvectors in the preconditioner that conjugate gradients build for the next
            steps, see `kg.optimizers.NewtonCG`.
        max_attempts: Maximum number of dampings that a step tries.
        allow_underdetermined: Whether `"dense"` with the Hessian accepts data with fewer outputs than there are
            weights. The Gauss-Newton matrix needs no such permission.
        batch_size: Number of examples per batch if `data` is arrays. Ignored for data that come in batches.
        verbose: 1 to print a line for each step, 0 for no output.
        progress_bar: Which of the numbers the progress bar shows. Default: `newton_decrease` and `newton_damping`. See
            `kg.callbacks.Monitor`.

    Raises:
        ValueError: If an option is invalid. When `fit` begins, if the model has no loss or returns different values for
            the same input, or if the data have NaN or infinity, are too few for `"dense"`, or differ from pass to pass.
            The weights do not change.
        MemoryError: When `fit` begins, if the matrix of `"dense"` would take more than half of the machine's memory.

    Cost:
        For each step, a gradient over the data, and for each damping an evaluation of the loss. `"cg"` also takes up to
        `max_iterations` products for each damping, about 2.5 gradients each. `"dense"` takes n products for n weights,
        and $n^3 / 3$ multiplications for each damping.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> x = np.linspace(0, 1, 10, dtype="float32")[:, None]
    >>> step = kg.callbacks.NewtonStep((x, 3 * x - 1), solver="dense", damping=0.0)
    >>> history = model.fit(x, 3 * x - 1, epochs=1, verbose=0, callbacks=[step])
    >>> [round(w.item(), 3) for w in model.get_weights()], step.last_step.message
    ([3.0, -1.0], 'the loss went down')

    Source: Nocedal & Wright, "Numerical Optimization" (2006), chapters 3 and 7; Martens, "Deep learning via
    Hessian-free optimization" (2010); TensorFlow's guide "Advanced automatic differentiation", "Newton's method".
    """

    KEY_NUMBERS: tuple[str, ...] = ("decrease", "damping")

    def __init__(
        self,
        data: Data,
        every: int | str = "epoch",
        *,
        variables: Variables = None,
        solver: Literal["cg", "dense"] = "cg",
        curvature: Literal["hessian", "gauss_newton"] = "hessian",
        damping: float = 1e-3,
        loss: Loss = None,
        training: bool = False,
        max_iterations: int = 250,
        rtol: float | None = None,
        preconditioner_rank: int | None = None,
        max_attempts: int = 10,
        allow_underdetermined: bool = False,
        batch_size: int = 256,
        verbose: bool | Literal[0, 1] = 0,
        progress_bar: bool | Sequence[str] | None = None,
    ) -> None:
        super().__init__(every, prefix="newton_", progress_bar=progress_bar)
        self._solver = validation.require_choice(NAME, "solver", solver, SOLVERS)
        self._curvature = validation.require_choice(NAME, "curvature", curvature, CURVATURES)
        self.damping = validation.require_number(NAME, "damping", damping, least=0)
        self._max_iterations = validation.require_count(NAME, "max_iterations", max_iterations)
        self._rtol = validation.require_number(NAME, "rtol", rtol, above=0, below=1, may_be_none=True)
        self._rank = require_rank(NAME, preconditioner_rank)
        self._max_attempts = validation.require_count(NAME, "max_attempts", max_attempts)
        self._allow_underdetermined = validation.require_flag(NAME, "allow_underdetermined", allow_underdetermined)
        if not isinstance(verbose, bool):
            validation.require_choice(NAME, "verbose", verbose, (0, 1))
        self._verbose = bool(verbose)
        self._loss_on_data = LossOnData(NAME, data, variables, loss, training, batch_size)
        self.last_step: Any = None
        self._operator: Any = None
        self._equations: Any = None
        self._preconditioner: Any = None

    def begin(self) -> None:
        self._has_warned = False
        self._operator = self._loss_on_data.operator(CURVATURES[self._curvature], self.model)
        refuse_non_finite(NAME, self._operator.batches())
        self._equations = NormalEquations(self._operator)
        if self._solver == "cg":
            self._preconditioner = recycled_preconditioner(self._operator.shape[0], self._rank, self._operator.dtype)
        # The Gauss-Newton equation is solved in the space of the outputs where these are fewer.
        is_determined = self._allow_underdetermined or self._curvature == "gauss_newton"
        if self._solver == "dense" and not is_determined:
            require_enough_outputs(NAME, self._operator, self._operator.count_examples())
        if self._solver == "dense" and not self._equations.fits(self._operator.count_examples()):
            advice = 'Use solver="cg", which forms no matrix, or fewer variables, such as those of one layer.'
            dense_memory.require_room(NAME, self._operator.shape[0], np.dtype("float64"), advice)
        self._operator.check("product")

    def end(self) -> None:
        # Compiled programs stay cached with the model.
        self._operator = self._equations = self._preconditioner = None

    def measure(self) -> dict[str, Any]:
        operator = self._operator
        operator.draw_anew()
        if self._solver == "cg":
            solver: Any = ConjugateGradientsSolver(
                operator, self._max_iterations, self._rtol, preconditioner=self._preconditioner
            )
        else:
            solver = DenseSolver(lambda: self._equations.of(operator), operator.dtype)
        found = newton_step(operator, solver, self.damping, max_attempts=self._max_attempts)
        if found.reason == StepReason.NOT_FINITE:
            refuse_non_finite(NAME, operator.batches())
            if not self._has_warned:
                self._has_warned = True
                warnings.warn(f"{NAME} took no step, since {found.message}. The weights did not change.", stacklevel=2)
        if found.step is not None:
            operator.move(found.step.astype(operator.dtype))
        self.damping, self.last_step = found.damping, found
        if self._verbose:
            print(f"{NAME}: {_line(found)}")
        return found.logs() | {"decrease": found.decrease}


def _line(found):
    """A step in one line."""
    if found.step is None:
        return f"no step, since {found.message}; loss {found.loss:.6g}, damping {found.damping:.3g}"
    return (
        f"{found.message}, from {found.loss:.6g} by {found.decrease:.3g}; step of length {found.step_length:.3g}, "
        f"ratio {found.ratio:.3g}, damping {found.damping:.3g}"
    )
