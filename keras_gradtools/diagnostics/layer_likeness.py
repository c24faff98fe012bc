"""Detects layer calls that differ only in numeric values, so that `layer_derivatives` has to try only one of them."""

import collections.abc
import functools
import types

import keras
import numpy as np
from keras import ops

from keras_gradtools import nesting, validation

# Attributes of a layer that its derivatives do not depend on.
_WITHOUT_INFLUENCE = (keras.initializers.Initializer, keras.regularizers.Regularizer, keras.constraints.Constraint)


def likeness(call):
    """A key of a `LayerCall`. Calls with equal keys compute the same function, up to the values of their tensors.

    The key is made of the attributes of the layer and of its sublayers. An object of an unknown type equals only
    itself, so in doubt two layers differ.
    """
    layer = call.layer
    arguments = tuple(map(_argument, nesting.flatten((call.args, call.kwargs))))
    structure = repr(nesting.map_structure(lambda _: "*", (call.args, call.kwargs)))
    return structure, arguments, tuple(map(_layer, layer._flatten_layers()))


def _argument(x):
    if ops.is_tensor(x):
        return validation.dtype_of(x), tuple(x.shape)
    return _value(x, 0)


def _layer(layer):
    # TensorFlow stores its tracking data in attributes with the prefix `_self_`.
    names = [name for name in vars(layer) if name not in _attributes_of_any_layer() and not name.startswith("_self_")]
    own = {name: vars(layer)[name] for name in names}
    policy = layer.dtype_policy.name
    variables = tuple((*_value(v, 0), v.trainable) for v in layer.variables)
    return type(layer), policy, variables, _value(own, 0)


@functools.cache
def _attributes_of_any_layer():
    return frozenset(vars(keras.layers.Layer())) | {"_build_shapes_dict", "_input_spec"}


def _value(x, depth):
    if x is None or isinstance(x, (bool, int, float, complex, str, bytes, np.dtype)):
        return type(x), x
    if depth > 8:
        return id(x)
    if isinstance(x, keras.Variable):
        return validation.dtype_of(x), tuple(x.shape)
    if isinstance(x, keras.Layer):
        return type(x)
    if isinstance(x, (*_WITHOUT_INFLUENCE, keras.InputSpec, keras.random.SeedGenerator, keras.DTypePolicy)):
        return type(x)
    if isinstance(x, collections.abc.Mapping):
        return type(x), tuple((key, _value(y, depth + 1)) for key, y in x.items())
    if isinstance(x, (list, tuple, set, frozenset)):
        return type(x), tuple(_value(y, depth + 1) for y in x)
    if isinstance(x, types.MethodType):
        return id(x.__func__), _value(x.__self__, depth + 1)
    return id(x)
