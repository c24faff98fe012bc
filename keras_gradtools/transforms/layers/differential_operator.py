"""The base class of layers that return the Laplacian or the divergence of a wrapped layer."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_gradtools import validation
from keras_gradtools.annotations import ChunkSize, InputNames, Nested
from keras_gradtools.transforms.differential_operators import require_axes
from keras_gradtools.transforms.jacobians import require_rows
from keras_gradtools.transforms.layers.derivative import Derivative
from keras_gradtools.transforms.taylor.chunks import Chunks
from keras_gradtools.transforms.taylor.sampling import Distribution, require_sampling


class DifferentialOperator(Derivative):
    """Base class of layers that apply a differential operator to the wrapped layer, along some axes of its input."""

    def __init__(
        self,
        layer: keras.Layer,
        axes: Sequence[int] | None = None,
        return_outputs: bool = False,
        inputs: InputNames = None,
        samples: int | None = None,
        directions: Distribution = "rademacher",
        seed: int | None = None,
        return_standard_error: bool = False,
        chunk_size: ChunkSize = "auto",
        memory_budget: int | None = None,
        **kwargs: Any,
    ) -> None:
        name = type(self).__name__
        seed = validation.require_seed(name, seed, may_be_none=True)
        sampling = require_sampling(name, samples, directions, seed, return_standard_error)
        self._chunks = Chunks(*require_rows(name, chunk_size, memory_budget))
        super().__init__(layer, return_outputs, inputs, **kwargs)
        self._sampling, self._seed = sampling, seed
        self._seeds = None if sampling is None else keras.random.SeedGenerator(seed)
        self.axes: list[int] | None = None if axes is None else require_axes(name, axes)

    def _require_axes(self, inputs):
        self._require_points(inputs)
        return require_axes(type(self).__name__, self.axes, inputs.shape[1])

    def _drawn(self, sampling, axes, x):
        """The random directions of one call. Each call draws new ones."""
        return sampling.draw(type(self).__name__, len(axes), self._seeds, x.dtype)

    def compute_output_spec(self, inputs: Nested, training: bool | None = None) -> Nested:
        spec = super().compute_output_spec(inputs, training)
        if self._sampling is None or not self._sampling.return_standard_error:
            return spec
        *outputs, estimate = spec if self.return_outputs else (spec,)
        return (*outputs, estimate, keras.KerasTensor(estimate.shape, estimate.dtype))

    def get_config(self) -> dict[str, Any]:
        sampling = {} if self._sampling is None else {**self._sampling._asdict(), "seed": self._seed}
        chunks = {"chunk_size": self._chunks.chunk_size, "memory_budget": self._chunks.memory_budget}
        return {**super().get_config(), "axes": self.axes, **sampling, **chunks}
