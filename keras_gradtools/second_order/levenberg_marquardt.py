"""The Levenberg-Marquardt method."""

from typing import Any, Literal

import keras

from keras_gradtools import validation
from keras_gradtools.annotations import Schedule
from keras_gradtools.curvature.operators.gauss_newton import GaussNewton
from keras_gradtools.second_order.geodesic_acceleration import GeodesicAcceleration
from keras_gradtools.second_order.newton_equation import SCALINGS
from keras_gradtools.second_order.second_order_optimizer import SecondOrderOptimizer
from keras_gradtools.second_order.step_solvers import ConjugateGradientsSolver, DenseSolver

# For models whose equation is too large to be formed. `kg.optimizers.NewtonCG` lets the user choose these.
_MAX_ITERATIONS = 250


@keras.saving.register_keras_serializable(package="keras_gradtools")
class LevenbergMarquardt(SecondOrderOptimizer):
    r"""The Levenberg-Marquardt method, $\theta \leftarrow \theta - (G + \lambda D)^{-1} g$.

    $G$ is the Gauss-Newton matrix of the batch, and $g$ the gradient. For the mean squared error, $G$ is
    $\frac{2}{N} J^\top J$ with the Jacobian $J$ of the $N$ residuals. $D$ is the identity, or the diagonal of $G$ with
    `scaling="diagonal"`. Elements of $D$ are then at least 1e-6 times the largest entry of $G$. $G$ contains no second
    derivatives of the model and is positive semi-definite for convex losses. This is the method of choice for fitting
    small models, such as regressions and physics-informed networks. Use it with `kg.models.SecondOrder`, which
    describes how $\lambda$ is updated.

    If the examples do not depend on one another, the equation is formed in double precision from the Jacobians of the
    examples. With fewer outputs than weights, $G = A^\top A$ has the root $A = L^\top J / \sqrt{N}$, where $L L^\top$
    is the Hessian of the loss with respect to the outputs. The same step then comes from the smaller matrix
    $A D^{-1} A^\top + \lambda I$. So a batch may have fewer outputs than the model has weights. The equation is always
    solved in double precision. A model with more than 4,096 weights, whose Jacobians are too large for this, is solved
    by at most 250 conjugate gradient iterations.

    Args:
        damping, max_attempts, learning_rate, name: As for `kg.optimizers.Newton`.
        scaling: `"identity"` (Levenberg), or `"diagonal"` (Marquardt), which makes the step independent of the units
            of the weights.
        geodesic_acceleration: Whether each step follows a parabola instead of a line: the second derivative of the
            model along the step corrects it. This saves steps in narrow curved valleys.

    Raises:
        ValueError: If an option is invalid. In `fit`, if the model is not a `SecondOrder`, or if `scaling="diagonal"`
            or `geodesic_acceleration=True` meet a model that needs conjugate gradients.

    Cost:
        For n weights and N outputs, with m the smaller of both: N gradients of one example each, $N n m$
        multiplications, $m^3 / 3$ more for each damping that is tried, and memory for $2 N n$ numbers. If the Jacobians
        are not available or too large, n products with the matrix. Geodesic acceleration adds about three gradients for
        each damping.

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
    "An algorithm for least-squares estimation of nonlinear parameters" (1963); Transtrum & Sethna, "Improvements to the
    Levenberg-Marquardt algorithm for nonlinear least-squares minimization" (2012), for the acceleration.
    """

    def __init__(
        self,
        damping: float = 1e-3,
        scaling: Literal["identity", "diagonal"] = "identity",
        max_attempts: int = 10,
        learning_rate: Schedule = 1.0,
        geodesic_acceleration: bool = False,
        name: str = "levenberg_marquardt",
    ) -> None:
        super().__init__(damping, max_attempts, learning_rate, name)
        owner = type(self).__name__
        self.scaling = validation.require_choice(owner, "scaling", scaling, SCALINGS)
        self.geodesic_acceleration = validation.require_flag(owner, "geodesic_acceleration", geodesic_acceleration)

    def operator_class(self) -> type:
        return GaussNewton

    def solver(self, operator: Any, equations: Any) -> Any:
        if not equations.are_affordable(operator.count_examples()):
            self._require_no_equation(operator)
            return ConjugateGradientsSolver(operator, _MAX_ITERATIONS)
        acceleration = GeodesicAcceleration(operator) if self.geodesic_acceleration else None
        return DenseSolver(lambda: equations.of(operator, self.scaling), operator.dtype, acceleration)

    def _require_no_equation(self, operator):
        chosen = [f"scaling={self.scaling!r}"] if self.scaling != "identity" else []
        chosen += ["geodesic_acceleration=True"] if self.geodesic_acceleration else []
        if chosen:
            raise ValueError(
                f"{type(self).__name__} solves a model of this size by conjugate gradients, which take "
                f"`scaling='identity'` and no acceleration. Received: {' and '.join(chosen)}, {operator.shape[0]} "
                f"weights and a batch of {operator.count_examples()} examples. Take a smaller batch, so that the "
                "Jacobian of its outputs fits into memory, or the defaults of these options."
            )

    def get_config(self) -> dict[str, Any]:
        options = {"scaling": self.scaling, "geodesic_acceleration": self.geodesic_acceleration}
        return {**super().get_config(), **options}
