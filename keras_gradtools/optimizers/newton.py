"""Newton's method with the whole Hessian."""

import keras

from keras_gradtools import validation
from keras_gradtools.curvature.hessian import Hessian
from keras_gradtools.curvature.newton_step import DenseSolver
from keras_gradtools.optimizers.second_order_optimizer import SecondOrderOptimizer


@keras.saving.register_keras_serializable(package="keras_gradtools")
class Newton(SecondOrderOptimizer):
    r"""Newton's method, $\theta \leftarrow \theta - (H + \lambda I)^{-1} g$, with the Hessian of the batch, factorized.

    For `kg.models.SecondOrder`, and models of at most a few thousand weights. $\lambda$ grows as long as the matrix is
    not positive definite or the loss goes up, and shrinks after steps that went as the quadratic model said: see
    `kg.models.SecondOrder` for how.

    Args:
        damping: the first $\lambda$, 0 or more. `optimizer.damping` is that of the next step, and is saved.
        max_attempts: how many dampings a step tries before it leaves the weights as they are.
        allow_underdetermined: whether to take batches with fewer outputs than the model has weights, which leave
            directions that damping alone decides on. They are an error otherwise.
        learning_rate: what multiplies each step, above 0 and at most 1, or a `LearningRateSchedule`.
        name: as of any optimizer.

    Raises:
        ValueError: for options that do not fit; in `fit` of a model that is not a `SecondOrder`.

    Cost:
        For n weights: n products with the Hessian, some 2.5 gradients each, $n^3 / 3$ multiplications for each damping
        that is tried, and three matrices of memory.

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

    def __init__(self, damping=1e-3, max_attempts=10, allow_underdetermined=False, learning_rate=1.0, name="newton"):
        validation.require_flag(type(self).__name__, "allow_underdetermined", allow_underdetermined)
        super().__init__(damping, max_attempts, learning_rate, name)
        self.allow_underdetermined = allow_underdetermined

    def operator_class(self):
        return Hessian

    def solver(self, operator, equations):
        return DenseSolver(lambda: equations.of(operator), operator.dtype)

    def get_config(self):
        return {**super().get_config(), "allow_underdetermined": self.allow_underdetermined}
