"""The base class of layers that return the Laplacian or the divergence of a wrapped layer."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_gradtools.annotations import InputNames
from keras_gradtools.transforms.differential_operators import require_axes
from keras_gradtools.transforms.layers.derivative import Derivative


class DifferentialOperator(Derivative):
    """Base class of layers that apply a differential operator to the wrapped layer, along some axes of its input."""

    def __init__(
        self,
        layer: keras.Layer,
        axes: Sequence[int] | None = None,
        return_outputs: bool = False,
        inputs: InputNames = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(layer, return_outputs, inputs, **kwargs)
        self.axes: list[int] | None = None if axes is None else require_axes(type(self).__name__, axes)

    def _require_axes(self, inputs):
        self._require_points(inputs)
        return require_axes(type(self).__name__, self.axes, inputs.shape[1])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "axes": self.axes}
