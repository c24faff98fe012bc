"""The limited-memory BFGS method."""

import math
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_gradtools import validation
from keras_gradtools.annotations import Schedule
from keras_gradtools.curvature.estimators.krylov_basis import dot
from keras_gradtools.second_order.quasi_newton import QuasiNewton, state_dtype


@keras.saving.register_keras_serializable(package="keras_gradtools")
class LBFGS(QuasiNewton):
    r"""The limited-memory BFGS method, $\theta \leftarrow \theta - t \, H_k \, g$, with a strong Wolfe line search.

    $g$ is the gradient of the batch. $H_k$ approximates the inverse of the Hessian. It is what BFGS updates with the
    last `memory` steps $s_i$ and changes of the gradient $y_i$ make of $\gamma I$, where
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
        the last step had the same batch in the same order (`shuffle=False`) without random numbers. `4 * memory * n`
        multiplications for n weights. It stores `2 * memory` vectors, and a step needs memory for up to about
        `7 * memory` more.

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

    Source: Nocedal & Wright, "Numerical Optimization" (2006), algorithms 7.4 and 7.5; Berahas, Nocedal & Takáč, "A
    multi-batch L-BFGS method for machine learning" (2016) for gradients of the same batch.
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
        options = {"dtype": state_dtype(variables), "aggregation": "only_first_replica"}
        self._steps = self.add_variable((self.memory, size), name="steps", **options)
        self._changes = self.add_variable((self.memory, size), name="gradient_changes", **options)

    def approximation(self) -> "Pairs":
        """The pairs, the newest first."""
        steps, changes = (ops.convert_to_numpy(ops.convert_to_tensor(v)) for v in (self._steps, self._changes))
        # Rows that are not in use yet are zero.
        count = int(np.any(steps != 0.0, axis=1).sum())
        return Pairs(steps[:count], changes[:count], self.memory)

    def store(self, approximation: "Pairs") -> None:
        for variable, rows in ((self._steps, approximation.steps), (self._changes, approximation.changes)):
            missing = self.memory - len(rows)
            variable.assign(np.pad(rows, ((0, missing), (0, 0))) if missing else rows)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "memory": self.memory}


class Pairs(NamedTuple):
    """The inverse Hessian of BFGS, by the pairs that it was updated with: `memory` rows at most, the newest first."""

    steps: np.ndarray
    changes: np.ndarray
    memory: int

    @property
    def is_initial(self):
        return not len(self.steps)

    def initial(self):
        return self._replace(steps=self.steps[:0], changes=self.changes[:0])

    def updated(self, pair):
        return self._replace(
            steps=np.concatenate([pair.step[None].astype(self.steps.dtype), self.steps])[: self.memory],
            changes=np.concatenate([pair.change[None].astype(self.changes.dtype), self.changes])[: self.memory],
        )

    def times(self, vector):
        """The two-loop recursion: the approximate inverse Hessian times a vector, in double precision."""
        found = np.asarray(vector, "float64").copy()
        curvatures = [dot(s, y) for s, y in zip(self.steps, self.changes, strict=True)]
        pairs = list(zip(self.steps, self.changes, curvatures, strict=True))
        shares = []
        for s, y, curvature in pairs:
            shares.append(dot(s, found) / curvature)
            found -= shares[-1] * y
        if pairs:
            found *= curvatures[0] / dot(self.changes[0], self.changes[0])
        for (s, y, curvature), share in zip(pairs[::-1], shares[::-1], strict=True):
            found += (share - dot(y, found) / curvature) * s
        return found
