"""The model, the examples and the loss that a report is about, checked."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_gradtools import nesting, validation
from keras_gradtools.curvature.data.batch_loss import require_model

NAME = "report"


class NotApplicable(Exception):
    """A check has no meaning for this model or data. The message says why."""


class Subject:
    """A model with some examples of the data.

    Attributes:
        given: The model as it was given.
        model: The model whose weights are examined. For a wrapper, the wrapped model.
        x, y, sample_weight: Arrays of the drawn examples. `y` and `sample_weight` may be None.
        loss: The loss for the curvature operators, or None for the compiled one.
        seed: The seed of all random numbers.
        clip: The range of the inputs, or None if it is not known.
    """

    def __init__(self, model, data, loss, examples, seed, clip):
        self.given, self.model, self.seed = model, require_model(NAME, model), validation.require_seed(NAME, seed)
        validation.require_loss(NAME, loss)
        self.loss = loss
        most = validation.require_count(NAME, "examples", examples, 2)
        parts = data if isinstance(data, tuple) else (data,)
        if not parts or len(parts) > 3:
            raise validation.refused(NAME, "x, (x, y) or (x, y, sample_weight)", "data", data)
        arrays = nesting.map_structure(lambda a: a if a is None else validation.as_array(a, _EXPECTED), parts)
        size = _size_of(arrays)
        chosen = np.arange(size)
        if size > most:
            chosen = np.sort(np.random.default_rng(seed).choice(size, most, replace=False))
        drawn = nesting.map_structure(lambda a: a if a is None else a[chosen], arrays)
        self.x, self.y, self.sample_weight = (*drawn, None, None)[:3]
        self.count, self.given_count = len(chosen), size
        self._require_finite()
        self.clip = clip if clip is not None else self._range_of_pixels()
        self._require_fitting()

    @property
    def loss_data(self):
        """The data for a loss. Raises `NotApplicable` without labels or a loss."""
        if self.y is None:
            raise NotApplicable("the data have no labels `y`.")
        if self.given_loss is None:
            raise NotApplicable("the model is not compiled with a loss, and no `loss` was given.")
        return (self.x, self.y) if self.sample_weight is None else (self.x, self.y, self.sample_weight)

    @property
    def given_loss(self):
        """The loss that was given, or that the model was compiled with."""
        return self.loss if self.loss is not None else getattr(self.given, "loss", None)

    def first(self, count):
        """The inputs of the first examples."""
        return nesting.map_structure(lambda a: a if a is None else a[:count], self.x)

    def tensors(self):
        """The inputs as tensors."""
        return nesting.map_structure(lambda a: a if a is None else ops.convert_to_tensor(a), self.x)

    def _range_of_pixels(self):
        leaves = [a for a in nesting.flatten(self.x) if a is not None and a.dtype.kind == "f"]
        is_unit = len(leaves) == 1 and leaves[0].min() >= 0 and 0.5 < leaves[0].max() <= 1
        return (0.0, 1.0) if is_unit else None

    def _require_finite(self):
        for part, name in ((self.x, "x"), (self.y, "y"), (self.sample_weight, "sample_weight")):
            for array in nesting.flatten(part) if part is not None else []:
                if array is not None and array.dtype.kind in "fc" and not np.isfinite(array).all():
                    raise ValueError(
                        f"{NAME} expects finite data. Received: NaN or infinity in `{name}`, "
                        f"{validation.describe(array)}. Remove these examples, or replace the values."
                    )
        bad = [v.path for v in self.model.weights if _is_not_finite(v)]
        if bad:
            raise ValueError(
                f"{NAME} expects finite weights. Received: NaN or infinity in {', '.join(bad[:3])}"
                f"{', ...' if len(bad) > 3 else ''}. Load weights from before the training diverged."
            )

    def _require_fitting(self):
        try:
            self.outputs: Any = [ops.convert_to_numpy(y) for y in nesting.flatten(self.model(self.tensors()))]
        except Exception as error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            expected = nesting.map_structure(
                lambda spec: tuple(spec.shape), getattr(self.model, "inputs", None) or ["unknown"]
            ) if getattr(self.model, "inputs", None) else "unknown shapes"  # fmt: skip
            received = [tuple(a.shape) for a in nesting.flatten(self.x) if a is not None]
            raise ValueError(
                f"{NAME} expects inputs that the model {self.model.name!r} can be called on, of the shapes {expected}. "
                f"Received: `x` of the shapes {received}. The model says: {line}"
            ) from error


_EXPECTED = f"{NAME} expects arrays or tensors in `data`"


def _size_of(arrays):
    sizes = {len(a) for a in nesting.flatten(arrays) if a is not None and a.ndim}
    if len(sizes) != 1 or not all(a.ndim for a in nesting.flatten(arrays) if a is not None):
        shapes = ", ".join(str(a.shape) for a in nesting.flatten(arrays) if a is not None)
        raise ValueError(f"{NAME} expects arrays with one number of examples. Received: the shapes {shapes}.")
    (size,) = sizes
    if size < 2:
        raise ValueError(f"{NAME} expects two examples or more. Received: {size}.")
    return size


def _is_not_finite(variable):
    if not keras.backend.is_float_dtype(variable.dtype):
        return False
    return not bool(ops.all(ops.isfinite(ops.convert_to_tensor(variable))))
