"""Which layers of a model have a second derivative on this backend, tried out before it is needed."""

import dataclasses

import keras
import numpy as np
from keras import ops

from keras_gradtools import backend, nesting, validation
from keras_gradtools.backend import layer_calls
from keras_gradtools.backend.state import StateScope
from keras_gradtools.finite_differences import GRADIENT, Point, Settings
from keras_gradtools.transforms.first_order import grad
from keras_gradtools.transforms.functional import functionalize
from keras_gradtools.transforms.second_order import hvp

# In single precision a second derivative by differences of gradients is this rough, and a wrong one is far off.
_RTOL = 0.05
_EXAMPLES = 2
_UNKNOWN_LENGTH = 8

VERDICTS = {
    "yes": "twice differentiable",
    "once": "differentiable once, and not twice",
    "wrong": "a second derivative that is not that of its gradient",
    "no": "no gradient at all",
    "constant": "nothing to differentiate",
}
# What is done about it, by what the error says; the first that fits.
_ADVICE = (
    ("cudnn", "Make it with `use_cudnn=False`, or call it on the processor."),
    ("flash", "Make it with `flash_attention=False`, or call it inside a tape or transform of keras_gradtools alone."),
    (
        "once_differentiable",
        "Write its gradient with `keras_gradtools.custom_gradient`, which can be differentiated again.",
    ),
    (
        "custom_gradient",
        "Write its gradient with `keras_gradtools.custom_gradient`, which can be differentiated again.",
    ),
    ("xla", "Compile with `jit_compile=False`."),
)
_ADVICE_BY_VERDICT = {
    "once": "Replace it. A penalty with `method='finite_difference'` takes no second derivative of it.",
    "wrong": "If it has a gradient of its own, write that with `keras_gradtools.custom_gradient` so that it can be "
    "differentiated; look for a `stop_gradient` in it.",
    "no": "Leave it out of what is differentiated: freeze it, or put a `stop_gradient` behind it.",
}


@dataclasses.dataclass(frozen=True)
class LayerVerdict:
    """What was found about one layer.

    Attributes:
        path: the layer's path in the model.
        layer_class: its class.
        verdict: one of `"yes"`, `"once"`, `"wrong"`, `"no"` and `"constant"` (no floating-point input or weight, or
            outputs that do not depend on them).
        message: what the backend said, or by how much the derivative is off; empty where it is right.
        advice: what to do about it; empty where nothing has to be done.
    """

    path: str
    layer_class: str
    verdict: str
    message: str = ""
    advice: str = ""

    def __str__(self):
        text = f"{self.path} ({self.layer_class}): {VERDICTS[self.verdict]}"
        details = " ".join(part for part in (self.message, self.advice) if part)
        return f"{text}. {details}" if details else text


@dataclasses.dataclass(frozen=True)
class PreflightReport:
    """What `preflight` found; printed, a sentence and one line for each layer that is not right.

    Attributes:
        model: the name of the model.
        backend: the backend that it was tried on.
        layers: a `LayerVerdict` for each layer, in the order in which they are called.
    """

    model: str
    backend: str
    layers: tuple

    @property
    def twice_differentiable(self):
        """Whether all layers have a second derivative."""
        return not self.problems

    @property
    def problems(self):
        """The verdicts of the layers that have none."""
        return tuple(layer for layer in self.layers if layer.verdict not in ("yes", "constant"))

    def __str__(self):
        what = f"{len(self.layers)} layer{'' if len(self.layers) == 1 else 's'} of {self.model!r} on {self.backend}"
        if self.twice_differentiable:
            return f"{what}: all of them can be differentiated twice."
        lines = [f"{what}: {len(self.problems)} cannot be differentiated twice.", *map(str, self.problems)]
        return "\n- ".join(lines)


def preflight(model, x=None, training=False, seed=0):
    r"""Says which layers of a model can be differentiated twice on this backend, and what to do about the others.

    The model is called once. With $f$ a layer as it was called, $c$ a random cotangent and $v$ a random direction, the
    product $\partial^2 (c \cdot f) / \partial z^2 \, v$ by its inputs and weights $z$ is computed, and compared with
    the central difference of the gradient: not only errors are found, but also derivatives that are silently wrong.

    Layers inside another layer that is no model (a cell, the layer in a wrapper) are tried as a part of it.

    Args:
        model: a built Keras model or layer.
        x: two or more examples to call it on; by default small random numbers in the shapes of `model.inputs` (ones
            for integers).
        training: whether to call it as in training.
        seed: of the random numbers.

    Returns:
        A `PreflightReport`: `report.twice_differentiable`, `report.problems`, and `print(report)`.

    Raises:
        ValueError: if there is no model, or nothing is known about its inputs and no `x` is given.

    Cost:
        Some thirty gradients of each layer, on a few examples. Nothing of the model changes.

    Example:

    >>> import keras
    >>> import keras_gradtools as kg
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "tanh"), keras.layers.Dense(1)], name="net")
    >>> report = kg.diagnostics.preflight(model)
    >>> report.twice_differentiable, [layer.verdict for layer in report.layers]
    (True, ['yes', 'yes'])

    Source: Griewank & Walther, "Evaluating Derivatives" (2008), section 3.3, on derivatives of derivative code.
    """
    if not isinstance(model, keras.Layer) or not model.built:
        what = f"the unbuilt model {model.name!r}" if isinstance(model, keras.Layer) else validation.describe(model)
        raise ValueError(f"preflight expects a built Keras model or layer. Received: {what}.")
    if not isinstance(training, bool):
        raise ValueError(f"preflight expects True or False as `training`. Received: {validation.describe(training)}.")
    random = np.random.default_rng(seed)
    inputs = _random_inputs(model, random) if x is None else nesting.map_structure(ops.convert_to_tensor, x)
    scope = StateScope()
    with scope, scope, layer_calls.recorded(model) as calls:
        model(inputs, training=training)
    verdicts = {}
    for call in _outermost(model, calls):
        # Of a layer that is called several times, the first call that is not right decides.
        key = id(call.layer)
        if key not in verdicts or verdicts[key].verdict == "yes":
            verdicts[key] = _tried(call, training, random)
    return PreflightReport(model.name, backend.name(), tuple(verdicts.values()))


