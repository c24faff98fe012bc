"""Units of ReLU layers that are zero on all examples, and learn nothing."""

import functools

import keras
import numpy as np
from keras import ops

from keras_gradtools import nesting, validation
from keras_gradtools.backend import layer_calls
from keras_gradtools.backend.state import StateScope, layers_of
from keras_gradtools.curvature.batch_loss import checked_model
from keras_gradtools.diagnostics.layer_names import layer_names
from keras_gradtools.transforms import compiled

NAME = "dead_units"


def dead_units(model, x, training=False):
    r"""The units that are zero on every example, for each layer whose activation is zero over a range.

    Where $\max(0, z)$ is zero its slope is, too: a unit that is zero everywhere passes no gradient to its weights, and
    nothing brings it back. The layers that are looked at have an `activation`, or are a `ReLU`, which is zero on large
    negative numbers (`relu`, `relu6`, `hard_sigmoid`, ...); functions that a model calls without a layer are not seen.
    A unit of a convolution is a channel, and is dead where all its places are zero. `data_format` says which axis that
    is; for `Activation` and `ReLU` on images, `keras.config.image_data_format()`.

    Args:
        model: a built Keras model. Of a wrapper of `kg.models`, the wrapped one is called.
        x: the examples, of shape `(batch, ...)`, nested as the model takes them. The more, the surer the verdict.
        training: the mode in which the model is called.

    Returns:
        A dict with a boolean NumPy array of shape `(units,)` for each such layer, by its path in the model, in the
        order of the calls. Its mean is the share of dead units.

    Raises:
        ValueError: without a built model, or for an option that does not fit.

    Cost:
        One call of the model, compiled on TensorFlow and JAX, and kept with it. Nothing in the model changes.

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
    model = checked_model(NAME, model)
    if not isinstance(training, bool):
        raise ValueError(f"{NAME} expects True or False as `training`. Received: {validation.describe(training)}.")
    x = validation.as_tensors(NAME, "x", x)
    if any(not len(leaf.shape) for leaf in nesting.flatten(x)):
        raise ValueError(f"{NAME} expects examples of shape (batch, ...) as `x`. Received: {validation.shown(x)}.")
    return zero_units(model, x, training, rectifying_layers(model))


def zero_units(model, x, training, rectifying):
    """The same, of a model and tensors that are known to fit, and of the `rectifying_layers`."""
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
        # Behind it a recurrent layer returns its states.
        y = nesting.flatten(outputs)[0]
        axis = _axis_of_units(layer, len(y.shape))
        # What a loop of the framework traces, inside of what runs eagerly, has no values.
        if axis is None or (is_eager and layer_calls.array_of(y) is None):
            return
        others = tuple(a for a in range(len(y.shape)) if a != axis)
        # Not `ops.all`, which takes one axis on torch before Keras 3.14.
        is_zero = ops.equal(ops.sum(ops.cast(ops.not_equal(y, 0), "int32"), axis=others), 0)
        name = names[id(layer)]
        # A layer that is called twice is dead where it is in both.
        if name in found and found[name].shape == is_zero.shape:
            is_zero = ops.logical_and(found[name], is_zero)
        found[name] = is_zero

    scope, seen = StateScope(), layer_calls.seen(model, see)
    with scope, scope, seen, seen:
        model(x, training=training)
    return list(found.values()), list(found)


def rectifying_layers(model):
    """The `id` of each layer that can have dead units. Its activations are tried out, which takes values."""
    layers = layers_of(model)
    # Where an activation is itself a layer, it is part of the one that has it. The cell of a recurrent layer runs in
    # a loop, from which nothing but its outputs comes out.
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
    except Exception:  # one of the user's, which takes something else
        return False


def _axis_of_units(layer, rank):
    if rank < 2:
        return None
    data_format = getattr(layer, "data_format", None)
    if data_format is None and rank > 3:
        data_format = keras.config.image_data_format()
    return 1 if data_format == "channels_first" else rank - 1
