"""A layer that returns the Laplacian of a wrapped layer."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_gradtools import validation
from keras_gradtools.annotations import ChunkSize, Function, InputNames, Nested
from keras_gradtools.transforms.layers.differential_operator import DifferentialOperator
from keras_gradtools.transforms.taylor.operators import laplacian_estimate_of, laplacian_of
from keras_gradtools.transforms.taylor.sampling import Distribution


@keras.saving.register_keras_serializable(package="keras_gradtools")
class Laplacian(DifferentialOperator):
    r"""Returns the Laplacian of a wrapped layer at each example, $\sum_i \partial^2 y_{b k} / \partial x_{b i}^2$.

    With coefficients, $\sum_{i j} D_{i j} \partial^2 y_{b k} / \partial x_{b i} \partial x_{b j}$. For
    physics-informed networks: a loss on this output trains the wrapped layer. The layer is saved and loaded with its
    model.

    Args:
        layer: A Keras layer or model that takes points of shape `(batch, n)`. It is shared, not copied.
        axes: The indices of the inputs to sum over, as a list. By default all n inputs.
        return_outputs: Whether to return the pair `(outputs, laplacian)` instead of the Laplacian alone.
        inputs: The name (or dict key) or position of the input to differentiate with respect to, if `layer` takes
            several. By default its only floating-point input. The others are passed on unchanged.
        coefficients: The constants $D_{i j}$ for the m axes, nested lists or an array of shape `(m,)` (the diagonal) or
            `(m, m)`. By default the identity. `kg.laplacian` also takes trainable ones, and others for each example.
        samples: The number of random directions for an estimate. By default None, for the exact Laplacian.
        directions: `"rademacher"`, `"gaussian"` or `"coordinates"`, as for `kg.laplacian`.
        seed: An integer that seeds the directions, or None. Each call draws new ones, also outside of training.
        return_standard_error: Whether to return, after the estimate, its standard error.
        chunk_size: Number of axes, or of random directions, that are computed at once, `"auto"` or None, as for
            `kg.laplacian`.
        memory_budget: As for `kg.laplacian`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: A tensor of shape `(batch, n)`, or the several inputs of `layer`.
        training: Passed on to `layer`.

    Returns:
        A tensor with the shape of the output of `layer`, or a tuple of such tensors: the outputs if asked for, the
        Laplacian, and its standard error if asked for.

    Raises:
        ValueError: For invalid options, inputs of another rank, axes that do not exist, and coefficients of another
            number of axes.

    Cost:
        That of `kg.laplacian`. One more call of the layer with `return_outputs`, and in training mode if the layer has
        a state to update.

    Example:

    >>> import keras
    >>> import keras_gradtools as kg
    >>> radius = keras.layers.Lambda(lambda x: keras.ops.sum(x * x, axis=1, keepdims=True))
    >>> [float(v) for v in kg.layers.Laplacian(radius)(keras.ops.ones((2, 3)))[:, 0]]
    [6.0, 6.0]
    >>> [float(v) for v in kg.layers.Laplacian(radius, coefficients=[1.0, 2.0, 3.0])(keras.ops.ones((2, 3)))[:, 0]]
    [12.0, 12.0]

    Source: Raissi, Perdikaris & Karniadakis, "Physics-informed neural networks" (2019).
    """

    def __init__(
        self,
        layer: keras.Layer,
        axes: Sequence[int] | None = None,
        return_outputs: bool = False,
        inputs: InputNames = None,
        coefficients: Any = None,
        samples: int | None = None,
        directions: Distribution = "rademacher",
        seed: int | None = None,
        return_standard_error: bool = False,
        chunk_size: ChunkSize = "auto",
        memory_budget: int | None = None,
        **kwargs: Any,
    ) -> None:
        sampling = samples, directions, seed, return_standard_error
        super().__init__(layer, axes, return_outputs, inputs, *sampling, chunk_size, memory_budget, **kwargs)
        # As lists, which a configuration can hold.
        self.coefficients: list[Any] | None = None if coefficients is None else _constants(coefficients)
        if self.axes is not None:
            self._require_count(len(self.axes))

    def derivative(self, fun: Function, x: Nested) -> Nested:
        axes = self._require_axes(x)
        self._require_count(len(axes))
        given = self.coefficients
        factors = None if given is None else ops.convert_to_tensor(np.asarray(given), dtype=x.dtype)
        if self._sampling is None:
            return laplacian_of(fun, x, axes, factors, self._chunks)[1]
        vectors = self._drawn(self._sampling, axes, x)
        return laplacian_estimate_of(fun, x, axes, self._sampling, vectors, factors, self._chunks)[1]

    def derivative_spec(self, inputs: Nested, outputs: Nested) -> Nested:
        self._require_count(len(self._require_axes(inputs)))
        return outputs.shape

    def _require_count(self, count):
        if self.coefficients is not None and len(self.coefficients) != count:
            raise ValueError(
                f"Laplacian expects `coefficients` of shape ({count},) or ({count}, {count}), for {count} axes. "
                f"Received: shape {np.shape(self.coefficients)}."
            )

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "coefficients": self.coefficients}


def _constants(given: Any) -> list[Any]:
    """Returns real numbers of shape (m,) or (m, m) as lists. Raises `ValueError` for anything else."""
    if isinstance(given, (list, tuple, np.ndarray)):
        try:
            found = np.asarray(given)
        except ValueError:  # rows of several lengths
            found = np.zeros(0)
        is_square = found.size and found.shape in (found.shape[:1], found.shape[:1] * 2)
        if is_square and found.dtype.kind in "iuf" and np.isfinite(found).all():
            return found.astype("float64").tolist()
    raise validation.refused(
        "Laplacian",
        "finite numbers of shape (m,) or (m, m) as lists or an array",
        "coefficients",
        given,
        "For coefficients that are tensors or variables, call `kg.laplacian`.",
    )
