"""Newton's method with conjugate gradients."""

import math
from typing import Any, Literal

import keras
from keras import ops

from keras_gradtools import validation
from keras_gradtools.annotations import Schedule
from keras_gradtools.second_order.recycled_preconditioner import recycled_preconditioner, require_rank
from keras_gradtools.second_order.second_order_optimizer import SecondOrderOptimizer, identities
from keras_gradtools.second_order.step_solvers import CURVATURES, ConjugateGradientsSolver

# Number of Keras variables that hold the preconditioner.
_PAIRS = 3


@keras.saving.register_keras_serializable(package="keras_gradtools")
class NewtonCG(SecondOrderOptimizer):
    r"""Matrix-free Newton's method, $\theta \leftarrow \theta + p$ with $(B + \lambda I) \, p = -g$.

    The equation is solved by conjugate gradients.

    $B$ is the Hessian or the Gauss-Newton matrix of the batch, and $g$ the gradient. $B$ is never formed, only
    multiplied by vectors, so models can have any number of weights. Conjugate gradients stop when the residual falls
    below $\min(\frac12, \sqrt{\lVert g \rVert})$ times $\lVert g \rVert$, which gives superlinear convergence. They
    also stop after `max_iterations`, and when they meet negative curvature. If the resulting step does not lower the
    loss, earlier iterates are tried before the equation is solved again with more damping. Use it with
    `kg.models.SecondOrder`, which describes how $\lambda$ is updated.

    The products of one step also give approximate eigenvectors of $B$ for its largest eigenvalues. They precondition
    conjugate gradients in the next steps. This helps if some eigenvalues are far larger than the others, near a
    minimum, and with large batches. In the digits benchmark of `python -m benchmarks.second_order`, a run with the
    preconditioner needs 0.2 to 0.6 times as many products as one without.

    Args:
        damping, max_attempts, learning_rate, name: As for `kg.optimizers.Newton`.
        curvature: $B$, `"hessian"` or `"gauss_newton"`. The latter has no negative curvature for convex losses and is
            the safer choice far from a minimum.
        max_iterations: Maximum number of products for each damping that is tried.
        rtol: Relative tolerance: the norm of the residual over that of the gradient. None for the rule above.
        progress_tol: Stops conjugate gradients also if the last $k = \max(10, 0.1 i)$ of $i$ iterations contribute less
            than `k * progress_tol` of the total decrease of the quadratic model. Martens uses 5e-4. None disables this
            test.
        preconditioner_rank: Number of eigenvectors in the preconditioner, 0 for no preconditioner. None, the default,
            means 100, or fewer if the eigenvectors would have more than 2**20 numbers in all: 10 for 100,000 weights,
            and no preconditioner above 131,072 weights. The eigenvectors are saved with the model, by default at most
            4 MiB in float32. After layers are frozen or unfrozen, a new preconditioner begins, for the weights that
            are trained then. It is not saved.

    Raises:
        ValueError: If an option is invalid. In `fit`, if the model is not a `SecondOrder`.

    Cost:
        For each step, a gradient, an evaluation of the loss and up to `max_iterations` products of about 2.5 gradients
        each. Every further damping costs the evaluation and the products again. Memory for about twenty vectors, and
        for up to eight times `preconditioner_rank` more.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> trainer = kg.models.SecondOrder(model)
    >>> trainer.compile(kg.optimizers.NewtonCG(damping=0.0, rtol=1e-6), "mse")
    >>> x = np.random.default_rng(0).normal(size=(100, 2)).astype("float32")
    >>> history = trainer.fit(x, x @ [[2.0], [-1.0]], batch_size=100, epochs=1, verbose=0)
    >>> model.get_weights()[0].round(3).ravel().tolist()
    [2.0, -1.0]

    Source: Nocedal & Wright, "Numerical Optimization" (2006), algorithm 7.1; Martens, "Deep learning via Hessian-free
    optimization" (2010), section 4, also for trying earlier iterates; the preconditioner is the spectral one of
    Gratton, Sartenaer & Tshimanga, "On a class of limited memory preconditioners for large scale linear systems with
    multiple right-hand sides" (2011).
    """

    def __init__(
        self,
        damping: float = 1e-3,
        curvature: Literal["hessian", "gauss_newton"] = "hessian",
        max_iterations: int = 250,
        rtol: float | None = None,
        progress_tol: float | None = None,
        preconditioner_rank: int | None = None,
        max_attempts: int = 10,
        learning_rate: Schedule = 1.0,
        name: str = "newton_cg",
    ) -> None:
        super().__init__(damping, max_attempts, learning_rate, name)
        owner, fraction = type(self).__name__, {"above": 0, "below": 1, "may_be_none": True}
        self.curvature = validation.require_choice(owner, "curvature", curvature, CURVATURES)
        self.max_iterations = validation.require_count(owner, "max_iterations", max_iterations)
        self.rtol = validation.require_number(owner, "rtol", rtol, **fraction)
        self.progress_tol = validation.require_number(owner, "progress_tol", progress_tol, **fraction)
        self.preconditioner_rank = require_rank(owner, preconditioner_rank)
        self._preconditioner: Any = None
        self._built_for: Any = ()
        # After layers were frozen or unfrozen: the weights that are trained since, and their preconditioner.
        self._others: Any = (), None

    def build(self, variables: Any) -> None:
        if self.built:
            return
        super().build(variables)
        size = sum(math.prod(v.shape) for v in variables)
        dtype = "float64" if any(v.dtype == "float64" for v in variables) else "float32"
        self._built_for = identities(variables)
        self._preconditioner = recycled_preconditioner(size, self.preconditioner_rank, dtype)
        if self._preconditioner is not None:
            options = {"dtype": self._preconditioner.vectors.dtype.name, "aggregation": "only_first_replica"}
            self._vectors = self.add_variable(self._preconditioner.vectors.shape, name="eigenvectors", **options)
            self._values = self.add_variable(self._preconditioner.values.shape, name="eigenvalues", **options)
            self._state = self.add_variable((3,), name="preconditioner_state", **options)

    def operator_class(self) -> type:
        return CURVATURES[self.curvature]

    def solver(self, operator: Any, equations: Any) -> Any:
        preconditioner = self._preconditioner_of(operator)
        if self._is_saved(preconditioner):
            # Loading a saved model may have changed the variables since the last step. The vectors stay on the device.
            vectors = ops.convert_to_tensor(self._vectors)
            preconditioner.restore(vectors, *map(ops.convert_to_numpy, (self._values, self._state)))
        return ConjugateGradientsSolver(operator, self.max_iterations, self.rtol, self.progress_tol, preconditioner)

    def end_step(self, operator: Any, damping: float) -> None:
        super().end_step(operator, damping)
        preconditioner = self._preconditioner_of(operator)
        if self._is_saved(preconditioner):
            if preconditioner.has_new_pairs:
                self._vectors.assign(preconditioner.vectors)
                self._values.assign(preconditioner.values)
            self._state.assign(preconditioner.state)

    def variables_to_restore(self) -> list[Any]:
        is_new = self._preconditioner is not None and self._preconditioner.has_new_pairs
        # Holding the vectors may copy them.
        return [v for v in self.variables if is_new or v is not getattr(self, "_vectors", None)]

    def _is_saved(self, preconditioner):
        """Whether the preconditioner is the one of the variables."""
        return preconditioner is not None and preconditioner is self._preconditioner

    def _preconditioner_of(self, operator):
        weights = identities(operator.variables)
        if weights == self._built_for:
            return self._preconditioner
        if weights != self._others[0]:
            size, rank = operator.shape[0], self.preconditioner_rank
            self._others = weights, recycled_preconditioner(size, rank, operator.dtype)
        return self._others[1]

    def load_own_variables(self, store: Any) -> None:
        """Loads as Keras does, but skips a saved preconditioner of another rank or for other variables."""
        pairs = [] if self._preconditioner is None else [self._vectors, self._values, self._state]
        others = self.variables[: len(self.variables) - len(pairs)]
        saved = [store[str(i)] for i in range(len(store.keys()))]
        shapes = [tuple(v.shape) for v in saved[len(others) :]]
        if len(shapes) not in (0, _PAIRS) or shapes == [tuple(v.shape) for v in pairs]:
            super().load_own_variables(store)
            return
        for variable, value in zip(others, saved, strict=False):
            variable.assign(value)
        for variable in pairs:
            variable.assign(ops.zeros(variable.shape, dtype=variable.dtype))

    def get_config(self) -> dict[str, Any]:
        options = {
            "curvature": self.curvature,
            "max_iterations": self.max_iterations,
            "rtol": self.rtol,
            "progress_tol": self.progress_tol,
            "preconditioner_rank": self.preconditioner_rank,
        }
        return {**super().get_config(), **options}
