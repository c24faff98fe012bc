"""The BFGS method and its self-scaled variants."""

import math
from typing import Any, Literal, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_gradtools import backend, validation
from keras_gradtools.annotations import Schedule
from keras_gradtools.curvature.estimators.krylov_basis import dot
from keras_gradtools.second_order.broyden_family import UPDATES, scaling_and_share, update_terms
from keras_gradtools.second_order.quasi_newton import QuasiNewton, state_dtype


@keras.saving.register_keras_serializable(package="keras_gradtools")
class BFGS(QuasiNewton):
    r"""The BFGS method and its self-scaled variants, $\theta \leftarrow \theta - t H g$, with a strong Wolfe search.

    $$H \leftarrow \frac{1}{\tau} \Big(H - \frac{H y y^\top H}{y^\top H y} + \phi \, y^\top H y \, v v^\top\Big)
    + \frac{s s^\top}{y^\top s}, \quad v = \frac{s}{y^\top s} - \frac{H y}{y^\top H y}$$

    $g$ is the gradient of the batch, $s$ the step, $y$ the change of the gradient, and $H$ the approximation of the
    inverse Hessian, which starts as the identity. The new $H$ satisfies $H y = s$ and is positive definite. $\tau$ and
    $\phi$ depend on the `update`:

    - `"bfgs"`: $\tau = 1$, $\phi = 1$.
    - `"ssbfgs"`, self-scaled BFGS: $\tau = \min(1, 1 / b)$, $\phi = 1$, where $b = s^\top H^{-1} s / y^\top s$.
    - `"ssbroyden"`, self-scaled Broyden: both change from step to step, by Al-Baali's formulas. Physics-informed
      networks in double precision are often trained further with it than with any other quasi-Newton method.

    Unlike `LBFGS`, it keeps the whole matrix. It needs far fewer steps on ill-conditioned losses, and suits models of
    up to a few thousand weights. Train on all of the data in each batch, as with `LBFGS`.

    Args:
        update: `"bfgs"`, `"ssbfgs"` or `"ssbroyden"`.
        scales_first: Whether the first update also multiplies the identity by the size of the inverse Hessian along
            the first step, $s^\top y / y^\top y$ for `"bfgs"`. It saves evaluations if the weights are badly scaled.
            If the first step sees only the largest curvature, the matrix starts too small, which `"bfgs"` corrects
            slowly.
        max_evaluations: Maximum number of evaluations of the loss and its gradient in the line search of one step. If
            no step with a sufficient decrease is found, the weights do not change and the matrix becomes the identity.
        max_weights: Largest number of weights that is accepted. The matrix has its square of elements.
        learning_rate: Factor of the first step that the line search tries, above 0 and at most 1, or a
            `LearningRateSchedule`.
        name: Name of the optimizer.

    Raises:
        ValueError: If an option is invalid. In `fit`, if the model is not a `SecondOrder`, if it has more than
            `max_weights` weights, or if layers were frozen or unfrozen after the first step.

    Cost:
        For each step, evaluations of the loss and its gradient as for `LBFGS`, and about `8 n**2` multiplications for n
        weights. The matrix takes `8 n**2` bytes in double precision and `4 n**2` in single precision: 800 MB for 10,000
        weights in double precision. A step needs up to four times as much.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> trainer = kg.models.SecondOrder(model)
    >>> trainer.compile(kg.optimizers.BFGS("ssbroyden"), "mse")
    >>> x = np.random.default_rng(0).normal(size=(100, 2)).astype("float32")
    >>> history = trainer.fit(x, x @ [[2.0], [-1.0]], batch_size=100, epochs=15, verbose=0)
    >>> model.get_weights()[0].round(3).ravel().tolist()
    [2.0, -1.0]

    Source: Nocedal & Wright, "Numerical Optimization" (2006), algorithm 6.1 and equation 6.20; Al-Baali, "Numerical
    experience with a class of self-scaling quasi-Newton algorithms" (1998); Urbán, Stefanou & Pons, "Unveiling the
    optimization process of physics informed neural networks: how accurate and competitive can PINNs be?" (2025).
    """

    def __init__(
        self,
        update: Literal["bfgs", "ssbfgs", "ssbroyden"] = "bfgs",
        scales_first: bool = False,
        max_evaluations: int = 20,
        max_weights: int = 10_000,
        learning_rate: Schedule = 1.0,
        name: str = "bfgs",
    ) -> None:
        super().__init__(max_evaluations, learning_rate, name)
        owner = type(self).__name__
        self.update: str = validation.require_choice(owner, "update", update, UPDATES)
        self.scales_first: bool = validation.require_flag(owner, "scales_first", scales_first)
        self.max_weights: int = validation.require_count(owner, "max_weights", max_weights)

    def build(self, variables: Any) -> None:
        if self.built:
            return
        size, dtype = sum(math.prod(v.shape) for v in variables), state_dtype(variables)
        if size > self.max_weights:
            gigabytes = size**2 * np.dtype(dtype).itemsize / 2**30
            raise ValueError(
                f"{type(self).__name__} expects a model of at most max_weights={self.max_weights} weights, because its "
                f"matrix has a row for each. Received: {size} weights, whose matrix takes {gigabytes:.3g} GiB. Use "
                "keras_gradtools.optimizers.LBFGS, which needs no matrix, or raise `max_weights`."
            )
        super().build(variables)
        only_first = {"aggregation": "only_first_replica"}
        self._matrix = self.add_variable((size, size), name="inverse_hessian", dtype=dtype, **only_first)
        self._updates = self.add_variable((), name="updates", dtype="int32", **only_first)

    def approximation(self) -> "InverseHessian":
        is_initial = int(ops.convert_to_numpy(self._updates)) == 0
        matrix = None if is_initial else ops.convert_to_tensor(self._matrix)
        return InverseHessian(matrix, self._matrix.shape[0], self._matrix.dtype, self.update, self.scales_first)

    def store(self, approximation: "InverseHessian") -> None:
        if approximation.is_initial:
            self._updates.assign(0)
        elif approximation.change is not None:
            if approximation.matrix is None:
                self._matrix.assign(np.eye(approximation.size, dtype=approximation.dtype))
            backend.add_product(self._matrix, *approximation.change)
            self._updates.assign_add(1)

    def get_config(self) -> dict[str, Any]:
        options = {"update": self.update, "scales_first": self.scales_first, "max_weights": self.max_weights}
        return {**super().get_config(), **options}