def _random_inputs(model, random):
    # A functional model of a dict is called with one.
    inputs = getattr(model, "_inputs_struct", None)
    if inputs is None:
        inputs = getattr(model, "inputs", None) or []
        inputs = inputs[0] if len(inputs) == 1 else list(inputs)
    if not nesting.flatten(inputs):
        raise ValueError(
            f"preflight needs examples to call the model {model.name!r} on, whose inputs are not known. Received: "
            "x=None. Give it `x`, two examples or more."
        )

    def drawn(spec):
        shape = (_EXAMPLES, *(_UNKNOWN_LENGTH if n is None else n for n in spec.shape[1:]))
        dtype = keras.backend.standardize_dtype(spec.dtype)
        if not keras.backend.is_float_dtype(dtype):
            return ops.ones(shape, dtype=dtype)  # zeros may stand for padding
        return ops.convert_to_tensor(0.5 * random.standard_normal(shape), dtype=dtype)

    return nesting.map_structure(drawn, inputs)


def _outermost(model, calls):
    """The calls of layers that are neither models nor parts of another layer that is none."""
    inside = set()
    for layer in model._flatten_layers():
        if not isinstance(layer, keras.Model):
            inside |= {id(part) for part in layer._flatten_layers(include_self=False)}
    skipped = (keras.Model, keras.layers.InputLayer)
    return [call for call in calls if id(call.layer) not in inside and not isinstance(call.layer, skipped)]


def _tried(call, training, random):
    fun, weights = functionalize(call.layer)
    given = (call.args, {key: value for key, value in call.kwargs.items() if key != "training"})
    leaves = nesting.flatten(given)
    places = [i for i, leaf in enumerate(leaves) if _is_float_tensor(leaf)]
    values = [ops.stop_gradient(leaves[i]) for i in places]

    def called(values, weights):
        replaced = list(leaves)
        for place, value in zip(places, values, strict=True):
            replaced[place] = value
        args, kwargs = nesting.pack_as(given, replaced)
        outputs = fun(weights, *args, training=training, **kwargs)
        return [y for y in nesting.flatten(outputs) if _is_float_tensor(y)]

    shapes = [(y.shape, y.dtype) for y in called(values, weights)]
    cotangents = [ops.convert_to_tensor(random.standard_normal(shape), dtype=dtype) for shape, dtype in shapes]
    if not shapes or not (values or weights):
        return _verdict_on(call.layer, "constant")

    def scalar(values, weights):
        pairs = zip(called(values, weights), cotangents, strict=True)
        return sum(ops.sum(ops.cast(y * c, "float32")) for y, c in pairs)

    return _judged(call.layer, scalar, (values, weights), random)


def _judged(layer, scalar, primals, random):
    try:
        gradient = grad(scalar, argnums=(0, 1))(*primals)
    except Exception as error:
        return _failed(layer, "no", error)
    if not any(float(ops.max(ops.abs(g))) > 0 for g in nesting.flatten(gradient)):
        return _verdict_on(layer, "constant")
    settings = Settings.checked("preflight", _RTOL, None, None, int(random.integers(2**31)))
    point = Point(settings, grad(scalar, argnums=(0, 1)), primals, GRADIENT)
    v = point.direction()
    try:
        product = point.outputs.vector(hvp(scalar, primals, point.inputs.pack(v)))
    except Exception as error:
        return _failed(layer, "once", error)
    slope, noise = point.slope(v)
    # By its length: single elements of it may lie on a kink.
    off = np.linalg.norm(product - slope) - np.linalg.norm(noise)
    if off <= _RTOL * max(np.linalg.norm(slope), np.linalg.norm(product)):
        return _verdict_on(layer, "yes")
    share = off / (np.linalg.norm(slope) or off)
    return _verdict_on(layer, "wrong", f"It is off by {share:.2g} times its length.", _ADVICE_BY_VERDICT["wrong"])


def _failed(layer, verdict, error):
    message = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    everything = str(error).lower()
    advice = next((text for word, text in _ADVICE if word in everything), _ADVICE_BY_VERDICT[verdict])
    return _verdict_on(layer, verdict, message[:200].rstrip(".") + ".", advice)


def _verdict_on(layer, verdict, message="", advice=""):
    return LayerVerdict(layer_calls.path_of(layer), layer_calls.class_path(layer), verdict, message, advice)


def _is_float_tensor(x):
    return ops.is_tensor(x) and keras.backend.is_float_dtype(keras.backend.standardize_dtype(x.dtype))
