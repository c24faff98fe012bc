"""Which layers of a model have a second derivative on this backend, tried out before it is needed."""

import dataclasses

import keras
import numpy as np
from keras import ops

from keras_gradtools import backend, nesting, validation
from keras_gradtools.backend import layer_calls
from keras_gradtools.backend.state import StateScope
from keras_gradtools.curvature.progress import Progress
from keras_gradtools.diagnostics.layer_likeness import likeness
from keras_gradtools.diagnostics.layer_trial import tried
from keras_gradtools.diagnostics.layer_verdict import PreflightReport

_EXAMPLES = 2
_UNKNOWN_LENGTH = 8
# From the least to the most that is said of a layer; what depends on the numbers, which like layers do not share.
_ORDER = ("constant", "yes", "unclear", "wrong", "once", "no")
_BY_NUMBERS = ("constant", "unclear")


def preflight(model, x=None, training=False, seed=0, verbose="auto"):
    r"""Says which layers of a model can be differentiated twice on this backend, and what to do about the others.

    The model is called once. With $f$ a layer as it was called, $c$ a random cotangent and $v$ a random direction of
    the size of the arguments, the product $\partial^2 (c \cdot f) / \partial z^2 \, v$ by its inputs and weights $z$
    is computed, and compared with central differences of the gradient: not only errors are found, but also derivatives
    that are silently wrong, by more than 1 per cent in single precision. Where the differences do not converge when
    their step is halved, as at a kink, or where a layer decides by its values, the verdict is `"unclear"`.

    Layers inside another layer that is no model (a cell, the layer in a wrapper) are tried as a part of it. Layers that
    differ in their numbers alone are tried once. A layer that computes in half precision is compared in single
    precision.

    Args:
        model: a built Keras model or layer.
        x: two or more examples to call it on; by default small random numbers in the shapes of `model.inputs` (ones
            for integers). Lengths that are not known there are taken for 8, and the report says so.
        training: whether to call it as in training.
        seed: of the random numbers.
        verbose: 1 for a progress bar, 0 for none, `"auto"` for one where it takes long.

    Returns:
        A `PreflightReport`: `report.twice_differentiable`, `report.problems`, `report.unclear`, and `print(report)`.

    Raises:
        ValueError: if there is no model, or nothing is known about its inputs and no `x` is given.

    Cost:
        Some twelve gradients of each layer, on a few examples; a hundred of one that is accused. Nothing of the model
        changes.

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
    validation.require_seed("preflight", seed)
    if not validation.is_one_of(verbose, ("auto", 0, 1)):
        raise ValueError(
            f"preflight expects 'auto', 0 or 1 as `verbose`. Received: verbose={validation.shown(verbose)}."
        )
    # A stream of its own: examples that were drawn with the same seed would be the cotangents, too.
    random = np.random.default_rng(np.random.SeedSequence(seed).spawn(1)[0])
    inputs, note = (_examples(x), "") if x is not None else _drawn(model, random)
    scope = StateScope()
    with scope, scope, layer_calls.recorded(model) as calls:
        model(inputs, training=training)
    verdicts, known = {}, {}
    calls = _outermost(model, calls)
    with Progress(len(calls), f"preflight of {model.name!r}", verbose, unit="layer") as progress:
        for call in calls:
            # Of a layer that is called several times, the worst call decides.
            key, found = id(call.layer), _known_or_tried(call, known, training, random)
            if key not in verdicts or _ORDER.index(found.verdict) > _ORDER.index(verdicts[key].verdict):
                verdicts[key] = found
            progress.update()
    return PreflightReport(model.name, backend.name(), tuple(verdicts.values()), note)


def _known_or_tried(call, known, training, random):
    kind = likeness(call)
    if kind not in known:
        verdict = tried(call, training, random)
        if verdict.verdict in _BY_NUMBERS:
            return verdict
        known[kind] = verdict
    path = layer_calls.path_of(call.layer)
    return dataclasses.replace(known[kind], path=path)


def _examples(x):
    tensors = validation.as_tensors("preflight", "x", x)
    if any(not len(leaf.shape) for leaf in nesting.flatten(tensors)):
        raise ValueError(f"preflight expects examples of shape (batch, ...) as `x`. Received: {validation.shown(x)}.")
    return tensors


def _drawn(model, random):
    """Random inputs of a model, and what was assumed about them."""
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

    unknown = [spec for spec in nesting.flatten(inputs) if None in spec.shape[1:]]
    note = ""
    if unknown:
        shapes = ", ".join(f"{tuple(spec.shape)} of {spec.name!r}" for spec in unknown)
        note = f"Unknown lengths were taken for {_UNKNOWN_LENGTH}: {shapes}. Give it `x` for others."
    return nesting.map_structure(drawn, inputs), note


def _outermost(model, calls):
    """The calls of layers that are neither models nor parts of another layer that is none."""
    inside = set()
    for layer in model._flatten_layers():
        if not isinstance(layer, keras.Model):
            inside |= {id(part) for part in layer._flatten_layers(include_self=False)}
    skipped = (keras.Model, keras.layers.InputLayer)
    return [call for call in calls if id(call.layer) not in inside and not isinstance(call.layer, skipped)]