class InverseHessian(NamedTuple):
    """The approximation of the inverse Hessian: a symmetric matrix, or its sum with a `change` of rank two.

    Attributes:
        matrix: A tensor on the device of the model. None for the identity.
        size, dtype: The number of rows, and the name of the dtype.
        update, scales_first: The options of `BFGS`.
        change: None, or a tuple of a number a and two NumPy arrays L and R. The approximation is then
            `a * matrix + L @ R`.
    """

    matrix: Any
    size: int
    dtype: str
    update: str
    scales_first: bool
    change: Any = None

    @property
    def is_initial(self):
        return self.matrix is None and self.change is None

    def initial(self):
        return self._replace(matrix=None, change=None)

    def times(self, vector):
        """The product of an approximation without `change` with a vector, a NumPy array in double precision."""
        vector = np.asarray(vector)
        if self.is_initial:
            return vector.astype("float64")
        product = _product(self.matrix, ops.convert_to_tensor(vector.astype(self.dtype)))
        return ops.convert_to_numpy(product).astype("float64")

    def direction(self):
        # The product with the matrix takes too long to be computed again for each trial.
        return None

    def descent(self, gradient):
        direction, slope = _descent(self.matrix, gradient)
        return direction, float(sum(ops.convert_to_numpy(slope).astype("float64"))[0]), self

    def updated(self, pair):
        step, change = (ops.convert_to_numpy(x) for x in (pair.step, pair.change))
        image = self.times(change)
        relative = dot(change, image) / pair.curvature
        former = pair.former_curvature / pair.curvature
        if not relative > 0.0 or not former > 0.0:
            # Rounding has made the approximation indefinite. The pair starts a new one.
            return self.initial().updated(pair) if not self.is_initial else self
        is_first = self.is_initial and self.scales_first
        tau, phi = scaling_and_share(self.update, self.size, former, relative, is_first)
        values, vectors = np.linalg.eigh(update_terms(tau, phi, pair.curvature, relative))
        # In this form, the product is symmetric to the last bit.
        factors = np.stack([step.astype("float64"), image], axis=1) @ (vectors * np.sqrt(np.abs(values)))
        return self._replace(change=(1.0 / tau, factors * np.sign(values), factors.T))


# With the operator of the tensors themselves: Keras' `matmul` rounds to single precision on torch.
@backend.jit
def _product(matrix, vector):
    return (matrix @ vector[:, None])[:, 0]


@backend.jit
def _descent(matrix, gradient):
    direction = -(matrix @ gradient[:, None])[:, 0]
    return direction, backend.dots([(direction, gradient)])
