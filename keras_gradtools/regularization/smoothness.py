"""Whether a model is smooth enough for the exact penalty to train it, and if not, why."""

import concurrent.futures
import warnings
import weakref

import keras
import numpy as np
from keras import ops

from keras_gradtools import backend
from keras_gradtools.backend import state
from keras_gradtools.tape import GradientTape

# Layers and operations with kinks wherever their parameters put them.
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
# Operations of a functional model that are not elementwise; those that are get measured.
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
# Activations that are layers, and depend on their parameters.
_ACTIVATION_LAYERS = ("ReLU", "LeakyReLU", "ELU")
# Keras' own layers that run code of somebody else.
_FOREIGN_LAYERS = ("Lambda", "TorchModuleWrapper", "TFSMLayer", "JaxLayer", "FlaxLayer")


def reasons_against_exact(model):
    """Why the exact penalty would train `model` badly or not at all: texts, none where nothing speaks against it.

    Activations are looked at wherever a layer has them as an attribute, and as operations of a functional model; what
    the `call` of a layer does by itself is not seen. Second derivatives are tried out where layers are not Keras' own.
    """
    layers = state.layers_of(model)
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
    """In what way `layer` is not smooth; empty if it is."""
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
    # Some are not in every supported Keras.
    return tuple(getattr(keras.layers, name) for name in names if hasattr(keras.layers, name))


def has_kink(activation):
    """Whether the slope of an elementwise function or layer jumps somewhere between -8 and 8.

    At a kink, second differences shrink as the spacing does, elsewhere as its square. What cannot be called on one
    column of numbers is taken for smooth.
    """
    return _remembered(_measured_kink, activation)


def _measured_kink(activation):
    # Not the layer itself, which casts to its own precision.
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
    """`judge(subject)`, found out once for each subject: trained on, a model does not change in these respects."""
    try:
        known = _memory.setdefault(subject, {})
    except TypeError:
        return _apart(judge, subject)
    if judge not in known:
        known[judge] = _apart(judge, subject)
    return known[judge]


def _apart(judge, subject):
    """Runs on a thread of its own: eagerly, whatever is traced or recorded around it, and without its warnings."""
    with warnings.catch_warnings(action="ignore"), concurrent.futures.ThreadPoolExecutor(1) as executor:
        return executor.submit(judge, subject).result()


def _is_foreign(layer):
    if isinstance(layer, _classes(_FOREIGN_LAYERS)):
        return True
    return not isinstance(layer, keras.Model) and not type(layer).__module__.startswith("keras.")


def _missing_second_derivative(model):
    """The error of a second derivative where a first one exists; empty without one, or where it cannot be tried."""
    try:
        # A sequential model keeps its inputs in the functional one that it is made of.
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
    """The error of `fun()`, mostly found without computing anything; None if there is none."""
    try:
        # Run eagerly, each operation of a model would be compiled for itself on JAX, which takes a minute.
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
    """The squared norm of the gradient of the outputs' squares by the inputs."""
    scope = state.StateScope()
    with scope, scope, GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(watched)
        outputs = keras.tree.flatten(model(inputs, training=False))
        size = sum(ops.sum(ops.square(y)) for y in outputs if keras.backend.is_float_dtype(y.dtype))
    gradients = tape.gradient(size, watched, unconnected_gradients="zero")
    return sum(ops.sum(ops.square(g)) for g in gradients)
