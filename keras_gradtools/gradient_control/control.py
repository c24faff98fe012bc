"""The base classes of the layers that control a gradient, and checks and conversions for their functions."""

from typing import Any, Self

import keras
from keras import ops

from keras_gradtools import validation
from keras_gradtools.annotations import Function, Nested
from keras_gradtools.validation import name_of


class GradientControl(keras.layers.Layer):
    """Base class of the layers that return their inputs and change the gradient.

    The `call` of a subclass calls the function of the same name, such as `clip_gradient_norm` for `ClipGradientNorm`.
    Conversely, that function calls the layer if its argument is a symbolic tensor, so that a functional model contains
    the layer and can be saved. (A plain `keras.Operation` could be saved, too, but would lose the mask of its
    argument.)
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True

    def compute_output_spec(self, inputs: Nested) -> Nested:
        return keras.tree.map_structure(lambda x: keras.KerasTensor(x.shape, dtype=x.dtype), inputs)


class FunctionControl(GradientControl):
    """Base class of the layers that apply a function, replace its gradient, and are saved with the function."""

    def __init__(self, fun: Function, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.fun = fun

    def get_config(self) -> dict[str, Any]:
        fun = keras.saving.serialize_keras_object(self.fun)
        if getattr(ops, name_of(self.fun), None) is self.fun:
            fun["module"] = "keras.ops"  # Without it, Keras finds only losses, metrics and activations.
        return {**super().get_config(), "fun": fun}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls(**{**config, "fun": keras.saving.deserialize_keras_object(config["fun"])})


def require_differentiable(owner, x):
    """Returns `x` as a tensor, or unchanged if symbolic. Raises `ValueError` unless it is real floating-point."""
    if isinstance(x, keras.KerasTensor):
        validation.require_real_floating(x, f"The argument of {owner}")
        return x
    validation.require_differentiable(x, f"The argument of {owner}")
    return ops.convert_to_tensor(x)


def constant(number, x):
    """`number` as a tensor without a gradient, in the precision in which the gradient of `x` is computed."""
    dtype = "float64" if validation.dtype_of(x) == "float64" else "float32"
    return ops.stop_gradient(ops.convert_to_tensor(number, dtype=dtype))


def require_limit(owner, name, limit):
    """Returns `limit` as a float. Raises `ValueError` unless it is a positive finite number."""
    advice = "To stop a gradient altogether, use stop_gradient."
    return validation.require_number(owner, name, limit, above=0, advice=advice)
