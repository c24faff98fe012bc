"""A loss that is a sum of mean squares of residuals, which a function computes from the model and the data."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import keras
from keras import ops

from keras_gradtools import validation
from keras_gradtools.annotations import Function, Nested, Tensor
from keras_gradtools.keras_state.layer_state import regularization_losses
from keras_gradtools.keras_state.scopes import read

NAME = "SquaredResiduals"
_WEIGHTS = "a number of 0 or more, a list or a dict of them,"


@keras.saving.register_keras_serializable(package="keras_gradtools")
class SquaredResiduals:
    r"""The loss $L = \sum_i w_i \, \frac{1}{n_i} \lVert r_i \rVert^2$ of residuals that a function computes.

    $r_i$ are the residuals of the i-th term, for example of a differential equation at points in the interior, or of a
    condition at points on the boundary. $n_i$ is the number of elements of $r_i$, and $w_i$ its weight. The function
    may differentiate the model.

    Pass it as the `loss` to `compile` of `kg.models.SecondOrder` or `kg.models.CompiledTraining` (for first-order
    optimizers such as Adam), to `kg.curvature.GaussNewton` or `Hessian`, or to a callback that takes a `loss`, such as
    `kg.callbacks.NewtonStep`. With the vector $r$ of all $\sqrt{w_i / n_i} \, r_i$ and its Jacobian $J$ with respect to
    the weights of the model, the loss is $\lVert r \rVert^2$, the gradient is $2 J^\top r$ and the Gauss-Newton matrix
    is $2 J^\top J$. So `kg.optimizers.LevenbergMarquardt` takes the step of a least-squares solver for $r$, $-(J^\top J
    + \frac{\lambda}{2} I)^{-1} J^\top r$. Weight regularizers are added to the loss as usual.

    The function calls the model itself, and so chooses its mode, `training`. The data of `fit` are `x`, a tensor or a
    nested structure of tensors, such as a dict with a set of points for each term. These sets may have different sizes.
    Lists of sets arrive as tuples. Without a `batch_size`, all points form one batch. With a `batch_size`, all sets
    must have the same size, and each batch has `batch_size` points of each set. If `fit` also receives `y`, the
    function gets `(x, y)`. If the data come in batches, each batch should have the same fraction of every set, because
    a batch is weighted by the number of points in its first set.

    `loss(model, batch)` returns the loss, a scalar.

    Args:
        residuals: `residuals(model, batch)`, which returns a real floating-point tensor of any shape, or a list or dict
            of such tensors. To save a compiled model, register it with `keras.saving.register_keras_serializable`.
        weights: $w_i$: a number for all terms, or a list or dict like that of the residuals. Default: 1.

    Raises:
        ValueError: If an argument is invalid. When the function is called, if it returns anything else, if a layer adds
            a loss in its `call`, or if no trainable weight of the model affects one of the terms.

    Cost:
        That of `residuals`.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> def residuals(model, points):  # of u' = 2 with u(0) = 1
    ...     slope = kg.grad(lambda x: keras.ops.sum(model(x)))(points["inside"])
    ...     return {"equation": slope - 2.0, "start": model(points["start"]) - 1.0}
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    >>> trainer = kg.models.SecondOrder(model)
    >>> loss = kg.losses.SquaredResiduals(residuals, weights={"equation": 1.0, "start": 10.0})
    >>> trainer.compile(kg.optimizers.LevenbergMarquardt(damping=0.0), loss)
    >>> points = {"inside": np.linspace(0, 1, 8, dtype="float32")[:, None], "start": np.zeros((1, 1), "float32")}
    >>> history = trainer.fit(points, epochs=1, verbose=0)  # linear: one step is all that it takes
    >>> [round(w.item(), 3) for w in model.get_weights()]
    [2.0, 1.0]

    Source: Müller & Zeinhofer, "Achieving high accuracy with PINNs via energy natural gradient descent" (2023); the
    Gauss-Newton matrix of the residuals is that of Jnini, Vella & Zeinhofer, "Gauss-Newton natural gradient descent for
    physics-informed computational fluid dynamics" (2024).
    """

    def __init__(
        self, residuals: Function, weights: float | Sequence[float] | Mapping[str, float] | None = None
    ) -> None:
        if not callable(residuals) or isinstance(residuals, (keras.Layer, keras.KerasTensor)):
            raise validation.refused(NAME, "a function (model, batch)", "residuals", residuals)
        self._residuals, self._given_weights = residuals, weights
        if isinstance(weights, Mapping):
            self._weights: Any = dict(weights)
        elif isinstance(weights, (list, tuple)):
            self._weights = dict(enumerate(weights))
        else:
            self._weights = None
        each: Any = [1.0 if weights is None else weights] if self._weights is None else self._weights.values()
        if not all(validation.is_number(w) and 0 <= w < math.inf for w in each):
            raise validation.refused(NAME, _WEIGHTS, "weights", weights)

    @property
    def residuals(self) -> Function:
        """The function of the model and the data."""
        return self._residuals

    @property
    def weights(self) -> Any:
        """The weights of the terms, as given."""
        return self._given_weights

    @property
    def name(self) -> str:
        """The name of the function."""
        return validation.name_of(self.residuals)

    def __call__(self, model: keras.Layer, batch: Nested) -> Tensor:
        """The loss, a scalar, without weight regularizers."""
        if not isinstance(model, keras.Layer):
            raise ValueError(
                f"{NAME} is a loss of a model and its data, not of labels and predictions. Received: "
                f"{validation.describe(model)} in place of the model. Train with it by "
                "`keras_gradtools.models.SecondOrder(model)` or `keras_gradtools.models.CompiledTraining(model)`."
            )
        return ops.sum(ops.square(self.vector(model, batch)))

    def vector(self, model: keras.Layer, batch: Nested) -> Tensor:
        r"""The vector $r$ of all $\sqrt{w_i / n_i} \, r_i$, in float32, or in float64 if a term has this dtype."""
        terms = self.terms(model, batch)
        scales, dtype = self.scales(terms), common_dtype(terms.values())
        flat = [
            ops.cast(scales[name], dtype) * ops.cast(ops.reshape(term, (-1,)), dtype) for name, term in terms.items()
        ]
        return flat[0] if len(flat) == 1 else ops.concatenate(flat)

    def terms(self, model: keras.Layer, batch: Nested) -> dict[Any, Tensor]:
        """The residuals $r_i$, by their names or positions."""
        found = self.residuals(model, batch)
        if isinstance(found, Mapping):
            terms = dict(found)
        else:
            terms = dict(enumerate(found if isinstance(found, (list, tuple)) else [found]))
        if not terms:
            raise self._refused(f"{found!r}")
        terms = {name: read(term) for name, term in terms.items()}
        for name, term in terms.items():
            self._require_term(name, term, len(terms))
        added = len(model.losses) - len(regularization_losses(model))
        if added > 0:
            raise ValueError(
                f"{NAME} expects all terms of the loss from `residuals`. Received: a model that adds {added} more in "
                "its `call` (`add_loss` or an `activity_regularizer`). Return their roots as residuals."
            )
        return terms

    def scales(self, terms: Mapping[Any, Tensor]) -> dict[Any, Any]:
        r"""The numbers $\sqrt{w_i / n_i}$ for these terms. A tensor where the size of a term is not known."""
        weights = self._weights
        if weights is None:
            weights = dict.fromkeys(terms, 1.0 if self.weights is None else self.weights)
        elif weights.keys() != terms.keys():
            raise ValueError(
                f"{NAME} expects a weight for each term. Received: weights for {list(weights)}, and residuals for "
                f"{list(terms)}."
            )
        return {name: _scale(weights[name], term) for name, term in terms.items()}

    def _require_term(self, name, term, count):
        where = f" for {name!r}" if count > 1 or isinstance(name, str) else ""
        is_term = ops.is_tensor(term) and not isinstance(term, keras.KerasTensor)
        if not is_term or not validation.has_derivative(term):
            raise self._refused(f"{validation.describe(term)}{where}")
        if 0 in tuple(term.shape):
            raise ValueError(
                f"{NAME} expects terms with at least one residual. Received: {validation.describe(term)}{where}."
            )

    def _refused(self, received):
        return ValueError(
            f"{NAME} expects that `residuals` returns a real floating-point tensor, or a list or dict of such tensors. "
            f"Received: {received} from {self.name}."
        )

    def __repr__(self) -> str:
        return f"<{NAME} of {self.name}>"

    def get_config(self) -> dict[str, Any]:
        return {"residuals": keras.saving.serialize_keras_object(self.residuals), "weights": self.weights}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        residuals = keras.saving.deserialize_keras_object(config["residuals"])
        return cls(residuals, config["weights"])


def common_dtype(terms):
    """The dtype in which the squares of these tensors are summed."""
    return "float64" if any(validation.dtype_of(term) == "float64" for term in terms) else "float32"


def _scale(weight, term):
    if None not in tuple(term.shape):
        return math.sqrt(weight / math.prod(term.shape))
    return math.sqrt(weight) / ops.sqrt(ops.cast(ops.size(term), common_dtype([term])))


def points_of(owner, x, y, sample_weight):
    """What the function of a `SquaredResiduals` gets of a batch of `fit`, as the `x` of a batch without labels."""
    if sample_weight is not None:
        raise ValueError(
            f"{owner} takes no `sample_weight` with {NAME}. Received: "
            f"{validation.describe(sample_weight)}. Multiply the residuals by the roots of the weights in `residuals`."
        )
    return x if y is None else (x, y)
