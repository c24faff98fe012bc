"""Errors of second derivatives through Keras' normalization layers, with TensorFlow's own nested tapes and with ours.

Run it as `KERAS_BACKEND=tensorflow python -m benchmarks.normalization_layers`. For a small network with each layer, the
product of the Hessian with a random vector, with respect to all weights and to the examples, is compared with central
differences of the gradient in double precision. On JAX and torch, which have no nested tapes, only ours is shown.
"""

import keras
import numpy as np
from keras import layers, ops

LAYERS = {
    "LayerNormalization": lambda: layers.LayerNormalization(),
    "GroupNormalization": lambda: layers.GroupNormalization(2),
    "BatchNormalization, training": lambda: layers.BatchNormalization(),
    "RMSNormalization": lambda: layers.RMSNormalization(),
    "UnitNormalization": lambda: layers.UnitNormalization(),
}
STEP = 1e-5


def network(make):
    keras.utils.set_random_seed(0)
    parts = [keras.Input((6,)), layers.Dense(8, "tanh"), make(), layers.Dense(4, "tanh"), layers.Dense(1)]
    return keras.Sequential(parts)


def loss_of(model, x):
    return ops.mean(ops.square(model(x, training=True) - 1.0))


def differences(sources, v, gradient):
    """Central differences of the gradient along v."""
    start = [np.array(ops.convert_to_numpy(w)) for w in sources]

    def gradient_at(h):
        for w, value, direction in zip(sources, start, v, strict=True):
            w.assign(value + h * direction)
        return gradient()

    found = (gradient_at(STEP) - gradient_at(-STEP)) / (2 * STEP)
    gradient_at(0.0)
    return found


def flat(tensors):
    return np.concatenate([ops.convert_to_numpy(t).ravel() for t in tensors])


def error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def by_tapes(tape, model, x, weights, v):
    """The product by two nested tapes of the class `tape`, and a function that returns the gradient."""

    def gradient():
        with tape() as only:
            loss = loss_of(model, x)
        return flat(only.gradient(loss, weights))

    with tape() as outer:
        with tape() as inner:
            loss = loss_of(model, x)
        slope = sum(ops.sum(g * d) for g, d in zip(inner.gradient(loss, weights), v, strict=True))
    return flat(outer.gradient(slope, weights)), gradient


def by_tensorflow(model, x, sources, v):
    import tensorflow as tf

    return by_tapes(tf.GradientTape, model, x, [w.value for w in sources], v)


def by_keras_gradtools(model, x, sources, v):
    import keras_gradtools as kg

    return by_tapes(kg.GradientTape, model, x, sources, v)


def main():
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    random = np.random.default_rng(0)
    x = keras.Variable(random.normal(size=(16, 6)))
    # TensorFlow's tapes come first: importing keras_gradtools fixes Keras for them, too.
    columns = {"keras_gradtools": by_keras_gradtools}
    if keras.config.backend() == "tensorflow":
        columns = {"TensorFlow's tapes": by_tensorflow} | columns
    errors = {name: {} for name in LAYERS}
    for column, product in columns.items():
        for name, make in LAYERS.items():
            model = network(make)
            for by, sources in (("weights", model.trainable_variables), ("examples", [x])):
                v = [random.normal(size=w.shape) for w in sources]
                found, gradient = product(model, x, sources, v)
                errors[name][f"{column}, {by}"] = error(found, differences(sources, v, gradient))
    names = list(errors["LayerNormalization"])
    print(f"{'relative error of H v':30}" + "".join(f"{name:>30}" for name in names))
    for name, row in errors.items():
        print(f"{name:30}" + "".join(f"{row[column]:30.2g}" for column in names))


if __name__ == "__main__":
    main()
