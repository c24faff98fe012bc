"""Tests whether a model is smooth enough for the exact penalty, and says why not."""

import concurrent.futures
import warnings
import weakref

import keras
import numpy as np
from keras import ops

from keras_gradtools import backend
from keras_gradtools.keras_state import layer_state, scopes
from keras_gradtools.tape.gradient_tape import GradientTape

# Layers whose kinks depend on their weights or inputs.
_KINKED_LAYERS = (
    "PReLU",
    "Maximum",
    "Minimum",
    "MaxPooling1D",
    "MaxPooling2D",
    "MaxPooling3D",
    "GlobalMaxPooling1D",
    "GlobalMaxPooling2D",
    "GlobalMaxPooling3D",
    "AdaptiveMaxPooling1D",
    "AdaptiveMaxPooling2D",
    "AdaptiveMaxPooling3D",
)
# Operations of a functional model with kinks that are not elementwise functions of one tensor. The elementwise ones
# are measured instead.
_KINKED_OPERATIONS = {
    "AdaptiveMaxPool",
    "Amax",
    "Amin",
    "Clip",
    "Fmax",
    "Fmin",
    "Max",
    "MaxPool",
    "Maximum",
    "Median",
    "Min",
    "Minimum",
    "Nanmax",
    "Nanmin",
    "Ptp",
    "Quantile",
    "Sort",
    "Sparsemax",
    "TopK",
}
# Activation layers that have kinks only for some of their parameters.
_ACTIVATION_LAYERS = ("ReLU", "LeakyReLU", "ELU")
# Layers of Keras that run foreign code.
_FOREIGN_LAYERS = ("Lambda", "TorchModuleWrapper", "TFSMLayer", "JaxLayer", "FlaxLayer")


def reasons_against_exact(model):
    """The reasons why the exact penalty would train `model` badly or not at all. Empty if there are none.

    Activations are examined if they are attributes of a layer or operations of a functional model. Other operations in
    the `call` of a layer are not seen. The second derivative is computed as a test only if some layers are not Keras'
    own.
    """
    layers = layer_state.layers_of(model)
    found = [(layer.name, kink) for layer in layers if (kink := _kink(layer))]
    functional = [layer for layer in layers if isinstance(layer, keras.Model) and hasattr(layer, "operations")]
    operations = [op for part in functional for op in part.operations if not isinstance(op, keras.Layer)]
    found += [
        (op.name, f"is {type(op).__name__!r}")
        for op in operations
        if type(op).__name__ in _KINKED_OPERATIONS or has_kink(op)
    ]
    reasons = [_summed_up(found)] if found else []
    if any(_is_foreign(layer) for layer in layers):
        missing = _remembered(_missing_second_derivative, model)
        reasons += [f"its second derivative failed: {missing}"] if missing else []
    return tuple(reasons)


def _summed_up(found):
    name, kink = found[0]
    others = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"{name!r} {kink}, which has kinks{others}"


def _kink(layer):
    """Says in what way `layer` is not smooth. Empty if it is smooth."""
    kind = type(layer).__name__
    if isinstance(layer, _classes(_KINKED_LAYERS)):
        return f"is {kind!r}"
    if isinstance(layer, _classes(_ACTIVATION_LAYERS)) and has_kink(layer):
        return f"is {kind!r}"
    for name, value in vars(layer).items():
        if "activation" in name and callable(value) and not isinstance(value, keras.Layer) and has_kink(value):
            return f"uses {getattr(value, '__name__', type(value).__name__)!r}"
    return ""


def _classes(names):
    # Not every supported version of Keras has all of them.
    return tuple(getattr(keras.layers, name) for name in names if hasattr(keras.layers, name))


def has_kink(activation):
    """Whether the slope of an elementwise function or layer jumps somewhere between -8 and 8.

    At a kink, second differences shrink linearly with the spacing, elsewhere quadratically. A function that cannot be
    called on one column of numbers counts as smooth.
    """
    return _remembered(_measured_kink, activation)


def _measured_kink(activation):
    # `call` instead of the layer itself, which would cast to its own precision.
    fun = getattr(activation, "call", activation)
    x = np.linspace(-8, 8, 513, dtype="float32")
    try:
        values = ops.convert_to_numpy(fun(ops.convert_to_tensor(x[:, None]))).astype("float64")
    except Exception:
        return False
    if values.shape != (513, 1):
        return False
    near, far = (np.abs(values[2 * k :] - 2 * values[k:-k] + values[: -2 * k]).max() for k in (1, 2))
    return bool(near > 1e-5 * np.abs(values).max() and far < 3.5 * near)


_memory: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _remembered(judge, subject):
    """`judge(subject)`, cached for each subject, since training does not change the result."""
    try:
        known = _memory.setdefault(subject, {})
    except TypeError:
        return _apart(judge, subject)
    if judge not in known:
        known[judge] = _apart(judge, subject)
    return known[judge]


def _apart(judge, subject):
    """`judge(subject)` on a separate thread: eagerly, outside of any active trace or tape, with warnings ignored."""
    with warnings.catch_warnings(action="ignore"), concurrent.futures.ThreadPoolExecutor(1) as executor:
        return executor.submit(judge, subject).result()


def _is_foreign(layer):
    if isinstance(layer, _classes(_FOREIGN_LAYERS)):
        return True
    return not isinstance(layer, keras.Model) and not type(layer).__module__.startswith("keras.")


def _missing_second_derivative(model):
    """The error of the second derivative if the first one exists. Empty if there is no error or it cannot be tried."""
    try:
        # A sequential model has its inputs in its internal functional model.
        inputs = keras.tree.map_structure(_example, getattr(model, "_functional", model).input)
        watched = [x for x in keras.tree.flatten(inputs) if keras.backend.is_float_dtype(x.dtype)]
    except Exception:
        return ""

    def once():
        _gradient_size(model, inputs, watched)

    def twice():
        with GradientTape() as tape:
            size = _gradient_size(model, inputs, watched)
        tape.gradient(size, model.trainable_variables)

    if _error_of(once) is not None:
        return ""
    error = _error_of(twice)
    return "" if error is None else (str(error).strip() or type(error).__name__).splitlines()[0]


def _error_of(fun):
    """The error of `fun()`, or None. It is usually found without computing anything."""
    try:
        # An eager run on JAX would compile each operation of the model separately, which takes a minute.
        backend.tried(fun)
    except Exception as error:
        if not backend.depends_on_values(error):
            return error
    else:
        return None
    try:
        fun()
    except Exception as error:
        return error
    return None


def _example(tensor):
    shape = [2, *(8 if n is None else n for n in tensor.shape[1:])]
    values = np.random.default_rng(0).uniform(0, 1, shape)
    return ops.convert_to_tensor(values.astype(tensor.dtype))


def _gradient_size(model, inputs, watched):
    """The squared norm of the gradient of the sum of squared outputs with respect to the inputs."""
    scope = scopes.StateScope()
    with scope, scope, GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(watched)
        outputs = keras.tree.flatten(model(inputs, training=False))
        size = sum(ops.sum(ops.square(y)) for y in outputs if keras.backend.is_float_dtype(y.dtype))
    gradients = tape.gradient(size, watched, unconnected_gradients="zero")
    return sum(ops.sum(ops.square(g)) for g in gradients)
