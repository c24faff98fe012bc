"""Tests which layers of a model can be differentiated twice on the current backend."""

import dataclasses

import keras
import numpy as np
from keras import ops

from keras_gradtools import backend, nesting, validation
from keras_gradtools.annotations import Nested, Verbose
from keras_gradtools.diagnostics.layer_likeness import likeness
from keras_gradtools.diagnostics.layer_trial import tried
from keras_gradtools.diagnostics.layer_verdict import LayerDerivatives
from keras_gradtools.display.progress import Progress
from keras_gradtools.keras_state import layer_calls
from keras_gradtools.keras_state.scopes import StateScope

_EXAMPLES = 2
_UNKNOWN_LENGTH = 8
# Verdicts in ascending priority, and those that depend on the values, so that they do not hold for similar layers.
_ORDER = ("constant", "zero", "yes", "unclear", "wrong", "once", "no")
_BY_NUMBERS = ("constant", "unclear")


def layer_derivatives(
    model: keras.Layer, x: Nested = None, training: bool = False, *, seed: int = 0, verbose: Verbose = "auto"
) -> LayerDerivatives:
    r"""Tests which layers of a model can be differentiated twice on this backend, and gives advice on the others.

    The model is called once. For each call $f$ of a layer with inputs and weights $z$, a random cotangent $c$ and a
    random direction $v$ of the size of the arguments, the product $\partial^2 (c \cdot f) / \partial z^2 \, v$ is
    compared with central differences of the gradient. This finds derivatives that raise an error, and those that are
    silently wrong by more than 1% (in single precision). If the differences do not converge as their step is halved,
    for example at a kink or in a layer that branches on its values, the verdict is `"unclear"`. A layer whose
    operations are linear except at kinks, such as ReLU and max pooling, gets the verdict `"zero"`.

    A layer inside another layer that is not a model, such as the cell of a recurrent layer or the layer in a wrapper,
    is tested as a part of it. Layers that differ only in their values are tested once. A layer that computes in half
    precision is compared in single precision.

    Args:
        model: A built Keras model or layer.
        x: Two or more examples to call the model on. By default, small random numbers in the shapes of `model.inputs`,
            and ones for integer inputs. Unknown lengths are then set to 8, and the report says so.
        training: Whether the model is called in training mode.
        seed: An integer that seeds the random numbers.
        verbose: 1 for a progress bar, 0 for none, `"auto"` for one if it takes long.

    Returns:
        A `LayerDerivatives` with the attributes `twice_differentiable`, `problems`, `unclear` and `zero`. Print it for
        a report in words.

    Raises:
        ValueError: If `model` is not a built Keras model or layer, or if its inputs are not known and `x` is not given.

    Cost:
        About twelve gradients of each layer on a few examples, and a hundred of a layer whose derivative is wrong. The
        model is not changed.

    Example:

    >>> import keras
    >>> import keras_gradtools as kg
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "tanh"), keras.layers.Dense(1)], name="net")
    >>> report = kg.diagnostics.layer_derivatives(model)
    >>> report.twice_differentiable, [layer.verdict for layer in report.layers]
    (True, ['yes', 'yes'])

    Source: Griewank & Walther, "Evaluating Derivatives" (2008), section 3.3, on derivatives of derivative code.
    """
    if not isinstance(model, keras.Layer):
        raise validation.refused("layer_derivatives", "a Keras model or layer", "model", model)
    validation.require_built("layer_derivatives", model)
    training = validation.require_flag("layer_derivatives", "training", training)
    validation.require_seed("layer_derivatives", seed)
    validation.require_verbose("layer_derivatives", verbose)
    # Spawned, because examples that the user drew with the same seed would equal the cotangents.
    random = np.random.default_rng(np.random.SeedSequence(seed).spawn(1)[0])
    inputs, note = (validation.require_examples("layer_derivatives", x), "") if x is not None else _drawn(model, random)
    scope = StateScope()
    with scope, scope, layer_calls.recorded(model) as calls:
        model(inputs, training=training)
    verdicts, known = {}, {}
    calls = _outermost(model, calls)
    with Progress(len(calls), f"layer_derivatives of {model.name!r}", verbose, unit="layer") as progress:
        for call in calls:
            # For a layer that is called several times, the worst verdict counts.
            key, found = id(call.layer), _known_or_tried(call, known, training, random)
            if key not in verdicts or _ORDER.index(found.verdict) > _ORDER.index(verdicts[key].verdict):
                verdicts[key] = found
            progress.update()
    return LayerDerivatives(model.name, backend.name(), tuple(verdicts.values()), note)


def _known_or_tried(call, known, training, random):
    kind = likeness(call)
    if kind not in known:
        verdict = tried(call, training, random)
        if verdict.verdict in _BY_NUMBERS:
            return verdict
        known[kind] = verdict
    path = layer_calls.path_of(call.layer)
    return dataclasses.replace(known[kind], path=path)


def _drawn(model, random):
    """Random inputs of a model, and a note on the lengths that were assumed."""
    # A functional model takes the nested structure that it was built with, for example a dict.
    inputs = getattr(model, "_inputs_struct", None)
    if inputs is None:
        inputs = getattr(model, "inputs", None) or []
        inputs = inputs[0] if len(inputs) == 1 else list(inputs)
    if not nesting.flatten(inputs):
        raise ValueError(
            f"layer_derivatives needs examples to call the model {model.name!r} on, whose inputs are not known. "
            "Received: x=None. Pass two or more examples as `x`."
        )

    def drawn(spec):
        shape = (_EXAMPLES, *(_UNKNOWN_LENGTH if n is None else n for n in spec.shape[1:]))
        dtype = keras.backend.standardize_dtype(spec.dtype)
        if not keras.backend.is_float_dtype(dtype):
            return ops.ones(shape, dtype=dtype)  # zeros may mean padding
        return ops.convert_to_tensor(0.5 * random.standard_normal(shape), dtype=dtype)

    unknown = [spec for spec in nesting.flatten(inputs) if None in spec.shape[1:]]
    note = ""
    if unknown:
        shapes = ", ".join(f"{tuple(spec.shape)} of {spec.name!r}" for spec in unknown)
        note = f"Unknown lengths were set to {_UNKNOWN_LENGTH}: {shapes}. Pass `x` for other lengths."
    return nesting.map_structure(drawn, inputs), note


def _outermost(model, calls):
    """The calls of layers that are not models and not parts of another layer that is not a model."""
    inside = set()
    for layer in model._flatten_layers():
        if not isinstance(layer, keras.Model):
            inside |= {id(part) for part in layer._flatten_layers(include_self=False)}
    skipped = (keras.Model, keras.layers.InputLayer)
    return [call for call in calls if id(call.layer) not in inside and not isinstance(call.layer, skipped)]
