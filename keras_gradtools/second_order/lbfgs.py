"""The limited-memory BFGS method."""

import functools
import math
from typing import Any

import keras

from keras_gradtools import validation
from keras_gradtools.annotations import Schedule
from keras_gradtools.second_order.quasi_newton import QuasiNewton, state_dtype
from keras_gradtools.second_order.stored_pairs import Pairs, StoredPairs


@keras.saving.register_keras_serializable(package="keras_gradtools")
class LBFGS(QuasiNewton):
    r"""The limited-memory BFGS method, $\theta \leftarrow \theta - t \, H_k \, g$, with a strong Wolfe line search.

    $g$ is the gradient of the batch. $H_k$ approximates the inverse of the Hessian. It is $\gamma I$
    after the BFGS updates with the last `memory` steps $s_i$ and changes of the gradient $y_i$, where
    $\gamma = s^\top y / y^\top y$ for the last pair. No matrix is formed, and only gradients are computed, so it works
    for models of any size whose loss is smooth. Use it with `kg.models.SecondOrder`.

    Train on all of the data in each batch, or on large batches. Each $y_i$ is the change of the gradient of one batch,
    at the weights before and after its step, so noise of the batches does not enter it. The curvature of one batch is
    then used in the step of the next one, which has to be similar.

    Args:
        memory: Number of pairs that are stored.
        max_evaluations: Maximum number of evaluations of the loss and its gradient in the line search of one step. If
            no step with a sufficient decrease is found, the weights do not change and the pairs are forgotten.
        learning_rate: Factor of the first step that the line search tries, above 0 and at most 1, or a
            `LearningRateSchedule`.
        name: Name of the optimizer.

    Raises:
        ValueError: If an option is invalid. In `fit`, if the model is not a `SecondOrder`, or if layers were frozen or
            unfrozen after the first step.

    Cost:
        For each step, one or two evaluations of the loss and its gradient in the line search, and one before it unless
        the last step had the same batch in the same order (`shuffle=False`) without random numbers. `6 * memory * n`
        multiplications for n weights, in which each stored vector is read two or three times. It stores
        `2 * (memory + 1)` vectors, and a step needs memory for a few more.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> trainer = kg.models.SecondOrder(model)
    >>> trainer.compile(kg.optimizers.LBFGS(), "mse")
    >>> x = np.random.default_rng(0).normal(size=(100, 2)).astype("float32")
    >>> history = trainer.fit(x, x @ [[2.0], [-1.0]], batch_size=100, epochs=15, verbose=0)
    >>> model.get_weights()[0].round(3).ravel().tolist()
    [2.0, -1.0]

    Source: Nocedal & Wright, "Numerical Optimization" (2006), algorithm 7.5; Byrd, Nocedal & Schnabel, "Representations
    of quasi-Newton matrices and their use in limited memory methods" (1994), theorem 2.2, for the product with $H_k$;
    Berahas, Nocedal & Takáč, "A multi-batch L-BFGS method for machine learning" (2016) for gradients of the same batch.
    """

    def __init__(
        self, memory: int = 10, max_evaluations: int = 20, learning_rate: Schedule = 1.0, name: str = "lbfgs"
    ) -> None:
        super().__init__(max_evaluations, learning_rate, name)
        self.memory = validation.require_count(type(self).__name__, "memory", memory)

    def build(self, variables: Any) -> None:
        if self.built:
            return
        super().build(variables)
        size = sum(math.prod(v.shape) for v in variables)
        add = functools.partial(self.add_variable, aggregation="only_first_replica")
        self._pairs = StoredPairs(add, self.memory, size, state_dtype(variables))

    def approximation(self) -> Pairs:
        return self._pairs.current()

    def store(self, approximation: Pairs) -> None:
        if approximation.is_initial:
            self._pairs.clear()
        elif approximation.pair is not None:
            self._pairs.add(approximation.pair, approximation.products)

    def at_end(self) -> tuple[Any, ...]:
        pending = self.now.pending
        if pending is None or not pending.can_be_added_at_once:
            return ()
        self.now.pending = None
        return self._pairs.added(pending.pair, pending.products)

    def assign_end(self, *arrays: Any) -> None:
        super().assign_end()
        if arrays:
            self._pairs.assign(*arrays)

    def variables_to_restore(self) -> list[Any]:
        # A step that fails leaves the pairs in use as they are, and a step changes no options.
        return [self.iterations, self._pairs.products, self._pairs.place]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "memory": self.memory}
