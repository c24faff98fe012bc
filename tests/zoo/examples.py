"""Models of the kinds that Keras' public examples show, small, in our own words."""

import keras
import numpy as np
from keras import layers, ops

from tests.zoo.specimen import BATCH, Specimen, classifier, of_functional


class GraphAttention(layers.Layer):
    """Each node's mean of its neighbours, weighted by an attention between the two."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units

    def get_config(self):
        return super().get_config() | {"units": self.units}

    def build(self, shapes):
        self.kernel = self.add_weight(shape=(shapes[0][-1], self.units), name="kernel")
        self.attention = self.add_weight(shape=(2 * self.units, 1), name="attention")

    def call(self, inputs):
        nodes, edges = inputs
        h = ops.matmul(nodes, self.kernel)
        to, by = ops.matmul(h, self.attention[: self.units]), ops.matmul(h, self.attention[self.units :])
        scores = ops.leaky_relu(to + ops.transpose(by, (0, 2, 1)), 0.2)
        scores = ops.where(edges > 0, scores, -1e9)
        return ops.matmul(ops.softmax(scores, axis=-1), h)


def _graph_attention():
    nodes, edges = keras.Input((4, 3), name="nodes"), keras.Input((4, 4), dtype="int32", name="edges")
    h = layers.Activation("elu")(GraphAttention(6)([nodes, edges]))
    h = GraphAttention(4)([h, edges])
    specimen = classifier(keras.Model({"nodes": nodes, "edges": edges}, h, name="graph_attention"))
    ring = np.eye(4, dtype="int32") + np.roll(np.eye(4, dtype="int32"), 1, axis=1)
    return specimen._replace(x=specimen.x | {"edges": np.tile(ring, (BATCH, 1, 1))})


class Sampling(layers.Layer):
    """Draws from a normal distribution, and adds its divergence from the standard one to the losses."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed_generator = keras.random.SeedGenerator(0)

    def call(self, inputs, training=False):
        mean, log_variance = inputs
        divergence = -0.5 * ops.sum(1 + log_variance - ops.square(mean) - ops.exp(log_variance), axis=-1)
        self.add_loss(0.1 * ops.mean(divergence))
        if not training:
            return mean
        noise = keras.random.normal(ops.shape(mean), dtype=mean.dtype, seed=self.seed_generator)
        return mean + ops.exp(0.5 * log_variance) * noise


def _of_images(model, channels=1):
    x = np.random.default_rng(0).normal(size=(BATCH, 8, 8, channels)).astype(keras.config.floatx())
    return Specimen(model, x, x, "mse")


def _vae():
    images = keras.Input((8, 8, 1))
    h = layers.Conv2D(4, 3, strides=2, padding="same", activation="relu")(images)
    h = layers.Flatten()(h)
    z = Sampling()([layers.Dense(2)(h), layers.Dense(2)(h)])
    h = layers.Reshape((4, 4, 4))(layers.Dense(64, activation="relu")(z))
    return _of_images(keras.Model(images, layers.Conv2DTranspose(1, 3, strides=2, padding="same")(h), name="vae"))


class VectorQuantizer(layers.Layer):
    """The nearest of some vectors, straight through, with the losses that pull both together."""

    def build(self, shape):
        self.codes = self.add_weight(shape=(4, shape[-1]), initializer="random_uniform", name="codes")

    def call(self, x):
        distances = ops.sum(ops.square(x[..., None, :] - self.codes), axis=-1)
        nearest = ops.take(self.codes, ops.argmin(distances, axis=-1), axis=0)
        commitment = ops.mean(ops.square(ops.stop_gradient(nearest) - x))
        self.add_loss(0.25 * commitment + ops.mean(ops.square(nearest - ops.stop_gradient(x))))
        return x + ops.stop_gradient(nearest - x)


def _vq_vae():
    images = keras.Input((8, 8, 1))
    h = VectorQuantizer()(layers.Conv2D(2, 3, strides=2, padding="same")(images))
    model = keras.Model(images, layers.Conv2DTranspose(1, 3, strides=2, padding="same")(h), name="vq_vae")
    return _of_images(model)._replace(has_slopes=False)


def _real_nvp():
    x = keras.Input((2,))
    z, volume = x, 0.0
    for mask in ((1.0, 0.0), (0.0, 1.0), (1.0, 0.0)):
        mask = np.array(mask, keras.config.floatx())
        kept = z * mask
        scale = layers.Dense(2, "tanh")(layers.Dense(8, "relu")(kept)) * (1 - mask)
        shift = layers.Dense(2)(layers.Dense(8, "relu")(kept)) * (1 - mask)
        z = kept + (z * ops.exp(scale) + shift) * (1 - mask)
        volume = volume + ops.sum(scale, axis=-1, keepdims=True)
    log_likelihood = volume - 0.5 * ops.sum(ops.square(z), axis=-1, keepdims=True)
    model = keras.Model(x, log_likelihood, name="real_nvp")
    points = np.random.default_rng(0).normal(size=(BATCH, 2)).astype(keras.config.floatx())
    return Specimen(model, points, np.zeros((BATCH, 1), "float32"), "mse")


