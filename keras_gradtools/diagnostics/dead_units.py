"""Dead units: units of ReLU layers that are zero on all examples and receive no gradient."""

import functools

import keras
import numpy as np
from keras import ops

from keras_gradtools import nesting, validation
from keras_gradtools.annotations import Nested
from keras_gradtools.curvature.data.batch_loss import require_model
from keras_gradtools.diagnostics.layer_names import layer_names
from keras_gradtools.keras_state import layer_calls
from keras_gradtools.keras_state.layer_state import layers_of
from keras_gradtools.keras_state.scopes import StateScope
from keras_gradtools.transforms import compiled

NAME = "dead_units"


def dead_units(model: keras.Model, x: Nested, training: bool = False) -> dict[str, np.ndarray]:
    r"""Finds the units that are zero on every example, in each layer with a ReLU-like activation.

    Where $\max(0, z)$ is zero, its slope is zero as well. A unit that is zero on all examples passes no gradient to its
    weights and does not recover. The layers considered are `ReLU` layers and layers with an `activation` that is zero
    for large negative numbers (`relu`, `relu6`, `hard_sigmoid`, ...). Activation functions that a model calls outside
    of a layer are not seen. A unit of a convolution is a channel, which is dead if it is zero at all positions. The
    channel axis follows the layer's `data_format`, or `keras.config.image_data_format()` for layers without one, such
    as `Activation` and `ReLU`, on images.

    Args:
        model: A built Keras model. For a wrapper of `kg.models`, the wrapped model is called.
        x: Examples of shape `(batch, ...)`, in the nested structure that the model takes. With few examples, live units
            may appear dead.
        training: Whether the model is called in training mode.

    Returns:
        A dict from the path of each such layer in the model to a boolean NumPy array of shape `(units,)`, in the order
        of the calls. The mean of the array is the fraction of dead units.

    Raises:
        ValueError: If the model is not built, or if an option is not valid.

    Cost:
        One call of the model. On TensorFlow and JAX it is compiled, and the program is cached on the model. The model
        is not changed.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(2, "relu", name="hidden")])
    >>> model.set_weights([np.array([[1.0, 1.0]]), np.array([0.0, -5.0])])
    >>> kg.diagnostics.dead_units(model, np.array([[1.0], [2.0]], "float32"))["hidden"].tolist()
    [False, True]

    Source: Maas, Hannun & Ng, "Rectifier nonlinearities improve neural network acoustic models" (2013), section 2.
    """
    model = require_model(NAME, model)
    training = validation.require_flag(NAME, "training", training)
    x = validation.require_examples(NAME, x)
    return zero_units(model, x, training, rectifying_layers(model))


def zero_units(model, x, training, rectifying):
    """`dead_units` without checks, for a model, tensors and the `rectifying_layers` of the model."""
    body = functools.partial(_zero_units, rectifying)
    zeros, names = compiled.run(NAME, model, body, ("zero", rectifying), (x,), {"training": training})
    return {name: ops.convert_to_numpy(is_zero) for name, is_zero in zip(names, zeros, strict=True)}


def _zero_units(rectifying, model, x, training):
    names = layer_names(model)
    found: dict = {}
    is_eager = compiled.may_run()

    def see(layer, args, kwargs, outputs):
        if id(layer) not in rectifying:
            return
        # A recurrent layer may return its states after its output.
        y = nesting.flatten(outputs)[0]
        axis = _axis_of_units(layer, len(y.shape))
        # In an eager run, tensors inside a loop that the framework traces have no values.
        if axis is None or (is_eager and layer_calls.array_of(y) is None):
            return
        others = tuple(a for a in range(len(y.shape)) if a != axis)
        # Not `ops.all`: before Keras 3.14, it accepts only one axis on torch.
        is_zero = ops.equal(ops.sum(ops.cast(ops.not_equal(y, 0), "int32"), axis=others), 0)
        name = names[id(layer)]
        # A unit of a layer that is called several times is dead if it is zero in all calls.
        if name in found and found[name].shape == is_zero.shape:
            is_zero = ops.logical_and(found[name], is_zero)
        found[name] = is_zero

    scope, seen = StateScope(), layer_calls.seen(model, see)
    with scope, scope, seen, seen:
        model(x, training=training)
    return list(found.values()), list(found)


def rectifying_layers(model):
    """The `id` of each layer that can have dead units. Activations are evaluated, so this must run eagerly."""
    layers = layers_of(model)
    # An activation that is itself a layer counts as part of the layer that owns it. The cell of a recurrent layer runs
    # in a loop whose intermediate values cannot be read.
    parts = {id(getattr(layer, "activation", None)) for layer in layers}
    parts |= {id(part) for layer in layers if isinstance(layer, keras.layers.RNN) for part in layers_of(layer.cell)}
    return frozenset(id(layer) for layer in layers if id(layer) not in parts and _is_rectifying(layer))


def _is_rectifying(layer):
    activation = layer.call if isinstance(layer, keras.layers.ReLU) else getattr(layer, "activation", None)
    if not callable(activation):
        return False
    try:
        values = activation(ops.convert_to_tensor([[-9.0, -8.0, -7.0]]))
        return not np.any(ops.convert_to_numpy(values))
    except Exception:  # a user's function that takes other arguments
        return False


def _axis_of_units(layer, rank):
    if rank < 2:
        return None
    data_format = getattr(layer, "data_format", None)
    if data_format is None and rank > 3:
        data_format = keras.config.image_data_format()
    return 1 if data_format == "channels_first" else rank - 1
