"""A layer that returns chosen partial derivatives of a wrapped layer, by name."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_gradtools.annotations import Function, InputNames, Nested
from keras_gradtools.transforms.layers.derivative import Derivative
from keras_gradtools.transforms.partial_derivatives import derivatives_of, require_derivatives


@keras.saving.register_keras_serializable(package="keras_gradtools")
class PartialDerivatives(Derivative):
    r"""Returns chosen partial derivatives of a wrapped layer at each example, such as $u$, $u_t$ and $u_{xx}$.

    For physics-informed networks: one pass gives all that the residual of an equation needs. A loss on these outputs
    trains the wrapped layer. The layer is saved and loaded with its model.

    Args:
        layer: A Keras layer or model that takes points of shape `(batch, n)` and returns one tensor. It is shared, not
            copied.
        derivatives: Which derivatives, as a list or as a dict with a name for each, as in `kg.partial_derivatives`.
        variables: One letter for each column of the points, such as `"tx"`.
        inputs: The name (or dict key) or position of the input to differentiate with respect to, if `layer` takes
            several. By default its only floating-point input. The others are passed on unchanged.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: A tensor of shape `(batch, n)`, or the several inputs of `layer`.
        training: Passed on to `layer`.

    Returns:
        A list of tensors, or a dict of tensors with the names of `derivatives`, each with the shape of the output of
        `layer`.

    Raises:
        ValueError: For invalid options, inputs of another rank, and variables that do not exist.

    Cost:
        That of `kg.partial_derivatives`. One more call of the layer in training mode if it has a state to update.

    Example:

    >>> import keras
    >>> import keras_gradtools as kg
    >>> wave = keras.layers.Lambda(lambda p: keras.ops.sin(p[:, 1:] - 2 * p[:, :1]))
    >>> derivatives = kg.layers.PartialDerivatives(wave, {"u_tt": "tt", "u_xx": "xx"}, variables="tx")
    >>> found = derivatives(keras.ops.ones((2, 2)))
    >>> [round(float(r), 4) for r in found["u_tt"][:, 0] - 4 * found["u_xx"][:, 0]]  # u_tt = 4 u_xx
    [0.0, 0.0]

    Source: Raissi, Perdikaris & Karniadakis, "Physics-informed neural networks" (2019).
    """

    def __init__(
        self,
        layer: keras.Layer,
        derivatives: Sequence[Any] | Mapping[str, Any],
        variables: str | Sequence[str] | None = None,
        inputs: InputNames = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(layer, inputs=inputs, **kwargs)
        self._names, self._keys = require_derivatives(type(self).__name__, derivatives, variables)

    def _named(self, derivatives):
        return list(derivatives) if self._names is None else dict(zip(self._names, derivatives, strict=True))

    def derivative(self, fun: Function, x: Nested) -> Nested:
        self._require_points(x)
        return self._named(derivatives_of(type(self).__name__, fun, (x,), {}, self._keys))

    def derivative_spec(self, inputs: Nested, outputs: Nested) -> Nested:
        self._require_points(inputs)
        return outputs.shape

    def compute_output_spec(self, inputs: Nested, training: bool | None = None) -> Nested:
        spec = super().compute_output_spec(inputs, training)
        return self._named([keras.KerasTensor(spec.shape, spec.dtype) for _ in self._keys])

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config["return_outputs"]
        return {**config, "derivatives": self._named([list(key) for key in self._keys])}