def _ddpm():
    images, step = keras.Input((8, 8, 2), name="images"), keras.Input((), dtype="int32", name="step")
    frequencies = ops.exp(-np.log(100.0) * np.arange(4) / 4)
    angles = ops.cast(step, images.dtype)[:, None] * ops.cast(frequencies, images.dtype)[None]
    time = layers.Dense(4, "swish")(ops.concatenate([ops.sin(angles), ops.cos(angles)], axis=-1))
    down = layers.Conv2D(4, 3, padding="same")(images)
    h = layers.GroupNormalization(2)(down + time[:, None, None])
    h = layers.Conv2D(4, 3, strides=2, padding="same", activation="swish")(h)
    h = layers.UpSampling2D(interpolation="nearest")(h)
    noise = layers.Conv2D(2, 3, padding="same")(layers.Concatenate()([h, down]))
    specimen = _of_images(keras.Model({"images": images, "step": step}, noise, name="ddpm"), channels=2)
    return specimen._replace(x={"images": specimen.x, "step": np.array([1, 5, 9], "int32")})


class OdeBlock(layers.Layer):
    """Four steps of Runge and Kutta of a learned vector field."""

    def __init__(self, field, **kwargs):
        super().__init__(**kwargs)
        self.field = field

    def get_config(self):
        return super().get_config() | {"field": keras.saving.serialize_keras_object(self.field)}

    @classmethod
    def from_config(cls, config):
        return cls(**config | {"field": keras.saving.deserialize_keras_object(config["field"])})

    def call(self, x):
        for _ in range(4):
            a = self.field(x)
            b = self.field(x + 0.125 * a)
            c = self.field(x + 0.125 * b)
            x = x + (a + 2 * b + 2 * c + self.field(x + 0.25 * c)) / 24
        return x


def _neural_ode():
    field = keras.Sequential([keras.Input((3,)), layers.Dense(8, "tanh"), layers.Dense(3)])
    x = keras.Input((3,))
    return classifier(keras.Model(x, OdeBlock(field)(x), name="neural_ode"))


def _mixer():
    images = keras.Input((8, 8, 3))
    h = layers.Reshape((4, -1))(layers.Conv2D(8, 4, strides=4)(images))
    for _ in range(2):
        tokens = layers.Permute((2, 1))(layers.LayerNormalization()(h))
        tokens = layers.Dense(4)(layers.Dense(6, "gelu")(tokens))
        h = h + layers.Permute((2, 1))(tokens)
        h = h + layers.Dense(8)(layers.Dense(6, "gelu")(layers.LayerNormalization()(h)))
    return classifier(keras.Model(images, h, name="mixer"))


def _siamese():
    tower = keras.Sequential([keras.Input((6,)), layers.Dense(8, "relu"), layers.Dense(4)])
    a, b = keras.Input((6,), name="a"), keras.Input((6,), name="b")
    distance = ops.sqrt(ops.sum(ops.square(tower(a) - tower(b)), axis=-1, keepdims=True) + 1e-6)
    return classifier(keras.Model({"a": a, "b": b}, distance, name="siamese"))


def _time_series_transformer():
    x = keras.Input((6, 2))
    h = layers.Conv1D(8, 1)(x)
    for _ in range(2):
        normed = layers.LayerNormalization()(h)
        h = h + layers.MultiHeadAttention(2, 4, dropout=0.1)(normed, normed)
        h = h + layers.Conv1D(8, 1)(layers.Conv1D(4, 1, activation="relu")(layers.LayerNormalization()(h)))
    return classifier(keras.Model(x, h, name="time_series_transformer"))


def _critic():
    images = keras.Input((8, 8, 1))
    h = layers.LeakyReLU()(layers.Conv2D(4, 5, strides=2, padding="same")(images))
    h = layers.Dropout(0.3)(layers.LeakyReLU()(layers.Conv2D(8, 5, strides=2, padding="same")(h)))
    model = keras.Model(images, layers.Dense(1)(layers.Flatten()(h)), name="critic")
    return _of_images(model)._replace(y=np.ones((BATCH, 1), "float32"))


def _recurrent(layer):
    def make():
        x = keras.Input((5, 2))
        return of_functional(keras.Model(x, layers.Dense(2)(layer(4)(x)), name=layer.__name__.lower()))

    return make


EXAMPLES = {
    "graph attention": _graph_attention,
    "VAE": _vae,
    "VQ-VAE": _vq_vae,
    "RealNVP": _real_nvp,
    "DDPM": _ddpm,
    "neural ODE": _neural_ode,
    "MLP mixer": _mixer,
    "siamese": _siamese,
    "time-series transformer": _time_series_transformer,
    "WGAN critic": _critic,
    "LSTM": _recurrent(layers.LSTM),
    "GRU": _recurrent(layers.GRU),
}
