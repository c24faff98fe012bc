"""Newton's method with the full Hessian."""

from typing import Any

import keras
import numpy as np

from keras_gradtools.annotations import Schedule
from keras_gradtools.curvature.operators import dense_memory
from keras_gradtools.curvature.operators.hessian import Hessian
from keras_gradtools.second_order.second_order_optimizer import MatrixOptimizer
from keras_gradtools.second_order.step_solvers import DenseSolver


@keras.saving.register_keras_serializable(package="keras_gradtools")
class Newton(MatrixOptimizer):
    r"""Newton's method, $\theta \leftarrow \theta - (H + \lambda I)^{-1} g$, by factorizing the Hessian.

    $H$ and $g$ are the Hessian and the gradient of the loss of the batch. Use it with `kg.models.SecondOrder`, for
    models of at most a few thousand weights. $\lambda$ grows while the matrix is not positive definite or the loss goes
    up, and shrinks after steps that the quadratic model predicted well. See `kg.models.SecondOrder` for the update.

    Args:
        damping: The initial $\lambda$, 0 or more. `optimizer.damping` holds the $\lambda$ of the next step and is
            saved with the model.
        max_attempts: Maximum number of dampings that a step tries. If none of them lowers the loss, the weights do not
            change.
        allow_underdetermined: Whether to accept batches that have fewer outputs than the model has weights. In such a
            batch, damping alone determines the step in some directions. By default such a batch raises an error.
        learning_rate: Factor of each step, above 0 and at most 1, or a `LearningRateSchedule`.
        name: Name of the optimizer.

    Raises:
        ValueError: If an option is invalid. In `fit`, if the model is not a `SecondOrder`.
        MemoryError: In `fit`, if the matrix would take more than half of the machine's memory.

    Cost:
        For n weights: n products with the Hessian, about 2.5 gradients each, $n^3 / 3$ multiplications for each damping
        that is tried, and memory for three matrices.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    >>> trainer = kg.models.SecondOrder(model)
    >>> trainer.compile(kg.optimizers.Newton(damping=0.0), "mse")
    >>> x = np.linspace(0, 1, 10, dtype="float32")[:, None]
    >>> history = trainer.fit(x, 3 * x - 1, epochs=1, verbose=0)  # linear: one step is all that it takes
    >>> [round(w.item(), 3) for w in model.get_weights()]
    [3.0, -1.0]

    Source: Nocedal & Wright, "Numerical Optimization" (2006), chapter 3.4.
    """

    def __init__(
        self,
        damping: float = 1e-3,
        max_attempts: int = 10,
        allow_underdetermined: bool = False,
        learning_rate: Schedule = 1.0,
        name: str = "newton",
    ) -> None:
        super().__init__(damping, max_attempts, allow_underdetermined, learning_rate, name)

    def operator_class(self) -> type:
        return Hessian

    def solver(self, operator: Any, equations: Any) -> Any:
        advice = "Use keras_gradtools.optimizers.NewtonCG, which forms no matrix."
        dense_memory.require_room(type(self).__name__, operator.shape[0], np.dtype("float64"), advice)
        return DenseSolver(lambda: equations.of(operator), operator.dtype)
