"""The Levenberg-Marquardt method."""

from typing import Any, Literal

import keras

from keras_gradtools import validation
from keras_gradtools.annotations import Schedule
from keras_gradtools.curvature.operators.gauss_newton import GaussNewton
from keras_gradtools.second_order.second_order_optimizer import MatrixOptimizer
from keras_gradtools.second_order.step_solvers import DenseSolver

SCALINGS = ("identity", "diagonal")


@keras.saving.register_keras_serializable(package="keras_gradtools")
class LevenbergMarquardt(MatrixOptimizer):
    r"""The Levenberg-Marquardt method, $\theta \leftarrow \theta - (G + \lambda D)^{-1} g$.

    $G$ is the Gauss-Newton matrix of the batch, and $g$ the gradient. For the mean squared error, $G$ is
    $\frac{2}{N} J^\top J$ with the Jacobian $J$ of the $N$ residuals. $D$ is the identity, or the diagonal of $G$ with
    `scaling="diagonal"`. Elements of $D$ are then at least 1e-6 times the largest entry of $G$. $G$ contains no second
    derivatives of the model and is positive semi-definite for convex losses. This is the method of choice for fitting
    small models, such as regressions and physics-informed networks. Use it with `kg.models.SecondOrder`, which
    describes how $\lambda$ is updated.

    If the examples do not depend on one another, $G$ is summed in double precision from the Jacobians of the examples.
    The equation is always solved in double precision.

    Args:
        damping, max_attempts, allow_underdetermined, learning_rate, name: As for `kg.optimizers.Newton`.
        scaling: `"identity"` (Levenberg), or `"diagonal"` (Marquardt), which makes the step independent of the units
            of the weights.

    Raises:
        ValueError: If an option is invalid. In `fit`, if the model is not a `SecondOrder`.

    Cost:
        For n weights and N outputs: N gradients of one example each, $N n^2$ multiplications, $n^3 / 3$ more for each
        damping that is tried, and memory for $2 N n$ numbers. If the Jacobians are not available or too large, n
        products with the matrix.

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
        damping: float = 1e-3,
        scaling: Literal["identity", "diagonal"] = "identity",
        max_attempts: int = 10,
        allow_underdetermined: bool = False,
        learning_rate: Schedule = 1.0,
        name: str = "levenberg_marquardt",
    ) -> None:
        super().__init__(damping, max_attempts, allow_underdetermined, learning_rate, name)
        self.scaling = validation.require_choice(type(self).__name__, "scaling", scaling, SCALINGS)

    def operator_class(self) -> type:
        return GaussNewton

    def solver(self, operator: Any, equations: Any) -> Any:
        return DenseSolver(lambda: equations.of(operator), operator.dtype, self.scaling)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "scaling": self.scaling}
