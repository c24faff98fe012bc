"""The models and data of the benchmarks. The weights are drawn with NumPy, so that they are equal on all backends."""

import keras
import numpy as np
from keras import layers

CLASSES = 10


def _mlp():
    # Smooth activations, because the second derivative of a ReLU is zero, which would make double backward too cheap.
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


def _image_conv_net(activation, pooling):
    """A model large enough for computation to dominate."""
    return keras.Sequential(
        [
            layers.Input((32, 32, 3)),
            layers.Conv2D(32, 3, padding="same", activation=activation),
            pooling(2),
            layers.Conv2D(64, 3, padding="same", activation=activation),
            pooling(2),
            layers.Flatten(),
            layers.Dense(64, activation=activation),
            layers.Dense(CLASSES),
        ]
    )


def _wide_mlp():
    # The shape of an MLP on MNIST.
    return keras.Sequential([layers.Input((784,)), layers.Dense(512, activation="tanh"), layers.Dense(CLASSES)])


def _small_mlp():
    # The Hessian with respect to the kernel between the hidden layers has 1024 rows.
    hidden = [layers.Dense(32, activation="tanh") for _ in range(2)]
    return keras.Sequential([layers.Input((64,)), *hidden, layers.Dense(CLASSES)])


def _digits_classifier():
    # 2,410 weights.
    return keras.Sequential([layers.Input((64,)), layers.Dense(32, activation="tanh"), layers.Dense(CLASSES)])


def _decoder():
    # Many more outputs than inputs, so that forward mode is cheaper.
    hidden = [layers.Dense(512, activation="tanh") for _ in range(2)]
    return keras.Sequential([layers.Input((16,)), *hidden, layers.Dense(1024)])


def _tanh_network(*units):
    hidden = [layers.Dense(n, activation="tanh") for n in units[1:-1]]
    return keras.Sequential([layers.Input((units[0],)), *hidden, layers.Dense(units[-1])])


def _tiny_conv_net():
    hidden = [layers.Conv2D(8, 3, activation="silu") for _ in range(2)]
    parts = [layers.Input((16, 16, 3)), *hidden, layers.GlobalAveragePooling2D(), layers.Dense(CLASSES)]
    return keras.Sequential(parts)


def _attention():
    x = keras.Input((16, 32))
    y = layers.LayerNormalization()(x + layers.MultiHeadAttention(4, 8)(x, x))
    return keras.Model(x, layers.Dense(CLASSES)(layers.GlobalAveragePooling1D()(y)))


def _guide(*units, activation):
    """The models of TensorFlow's guide "Advanced automatic differentiation"."""
    return keras.Sequential([layers.Input((5,)), *(layers.Dense(n, activation=activation) for n in units)])


def _demo():
    from examples import demo

    return demo.build_classifier()


_MODELS = {
    "MLP": _mlp,
    "conv net": _conv_net,
    "image conv net": lambda: _image_conv_net("tanh", layers.AveragePooling2D),
    "image conv net, ReLU": lambda: _image_conv_net("relu", layers.MaxPooling2D),
    "wide MLP": _wide_mlp,
    "small MLP": _small_mlp,
    "digits classifier": _digits_classifier,
    "decoder": _decoder,
    "demo's model": _demo,
    # Models of `three_backends`, small enough that fixed costs count.
    "MLP 32-128-128-10": lambda: _tanh_network(32, 128, 128, CLASSES),
    "MLP 64-512-512-10": lambda: _tanh_network(64, 512, 512, CLASSES),
    "MLP 64-32-32-10": _small_mlp,
    "network 10-64-64-64-1": lambda: _tanh_network(10, 64, 64, 64, 1),
    "conv net 16x16x3": _tiny_conv_net,
    "attention 16x32": _attention,
    "guide's layer": lambda: _guide(10, activation="relu"),
    "guide's layers, ELU": lambda: _guide(8, 6, activation="elu"),
    "guide's layers, ReLU": lambda: _guide(8, 6, activation="relu"),
}
# In "small MLP": the layer whose kernel Hessian is computed, and the position of its kernel among the weights.
HESSIAN_LAYER, HESSIAN_KERNEL = 1, 2
# Number of rows of a Hessian at a time, if it is computed in chunks. This is about the fastest on every backend.
HESSIAN_CHUNK = 64


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


def direction(model):
    """Returns the vector that products multiply by: one tensor for each trainable variable."""
    random = np.random.default_rng(2)
    shapes = [tuple(v.shape) for v in model.trainable_variables]
    return [keras.ops.convert_to_tensor(random.normal(size=s).astype("float32")) for s in shapes]


def loss(labels, logits):
    """The mean cross-entropy, by the same Keras operations for our code and the hand-written code."""
    return keras.ops.mean(keras.ops.sparse_categorical_crossentropy(labels, logits, from_logits=True))
