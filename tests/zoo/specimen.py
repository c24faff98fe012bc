"""What a model of the zoo is tried on: the model, a batch for it, and a loss."""

import zlib
from typing import Any, NamedTuple

import keras
import numpy as np

BATCH, LENGTH, TOKENS, CLASSES = 3, 5, 12, 2


class Specimen(NamedTuple):
    """A built model with a batch of examples, labels and a loss; `compile` takes the loss.

    `has_slopes` is False where derivatives are, on purpose, not those of the values: behind a straight-through step.
    """

    model: Any
    x: Any
    y: Any
    loss: Any
    has_slopes: bool = True

    @property
    def has_float_inputs(self):
        return any(a.dtype.kind == "f" for a in keras.tree.flatten(self.x))


def classifier(features, lengths=None):
    """A `Specimen` that classifies by what a functional model returns."""
    outputs = features.output
    if isinstance(outputs, dict):
        names = ("sequence_output", "decoder_sequence_output", "P5", *outputs)
        outputs = outputs[next(name for name in names if name in outputs)]
    if isinstance(outputs, (list, tuple)):
        outputs = outputs[0]
    pooling = {3: keras.layers.GlobalAveragePooling1D, 4: keras.layers.GlobalAveragePooling2D}
    if len(outputs.shape) in pooling:
        # Masks of padding would make the mean one over fewer positions, which is not the subject here.
        outputs = pooling[len(outputs.shape)]()(keras.layers.Identity()(outputs))
    logits = keras.layers.Dense(CLASSES, name="zoo_head")(outputs)
    return of_functional(keras.Model(features.input, logits, name=features.name), lengths)


def of_functional(model, lengths=None):
    """A `Specimen` of a model that returns logits, on random examples in the shapes of its inputs."""
    x = keras.tree.map_structure(lambda spec: _drawn(spec, lengths or {}), model.input)
    return Specimen(model, x, np.arange(BATCH, dtype="int32") % CLASSES, cross_entropy())


def cross_entropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def _drawn(spec, lengths):
    length = lengths.get(spec.name, LENGTH)
    shape = (BATCH, *(length if n is None else n for n in spec.shape[1:]))
    # The name makes another draw of each input.
    random = np.random.default_rng(zlib.crc32(spec.name.encode()) % 1000)
    dtype = keras.backend.standardize_dtype(spec.dtype)
    if keras.backend.is_float_dtype(dtype):
        return random.normal(size=shape).astype(dtype)
    if "mask" in spec.name:
        mask = np.ones(shape, dtype)
        mask[0, -1] = 0
        return mask
    if "segment" in spec.name:
        return random.integers(0, 2, shape).astype(dtype)
    return random.integers(1, TOKENS, shape).astype(dtype)
