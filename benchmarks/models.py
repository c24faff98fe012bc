"""The models and data that the rows are measured on. Their weights come from NumPy: the same everywhere."""

import keras
import numpy as np
from keras import layers

CLASSES = 10


def _mlp():
    # Smooth activations: the second derivative of a ReLU is zero, and double backward would be too cheap.
    hidden = [layers.Dense(512, activation="tanh") for _ in range(3)]
    return keras.Sequential([layers.Input((256,)), *hidden, layers.Dense(CLASSES)])


def _conv_net():
    return keras.Sequential(
        [
            layers.Input((28, 28, 1)),
            layers.Conv2D(16, 3, padding="same", activation="tanh"),
            layers.AveragePooling2D(2),
            layers.Conv2D(32, 3, padding="same", activation="tanh"),
            layers.AveragePooling2D(2),
            layers.Flatten(),
            layers.Dense(CLASSES),
        ]
    )


def _demo():
    from examples import demo

    return demo.build_classifier()


_MODELS = {"MLP": _mlp, "conv net": _conv_net, "demo's model": _demo}


def build(name):
    model = _MODELS[name]()
    random = np.random.default_rng(0)
    shapes = [w.shape for w in model.get_weights()]
    model.set_weights([random.normal(size=s) / np.sqrt(max(np.prod(s[:-1]), 1)) for s in shapes])
    return model


def data(model, batch):
    """Returns random inputs and labels, as NumPy arrays."""
    random = np.random.default_rng(1)
    x = random.normal(size=(batch, *model.input_shape[1:])).astype("float32")
    return x, random.integers(0, CLASSES, size=(batch,)).astype("int32")


def loss(labels, logits):
    """The mean cross-entropy, in the very same Keras operations for our code and the hand-written one."""
    return keras.ops.mean(keras.ops.sparse_categorical_crossentropy(labels, logits, from_logits=True))
