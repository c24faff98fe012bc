"""The base class of the wrappers that also train on a `SquaredResiduals`, which calls the model itself."""

import inspect
from typing import Any, Self

import keras
import numpy as np
from keras import ops

from keras_gradtools import nesting, validation
from keras_gradtools.annotations import Nested
from keras_gradtools.blocks import Block
from keras_gradtools.keras_state import example_losses
from keras_gradtools.keras_state.layer_state import regularization_losses
from keras_gradtools.keras_state.scopes import read
from keras_gradtools.training.squared_residuals import NAME, SquaredResiduals, points_of
from keras_gradtools.training.wrapped_model import StateOfStep, WrappedModel, documented_as


class ResidualTraining(WrappedModel):
    """A wrapper whose `compile` takes a `SquaredResiduals` as `loss`.

    A step then passes the data to the function of the residuals, and not to the model.
    """

    _residuals: SquaredResiduals | None = None

    @documented_as(keras.Model.compile)
    def compile(self, optimizer: Any = "rmsprop", loss: Any = None, *args: Any, **kwargs: Any) -> None:
        if not isinstance(loss, SquaredResiduals):
            self._residuals = self.loss = None
            super().compile(optimizer, loss, *args, **kwargs)
            return
        given = inspect.signature(keras.Model.compile).bind(self, optimizer, None, *args, **kwargs).arguments
        for name in ("loss_weights", "metrics", "weighted_metrics"):
            if given.get(name) is not None:
                raise ValueError(
                    f"{type(self).__name__} takes no `{name}` with {NAME}, which has weights of its own and no "
                    f"predictions. Received: {name}={validation.shown(given[name])}. Compute other quantities in a "
                    "callback."
                )
        # Keras would leave them as they were, since it compiles without a loss.
        self._compile_loss = self._compile_metrics = None
        super().compile(optimizer, None, *args, **kwargs)
        self._residuals = self.loss = loss

    def get_compile_config(self) -> dict[str, Any]:
        config = super().get_compile_config()
        if self._residuals is None or not config:
            return config
        return {**config, "loss": keras.saving.serialize_keras_object(self._residuals)}

    @documented_as(keras.Model.fit)
    def fit(self, *args: Any, **kwargs: Any) -> Any:
        if self._residuals is None:
            return super().fit(*args, **kwargs)
        given = self._given(super().fit, args, kwargs)
        data = given.get("validation_data")
        if data is not None and given.get("validation_batch_size") is None:
            given["validation_data"] = self._one_batch(*keras.utils.unpack_x_y_sample_weight(data)) or data
        return super().fit(**given)

    @documented_as(keras.Model.evaluate)
    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        if self._residuals is None:
            return super().evaluate(*args, **kwargs)
        return super().evaluate(**self._given(super().evaluate, args, kwargs))

    def _given(self, method, args, kwargs):
        """The arguments of `fit` or `evaluate` by their names. Points without a batch size become one batch."""
        given = dict(inspect.signature(method).bind(*args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        for name in ("class_weight", "validation_split"):
            if given.get(name):
                raise ValueError(
                    f"{type(self).__name__} takes no `{name}` with {NAME}. Received: {name}={given[name]!r}. Multiply "
                    "the residuals by weights in the function, and pass other points as `validation_data`."
                )
        if given.get("batch_size") is None:
            one = self._one_batch(*(given.get(name) for name in ("x", "y", "sample_weight")))
            if one is not None:
                given |= {"x": one, "y": None}
        return given

    def _one_batch(self, x, y, sample_weight):
        """A data set of one batch, or None if `x` is not arrays."""
        points = points_of(type(self).__name__, x, y, sample_weight)
        leaves = nesting.flatten(points)
        is_arrays = bool(leaves) and all(hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves)
        return _OneBatch((x,) if y is None else (x, y)) if is_arrays else None

    def train_step(self, *args: Any) -> Any:
        block = _InStep(self._residuals is not None)
        with block, block:
            return super().train_step(*args)

    def test_step(self, *args: Any) -> Any:
        block = _InStep(self._residuals is not None)
        with block, block:
            return super().test_step(*args)

    def call(self, inputs: Nested, training: bool | None = None) -> Nested:
        if not _step.is_of_residuals:
            return self._forward(inputs, training)
        # `compute_loss` passes the inputs to the function of the residuals. The weights are read already here, as in a
        # forward pass: on torch, Keras then removes their gradients, and a recorded step has to see these before.
        for variable in self.trainable_variables:
            read(variable)
        return inputs

    def compute_loss(
        self,
        x: Nested = None,
        y: Nested = None,
        y_pred: Nested = None,
        sample_weight: Nested = None,
        training: bool = True,
    ) -> Any:
        if self._residuals is None:
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        points = points_of(type(self).__name__, x, y, sample_weight)
        points = nesting.map_structure(lambda a: a if ops.is_tensor(a) else ops.convert_to_tensor(a), points)
        block = _InStep(False)
        with block, block:
            loss = self._residuals(self.model, points)
        added = [ops.cast(term, loss.dtype) for term in regularization_losses(self.model)]
        return example_losses.on_replica(sum(added, loss))

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Self:
        model = keras.saving.deserialize_keras_object(config["model"], custom_objects=custom_objects)
        return cls(**config | {"model": model})


_step = StateOfStep(is_of_residuals=False)


class _InStep(Block):
    def __init__(self, is_of_residuals):
        self._now, self._before = is_of_residuals, _step.is_of_residuals

    def begin(self):
        _step.is_of_residuals = self._now

    def end(self):
        _step.is_of_residuals = self._before


class _OneBatch(keras.utils.PyDataset):
    """All points as one batch, in the precision in which Keras passes arrays to a model."""

    def __init__(self, batch):
        super().__init__()
        self._batch = _without_lists(nesting.map_structure(_array, batch))

    def __len__(self):
        return 1

    def __getitem__(self, place):
        return self._batch


def _array(x):
    array = ops.convert_to_numpy(x) if ops.is_tensor(x) else np.asarray(x)
    return array.astype(keras.config.floatx()) if array.dtype.kind == "f" else array


def _without_lists(x):
    # On TensorFlow, a batch of a `PyDataset` may not contain lists.
    if isinstance(x, (list, tuple)):
        return tuple(map(_without_lists, x))
    return {name: _without_lists(part) for name, part in x.items()} if isinstance(x, dict) else x
