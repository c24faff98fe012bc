"""Newton's method by conjugate gradients."""

import keras

from keras_gradtools import validation
from keras_gradtools.curvature.newton_step import CURVATURES, ConjugateGradientsSolver
from keras_gradtools.optimizers.second_order_optimizer import SecondOrderOptimizer


@keras.saving.register_keras_serializable(package="keras_gradtools")
class NewtonCG(SecondOrderOptimizer):
    r"""Newton's method without a matrix, $\theta \leftarrow \theta + p$ with $(B + \lambda I) \, p = -g$.

    The equation is solved by conjugate gradients.

    $B$ is the Hessian or the Gauss-Newton matrix of the batch, known by its products alone, so that the number of
    weights does not matter. Conjugate gradients stop at a residual of $\min(\frac12, \sqrt{\lVert g \rVert})$ of the
    gradient, which makes the method converge faster than linearly, after `max_iterations`, and where they meet negative
    curvature. Where the step that they come to does not go down, the earlier iterates are tried before the equation is
    solved anew with more damping. For `kg.models.SecondOrder`, which see for how $\lambda$ changes.

    Args:
        damping: the first $\lambda$, 0 or more. `optimizer.damping` is that of the next step, and is saved.
        curvature: `"hessian"`, or `"gauss_newton"`, which has no negative curvature for convex losses and is the safer
            choice far from a minimum.
        max_iterations: products for each damping that is tried.
        rtol: the residual of the equation over the gradient; None for the rule above.
        progress_tol: conjugate gradients also stop when ten iterations gain less than this share of what they gained
            in all, for each of them; Martens takes 5e-4. None leaves it out.
        max_attempts: how many dampings a step tries before it leaves the weights as they are.
        learning_rate: what multiplies each step, above 0 and at most 1, or a `LearningRateSchedule`.
        name: as of any optimizer.

    Raises:
        ValueError: for options that do not fit; in `fit` of a model that is not a `SecondOrder`.

    Cost:
        In each step a gradient, an evaluation of the loss and up to `max_iterations` products, some 2.5 gradients each,
        the last two again for each further damping; some twenty vectors of memory.

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
    optimization" (2010), section 4, also for going back along the iterates.
    """

    forms_matrix = False

    def __init__(
        self,
        damping=1e-3,
        curvature="hessian",
        max_iterations=250,
        rtol=None,
        progress_tol=None,
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
                    f"{option}={value!r}."
                )
        self.curvature, self.max_iterations = curvature, max_iterations
        self.rtol, self.progress_tol = rtol, progress_tol

    def operator_class(self):
        return CURVATURES[self.curvature]

    def solver(self, operator, equations):
        return ConjugateGradientsSolver(operator, self.max_iterations, self.rtol, self.progress_tol)

    def get_config(self):
        options = {
            "curvature": self.curvature,
            "max_iterations": self.max_iterations,
            "rtol": self.rtol,
            "progress_tol": self.progress_tol,
        }
        return {**super().get_config(), **options}
