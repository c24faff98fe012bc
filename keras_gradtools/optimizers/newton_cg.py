"""Newton's method by conjugate gradients."""

import math

import keras
from keras import ops

from keras_gradtools import validation
from keras_gradtools.curvature.newton_step import CURVATURES, ConjugateGradientsSolver
from keras_gradtools.curvature.recycled_preconditioner import checked_rank, recycled_preconditioner
from keras_gradtools.optimizers.second_order_optimizer import SecondOrderOptimizer

# Variables that hold the preconditioner.
_PAIRS = 3


@keras.saving.register_keras_serializable(package="keras_gradtools")
class NewtonCG(SecondOrderOptimizer):
    r"""Newton's method without a matrix, $\theta \leftarrow \theta + p$ with $(B + \lambda I) \, p = -g$.

    The equation is solved by conjugate gradients.

    $B$ is the Hessian or the Gauss-Newton matrix of the batch, known by its products alone, so that the number of
    weights does not matter. Conjugate gradients stop at a residual of $\min(\frac12, \sqrt{\lVert g \rVert})$ of the
    gradient, which makes the method converge faster than linearly, after `max_iterations`, and where they meet negative
    curvature. Where the step that they come to does not go down, the earlier iterates are tried before the equation is
    solved anew with more damping. For `kg.models.SecondOrder`, which see for how $\lambda$ changes.

    What conjugate gradients learn of $B$ in one step, its eigenvectors of largest eigenvalues above all, preconditions
    them in the next ones. It helps where some eigenvalues are far larger than the others, near a minimum and with large
    batches: on the digits of `python -m benchmarks.second_order` it takes 0.2 to 0.6 times the products.

    Args:
        damping: the first $\lambda$, 0 or more. `optimizer.damping` is that of the next step, and is saved.
        curvature: `"hessian"`, or `"gauss_newton"`, which has no negative curvature for convex losses and is the safer
            choice far from a minimum.
        max_iterations: products for each damping that is tried.
        rtol: the residual of the equation over the gradient; None for the rule above.
        progress_tol: conjugate gradients also stop when ten iterations gain less than this share of what they gained
            in all, for each of them; Martens takes 5e-4. None leaves it out.
        preconditioner_rank: how many eigenvectors the preconditioner has; 0 for no preconditioner; None for 100, or as
            many as are 2**20 numbers: 10 for 100,000 weights, and none from some 130,000 on. They are saved with the
            model, 4 MiB at most by default.
        max_attempts: how many dampings a step tries before it leaves the weights as they are.
        learning_rate: what multiplies each step, above 0 and at most 1, or a `LearningRateSchedule`.
        name: as of any optimizer.

    Raises:
        ValueError: for options that do not fit; in `fit` of a model that is not a `SecondOrder`.

    Cost:
        In each step a gradient, an evaluation of the loss and up to `max_iterations` products, some 2.5 gradients each,
        the last two again for each further damping; some twenty vectors of memory, and up to eight times
        `preconditioner_rank`.

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
    optimization" (2010), section 4, also for going back along the iterates; the preconditioner is the spectral one of
    Gratton, Sartenaer & Tshimanga, "On a class of limited memory preconditioners for large scale linear systems with
    multiple right-hand sides" (2011).
    """

    forms_matrix = False

    def __init__(
        self,
        damping=1e-3,
        curvature="hessian",
        max_iterations=250,
        rtol=None,
        progress_tol=None,
        preconditioner_rank=None,
        max_attempts=10,
        learning_rate=1.0,
        name="newton_cg",
    ):
        super().__init__(damping, max_attempts, learning_rate, name)
        self._check_choice("curvature", curvature, tuple(CURVATURES))
        self._check_count("max_iterations", max_iterations)
        for option, value in (("rtol", rtol), ("progress_tol", progress_tol)):
            if value is not None and not (validation.is_number(value) and 0 < value < 1):
                raise ValueError(
                    f"{type(self).__name__} expects a number between 0 and 1, or None, as `{option}`. Received: "
                    f"{option}={validation.shown(value)}."
                )
        self.curvature, self.max_iterations = curvature, int(max_iterations)
        self.rtol, self.progress_tol = rtol, progress_tol
        self.preconditioner_rank = checked_rank(type(self).__name__, preconditioner_rank)
        self._preconditioner = None

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        size = sum(math.prod(v.shape) for v in variables)
        dtype = "float64" if any(v.dtype == "float64" for v in variables) else "float32"
        self._preconditioner = recycled_preconditioner(size, self.preconditioner_rank, dtype)
        if self._preconditioner is not None:
            options = {"dtype": self._preconditioner.vectors.dtype.name, "aggregation": "only_first_replica"}
            self._vectors = self.add_variable(self._preconditioner.vectors.shape, name="eigenvectors", **options)
            self._values = self.add_variable(self._preconditioner.values.shape, name="eigenvalues", **options)
            self._state = self.add_variable((3,), name="preconditioner_state", **options)

    def operator_class(self):
        return CURVATURES[self.curvature]

    def solver(self, operator, equations):
        preconditioner = self._preconditioner_of(operator)
        if preconditioner is not None:
            # They may have been loaded.
            preconditioner.vectors, values, (missed, *waits) = (
                ops.convert_to_numpy(ops.convert_to_tensor(v)) for v in (self._vectors, self._values, self._state)
            )
            preconditioner.values, preconditioner.missed = values.astype("float64"), float(missed)
            preconditioner.wait, preconditioner.waited = map(int, waits)
        return ConjugateGradientsSolver(operator, self.max_iterations, self.rtol, self.progress_tol, preconditioner)

    def end_step(self, operator, damping):
        super().end_step(operator, damping)
        preconditioner = self._preconditioner_of(operator)
        if preconditioner is not None:
            self._vectors.assign(preconditioner.vectors)
            self._values.assign(preconditioner.values)
            self._state.assign([preconditioner.missed, preconditioner.wait, preconditioner.waited])

    def _preconditioner_of(self, operator):
        # Variables may have been frozen after it was built.
        preconditioner = self._preconditioner
        is_for_it = preconditioner is not None and preconditioner.vectors.shape[1] == operator.shape[0]
        return preconditioner if is_for_it else None

    def load_own_variables(self, store):
        """As Keras does it; but a preconditioner of another rank, or for other variables, is left out."""
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

    def get_config(self):
        options = {
            "curvature": self.curvature,
            "max_iterations": self.max_iterations,
            "rtol": self.rtol,
            "progress_tol": self.progress_tol,
            "preconditioner_rank": self.preconditioner_rank,
        }
        return {**super().get_config(), **options}
