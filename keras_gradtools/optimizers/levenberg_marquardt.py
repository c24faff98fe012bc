"""The method of Levenberg and Marquardt."""

import keras

from keras_gradtools import validation
from keras_gradtools.curvature.gauss_newton import GaussNewton
from keras_gradtools.curvature.newton_step import DenseSolver
from keras_gradtools.optimizers.second_order_optimizer import SecondOrderOptimizer

SCALINGS = ("identity", "diagonal")


@keras.saving.register_keras_serializable(package="keras_gradtools")
class LevenbergMarquardt(SecondOrderOptimizer):
    r"""The method of Levenberg and Marquardt, $\theta \leftarrow \theta - (G + \lambda D)^{-1} g$.

    $G$ is the Gauss-Newton matrix of the batch, for squared errors $\frac{2}{N} J^\top J$ with the Jacobian $J$ of the
    residuals, and $D$ the identity, or with `scaling="diagonal"` the diagonal of $G$. It goes by products of first
    derivatives alone, is never indefinite for convex losses, and is the method of choice for fits of small models:
    regression, physics-informed networks. For `kg.models.SecondOrder`, which see for how $\lambda$ changes.

    The matrix of a model whose examples do not depend on each other is summed up in double precision, from the
    Jacobians of the examples, and the equation is solved in double precision.

    Args:
        damping: the first $\lambda$, 0 or more. `optimizer.damping` is that of the next step, and is saved.
        scaling: `"identity"` (Levenberg), or `"diagonal"` (Marquardt), which does not depend on the units of the
            weights.
        max_attempts: how many dampings a step tries before it leaves the weights as they are.
        allow_underdetermined: whether to take batches with fewer outputs than the model has weights, which leave
            directions that damping alone decides on. They are an error otherwise.
        learning_rate: what multiplies each step, above 0 and at most 1, or a `LearningRateSchedule`.
        name: as of any optimizer.

    Raises:
        ValueError: for options that do not fit; in `fit` of a model that is not a `SecondOrder`.

    Cost:
        For n weights and N outputs: N gradients of one example each, $N n^2$ multiplications, $n^3 / 3$ more for each
        damping that is tried, and the memory of $2 N n$ numbers; where that is not possible or too much, n products
        with the matrix.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(5, "tanh"), keras.layers.Dense(1)])
    >>> trainer = kg.models.SecondOrder(model)
    >>> trainer.compile(kg.optimizers.LevenbergMarquardt(), "mse")
    >>> x = np.linspace(-1, 1, 100, dtype="float32")[:, None]
    >>> history = trainer.fit(x, x**2, batch_size=100, epochs=50, verbose=0)
    >>> history.history["loss"][-1] < 1e-5
    True

    Source: Levenberg, "A method for the solution of certain non-linear problems in least squares" (1944); Marquardt,
    "An algorithm for least-squares estimation of nonlinear parameters" (1963).
    """

    def __init__(
        self,
        damping=1e-3,
        scaling="identity",
        max_attempts=10,
        allow_underdetermined=False,
        learning_rate=1.0,
        name="levenberg_marquardt",
    ):
        validation.require_flag(type(self).__name__, "allow_underdetermined", allow_underdetermined)
        super().__init__(damping, max_attempts, learning_rate, name)
        self._check_choice("scaling", scaling, SCALINGS)
        self.scaling, self.allow_underdetermined = scaling, allow_underdetermined

    def operator_class(self):
        return GaussNewton

    def solver(self, operator, equations):
        return DenseSolver(lambda: equations.of(operator), operator.dtype, self.scaling)

    def get_config(self):
        options = {"scaling": self.scaling, "allow_underdetermined": self.allow_underdetermined}
        return {**super().get_config(), **options}
