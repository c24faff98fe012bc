"""What the curvature operators refuse, in which words, and that the model is as it was before."""

import functools
import re

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_gradtools import memory
from keras_gradtools.curvature import Fisher, GaussNewton, Hessian
from keras_gradtools.curvature.data import repeatability
from keras_gradtools.curvature.operators import dense_memory
from keras_gradtools.keras_internals import scopes

RNG = np.random.default_rng(7)
N, D, K = 6, 3, 2
X = RNG.normal(size=(N, D)).astype("float32")
T = RNG.normal(size=(N, K)).astype("float32")
OPERATORS = [Hessian, GaussNewton, Fisher]


# What is compiled is kept with the model, by the loss: most of the time would go there.
@functools.cache
def mlp():
    model = keras.Sequential(
        [
            keras.Input((D,)),
            layers.Dense(4, "tanh", name="hidden"),
            layers.BatchNormalization(name="normalization"),
            layers.Dense(K, name="out"),
        ]
    )
    model.build()
    return model


SIZE = 3 * 4 + 4 + 4 + 4 + 4 * K + K


@pytest.fixture(autouse=True)
def weights_untouched():
    before = [ops.convert_to_numpy(v).copy() for v in mlp().variables]
    yield
    for variable, value in zip(mlp().variables, before, strict=True):
        assert np.array_equal(ops.convert_to_numpy(variable), value)
    # An error inside of a product must not leave a scope in which variables stand for something else.
    assert scopes.get_stateless_scope() is None


def made(cls=Hessian, model=None, loss="mse", data=(X, T), variables=None, **options):
    return cls(mlp() if model is None else model, loss, data, variables, **{"verbose": 0, **options})


def refused(message):
    return pytest.raises(ValueError, match=re.compile(message, re.DOTALL))


# --- the model and its variables ---


@pytest.mark.parametrize("cls", OPERATORS)
@pytest.mark.parametrize("model", [lambda x: x, "model", keras.Sequential, 3])
def test_no_model(cls, model):
    with refused(f"^{cls.__name__} expects a keras.Model as `model`. Received: "):
        made(cls, model)


@pytest.mark.parametrize("model", [keras.Sequential([layers.Dense(2, name="first")], name="later"), layers.Dense(2)])
def test_an_unbuilt_model(model):
    with refused(f"Hessian expects a built model. Received: the unbuilt model '{model.name}'. Give it a keras.Input"):
        made(model=model)


class TestVariables:
    @pytest.mark.parametrize("cls", OPERATORS)
    def test_none_in_the_model(self, cls):
        model = keras.Sequential([keras.Input((K,)), layers.Activation("tanh")], name="still")
        with refused(f"{cls.__name__} needs at least one trainable variable. Received: none in the model 'still'"):
            made(cls, model)

    def test_a_frozen_model(self):
        model = keras.Sequential([keras.Input((D,)), layers.Dense(K)], name="frozen")
        model.trainable = False
        with refused(
            "needs at least one trainable variable. Received: none in the model 'frozen'.*`trainable` to True"
        ):
            made(model=model)

    def test_none_in_the_layer(self):
        model = keras.Sequential([keras.Input((D,)), layers.Activation("tanh", name="act"), layers.Dense(K)])
        with refused("needs at least one trainable variable. Received: none in the layer 'act'"):
            made(model=model, variables=model.layers[0])

    @pytest.mark.parametrize("empty", [[], (), {}, {"a": []}])
    def test_an_empty_nesting(self, empty):
        with refused("needs at least one trainable variable. Received: none in `variables`"):
            made(variables=empty)

    def test_a_frozen_one(self):
        model = keras.Sequential([keras.Input((D,)), layers.Dense(4, name="kept"), layers.Dense(K)])
        model.layers[0].trainable = False
        # By default these are left out.
        assert made(model=model).shape == (5 * K, 5 * K)
        with refused("Hessian expects trainable variables. Received: the keras.Variable '.*kept/kernel'.*is frozen"):
            made(model=model, variables=[model.layers[1].kernel, model.layers[0].kernel])

    def test_statistics(self):
        with refused("Hessian expects trainable variables. Received: .*moving_mean.*, which is frozen"):
            made(variables=[mlp().layers[1].moving_mean])

    @pytest.mark.parametrize("foreign", [keras.Variable(np.ones(2), name="other"), X, 1.0, "hidden/kernel", None])
    def test_foreign_ones(self, foreign):
        with refused("Hessian expects as `variables` keras.Variables of the model .*, in any nested structure, or"):
            made(variables=[mlp().layers[0].kernel, foreign])

    def test_a_layer_of_another_model(self):
        layer = layers.Dense(2)
        layer.build((None, 2))
        with refused("Hessian expects as `variables` keras.Variables of the model"):
            made(variables=layer)

    def test_a_layer_in_a_list(self):
        with refused("Hessian expects as `variables` keras.Variables of the model .*Received: .*Dense"):
            made(variables=[mlp().layers[0]])

    def test_repeated_ones(self):
        kernel, bias = mlp().layers[0].kernel, mlp().layers[0].bias
        with refused(r"Hessian expects each variable once. Received: \['.*hidden/kernel', '.*bias', '.*hidden/kernel'"):
            made(variables={"a": [kernel, bias], "b": kernel})


# --- options ---


@pytest.mark.parametrize("cls", OPERATORS)
class TestOptions:
    @pytest.mark.parametrize("verbose", [2, None, "yes", -1])
    def test_verbose(self, cls, verbose):
        with refused(f"{cls.__name__} expects 'auto', 0 or 1 as `verbose`. Received: verbose={verbose!r}"):
            made(cls, verbose=verbose)

    @pytest.mark.parametrize("batch_size", [0, -1, 2.0, True, None, "4"])
    @pytest.mark.parametrize("data", [(X, T), [(X, T)]], ids=["arrays", "batches"])
    def test_batch_size(self, cls, batch_size, data):
        with refused(f"{cls.__name__} expects a positive integer as `batch_size`. Received: "):
            made(cls, data=data, batch_size=batch_size)

    @pytest.mark.parametrize("training", [None, 1, 0, "yes"])
    def test_training(self, cls, training):
        with refused(f"{cls.__name__} expects True or False as `training`. Received: "):
            made(cls, training=training)

    @pytest.mark.parametrize("chunk_size", [0, -1, 1.5, True])
    def test_chunk_size(self, cls, chunk_size):
        with pytest.raises(ValueError, match="chunk_size"):
            made(cls).dense(chunk_size)


class TestFisherOptions:
    @pytest.mark.parametrize("kind", ["Exact", None, "mc", True])
    def test_kind(self, kind):
        with refused("Fisher expects 'exact', 'monte_carlo' or 'empirical' as `kind`. Received: kind="):
            made(Fisher, kind=kind)

    @pytest.mark.parametrize("samples", [0, -1, 1.0, True, None])
    def test_samples(self, samples):
        with refused("Fisher expects a positive integer as `samples`. Received: samples="):
            made(Fisher, kind="monte_carlo", samples=samples)

    @pytest.mark.parametrize("seed", [-1, 2**31, 0.5, None, True])
    def test_seed(self, seed):
        with refused("Fisher expects an integer from 0 to .* as `seed`. Received: seed="):
            made(Fisher, kind="monte_carlo", seed=seed)

    @pytest.mark.parametrize(
        "loss",
        [
            "mae",
            keras.losses.Huber(),
            keras.losses.SparseCategoricalCrossentropy(ignore_class=0),
            keras.losses.CategoricalCrossentropy(axis=1),
            keras.losses.BinaryFocalCrossentropy(),
            lambda y_true, y_pred: ops.mean((y_true - y_pred) ** 2, axis=-1),
        ],
        ids=["mae", "huber", "ignore_class", "axis", "focal", "function"],
    )
    @pytest.mark.parametrize("kind", ["exact", "monte_carlo"])
    def test_a_loss_of_no_distribution(self, loss, kind):
        with refused(
            "Fisher knows the distributions of .*MeanSquaredError.* Received: loss=.* Use kind='empirical', or"
        ):
            made(Fisher, loss=loss, kind=kind)

    @pytest.mark.parametrize("kind", ["exact", "monte_carlo"])
    def test_a_subclass_has_what_distribution_it_likes(self, kind):
        class Mine(keras.losses.MeanSquaredError):
            pass

        with refused("Fisher knows the distributions of"):
            made(Fisher, loss=Mine(), kind=kind)

    def test_weights_for_each_element(self):
        model = keras.Sequential([keras.Input((4, D)), layers.Dense(K)])
        data = (np.ones((N, 4, D), "float32"), np.ones((N, 4, K), "float32"), np.ones((N, 4), "float32"))
        found = made(Fisher, model, data=data, kind="empirical")
        with refused(r"The empirical Fisher matrix needs one sample weight for each example, of shape \(6,\)"):
            found @ np.ones(found.shape[0])


# --- the loss ---


@pytest.mark.parametrize("cls", OPERATORS)
def test_no_loss(cls):
    model = keras.Sequential([keras.Input((D,)), layers.Dense(K)], name="bare")
    with refused(f"{cls.__name__} expects a loss, or a compiled model. Received: loss=None and the model 'bare'"):
        made(cls, model, None)


@pytest.mark.parametrize("cls", OPERATORS)
@pytest.mark.parametrize("loss", ["mean_squared_eror", 3, object(), ["mse", "mze"], {"out": 1.0}], ids=repr)
def test_no_such_loss(cls, loss):
    # As it is made, and not at the first product.
    with refused(f"{cls.__name__} expects a `loss` as for `compile`: .* Received: loss="):
        made(cls, loss=loss)


@pytest.mark.parametrize("cls", [Hessian, GaussNewton])
def test_a_cross_entropy_that_is_chosen_by_the_labels(cls):
    model = keras.Sequential([keras.Input((D,)), layers.Dense(K, "softmax")])
    v = np.ones(D * K + K)
    labels = np.arange(N) % K
    chosen, named = (made(cls, model, loss, (X, labels)) for loss in ("ce", "sparse_categorical_crossentropy"))
    if cls is Hessian:
        np.testing.assert_allclose(chosen @ v, named @ v, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(chosen.loss(), named.loss(), rtol=1e-5)


def test_a_compiled_loss_that_there_is_not():
    model = keras.Sequential([keras.Input((D,)), layers.Dense(K)])
    model.compile("sgd", "mean_squared_eror")
    with refused("Hessian expects a `loss` as for `compile`: .* Received: loss='mean_squared_eror'"):
        made(Hessian, model, None)


@pytest.mark.parametrize(("cls", "options"), [(Hessian, {}), (GaussNewton, {}), (Fisher, {"kind": "empirical"})])
def test_a_loss_of_the_batch(cls, options):
    def of_the_batch(y_true, y_pred):
        return ops.mean((y_true - y_pred) ** 2)

    found = made(cls, loss=of_the_batch, **options)
    # Again, as nothing has been found to be right.
    for _ in range(2):
        with refused(f"{cls.__name__} needs a loss with one value for each example. Received: loss=.*of_the_batch"):
            found @ np.ones(SIZE)
    with refused("needs a loss with one value for each example"):
        found.dense()


def test_an_error_in_the_loss_is_what_is_raised():
    def broken(y_true, y_pred):
        raise RuntimeError("broken in its own way")

    with pytest.raises(RuntimeError, match="broken in its own way"):
        made(loss=broken) @ np.ones(SIZE)


# --- data ---


class Sequence(keras.utils.PyDataset):
    def __init__(self, count):
        super().__init__()
        self.count = count

    @property
    def num_batches(self):
        return self.count

    def __getitem__(self, i):
        return X, T


class Batches:
    def __init__(self, *batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


@pytest.mark.parametrize("cls", OPERATORS)
class TestData:
    @pytest.mark.parametrize(
        "data", [(X[:0], T[:0]), [], Sequence(0)], ids=["arrays of no rows", "empty list", "empty PyDataset"]
    )
    def test_no_examples(self, cls, data):
        with refused(f"{cls.__name__} needs examples. Received: an empty data set"):
            made(cls, data=data)

    @pytest.mark.parametrize("data", [Batches(), Batches((X[:0], T[:0])), [(X[:0], T[:0])]])
    def test_no_examples_at_the_product(self, cls, data):
        with refused(f"{cls.__name__} needs examples. Received: an empty "):
            made(cls, data=data) @ np.ones(SIZE)

    def test_a_generator(self, cls):
        message = f"{cls.__name__} goes through the data at every product, and cannot go through a generator twice"
        for data in (((X, T) for _ in range(2)), iter([(X, T)])):
            with refused(message):
                made(cls, data=data)

    def test_an_endless_one(self, cls):
        with refused(f"{cls.__name__} needs a finite data set. Received: a PyDataset without `num_batches`"):
            made(cls, data=Sequence(None))

    @pytest.mark.parametrize("data", [X, "data", {"x": X, "y": T}, 3, None], ids=["x", "str", "dict", "int", "None"])
    def test_no_data(self, cls, data):
        with refused(rf"{cls.__name__} expects \(x, y\) or \(x, y, sample_weight\), .* as `data`\. Received"):
            made(cls, data=data)

    @pytest.mark.parametrize("data", [(), (X,), (X, T, None, None)], ids=[0, 1, 4])
    def test_a_tuple_of_another_length(self, cls, data):
        with refused(rf"{cls.__name__} expects \(x, y\) or .* as `data`\. Received: data=\("):
            made(cls, data=data)

    @pytest.mark.parametrize("batch", [(X,), (X, T, T[:, 0], X), X, {"x": X}], ids=["1", "4", "array", "dict"])
    def test_a_batch_of_something_else(self, cls, batch):
        with refused(rf"{cls.__name__} expects batches \(x, y\) or \(x, y, sample_weight\). Received: a batch of "):
            made(cls, data=[batch]) @ np.ones(SIZE)

    @pytest.mark.parametrize(
        "data",
        [
            (X, T[:-1]),
            (X, T, np.ones(N + 1)),
            ({"a": X, "b": X[1:]}, T),
            (X, [T, T[:1]]),
            (np.float32(1), T),
            (list(X), T.tolist()),
        ],
        ids=["labels", "weights", "inputs", "outputs", "scalar", "lists"],
    )
    def test_different_lengths(self, cls, data):
        with refused(
            f"{cls.__name__} expects arrays of shape .*with the same number of examples. Received: the shapes"
        ):
            made(cls, data=data)

    def test_different_lengths_in_a_batch(self, cls):
        with refused(r"with the same number of examples. Received: the shapes \[\(6, 3\), \(5, 2\)\]"):
            made(cls, data=[(X, T), (X, T[:-1])]) @ np.ones(SIZE)

    @pytest.mark.parametrize("x", [np.array(["a"] * N), np.array([None] * N), X.astype("complex64")])
    def test_no_numbers(self, cls, x):
        with refused(f"{cls.__name__} expects arrays of numbers as `data`. Received: "):
            made(cls, data=(x, T))


def test_an_infinite_dataset(backend):
    if backend != "tensorflow":
        pytest.skip("TensorFlow is imported in its own process only")
    import tensorflow as tf

    data = tf.data.Dataset.from_tensor_slices((X, T)).batch(2)
    with refused("Hessian needs a finite data set. Received: an infinite one. Use `take`"):
        made(data=data.repeat())
    with refused("Hessian needs examples. Received: an empty data set"):
        made(data=data.take(0))
    with refused("Hessian needs examples. Received: an empty data set"):
        made(data=data.filter(lambda *_: False)) @ np.ones(SIZE)
    with refused("Hessian goes through the data at every product"):
        made(data=iter(data))


# --- vectors ---


class TestVectors:
    @pytest.mark.parametrize(
        "vector",
        [
            np.ones(SIZE - 1),
            np.ones((1, SIZE)),
            np.ones((SIZE, 1, 1)),
            np.float32(1),
            2.0,
            None,
            "vector",
            np.array(["a"] * SIZE),
            np.ones(SIZE, "complex64"),
            [1.0, 2.0],
        ],
        ids=["short", "a row", "deep", "NumPy scalar", "number", "None", "str", "strings", "complex", "short list"],
    )
    def test_of_another_shape(self, vector):
        with refused(rf"Hessian multiplies a vector of shape \({SIZE},\), a matrix of shape \({SIZE}, columns\), or"):
            made() @ vector

    @pytest.mark.parametrize("shape", [(SIZE + 1,), (1, SIZE), ()])
    def test_a_tensor_of_another_shape(self, shape):
        with refused("Hessian multiplies a vector of shape .*Received: a tensor of dtype float32 and shape"):
            made() @ ops.ones(shape)

    def test_a_complex_tensor(self):
        with refused("Hessian multiplies a vector of shape .*Received: a tensor of dtype complex64"):
            made() @ ops.convert_to_tensor(np.ones(SIZE, "complex64"))

    def test_another_nesting(self):
        parts = [ops.ones(v.shape) for v in mlp().trainable_variables]
        for given in (parts[:-1], tuple(parts), dict(zip("abcdef", parts, strict=True)), [parts]):
            with refused("A nested vector must have the structure of the variables. Expected the structure"):
                made() @ given

    def test_another_shape_in_a_nesting(self):
        parts = [ops.ones(v.shape) for v in mlp().trainable_variables]
        with refused(r"Each entry of a nested vector must have the shape of its variable '.*hidden/bias', \(4,\)"):
            made() @ [parts[0], ops.ones((5,)), *parts[2:]]
        # One number would be broadcast in silence.
        with refused("Each entry of a nested vector must have the shape of its variable"):
            made() @ [parts[0], ops.ones(()), *parts[2:]]


# --- memory ---


class TestMemory:
    @pytest.mark.parametrize("cls", OPERATORS)
    def test_a_matrix_that_is_too_large(self, cls):
        def loss(y_true, y_pred):
            raise AssertionError("must not be called")

        class Untouched:
            def __iter__(self):
                raise AssertionError("must not be gone through")

        model = keras.Sequential([keras.Input((300_000,)), layers.Dense(10, kernel_initializer="zeros")])
        options = {"kind": "empirical"} if cls is Fisher else {}
        found = made(cls, model, loss, Untouched(), **options)
        n = 3_000_010
        for compute in (found.dense, found.blocks, lambda: found.dense(chunk_size=1)):
            with pytest.raises(MemoryError) as caught:
                compute()
            message = str(caught.value)
            assert f"{cls.__name__} would have the shape ({n}, {n})" in message
            assert f"{n * n * 4 / 2**30:.3g} GiB" in message and "and this machine has" in message
            for way_out in ("operator @ vector", "eigsh", "trace", "fewer variables"):
                assert way_out in message
        # Of the bias alone it is small: what it says is what helps.
        assert made(cls, model, "mse", (X, T), model.layers[0].bias).shape == (10, 10)

    def test_half_of_the_memory(self, monkeypatch):
        # In single precision 4 n^2 bytes.
        monkeypatch.setattr(memory, "machine_bytes", lambda: 2 * 4 * SIZE**2)
        assert made().dense().shape == (SIZE, SIZE)
        monkeypatch.setattr(memory, "machine_bytes", lambda: 2 * 4 * SIZE**2 - 1)
        with pytest.raises(MemoryError, match="GiB"):
            made().dense()

    def test_where_the_memory_is_not_known(self, monkeypatch):
        def unknown(name):
            raise ValueError("unrecognized configuration name")

        monkeypatch.setattr(memory.os, "sysconf", unknown)
        with pytest.raises(MemoryError, match="this machine has 16 GiB"):
            dense_memory.require_room("Hessian", 10**6, np.dtype("float32"))
        dense_memory.require_room("Hessian", 10**4, np.dtype("float32"))


# --- models that do not compute the same twice ---


def draw(x):
    """Other numbers at each run, compiled or not, that no seed of Keras' replays."""
    shape, backend = tuple(x.shape), keras.config.backend()
    if backend == "torch":
        # torch's own generators are replayed as well.
        return ops.convert_to_tensor(UNSEEDED.normal(size=shape).astype("float32"))
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.random.normal(shape)
    import jax

    # NumPy in Python would be traced once, and be constant from then on.
    return jax.pure_callback(
        lambda: UNSEEDED.normal(size=shape).astype("float32"), jax.ShapeDtypeStruct(shape, "float32")
    )


UNSEEDED = np.random.default_rng()


class Unseeded(layers.Layer):
    def call(self, x, training=False):
        return x + draw(x) if training else x


class Block(layers.Layer):
    """A layer with the cause inside."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(4, "tanh", name="dense")
        self.noise = Unseeded(name="noise")

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x, training=False):
        return self.noise(self.dense(x), training=training)


class TestWhatIsNotRepeated:
    @staticmethod
    @functools.cache
    def model():
        inner = [keras.Input((D,)), Block(name="block"), layers.Dense(4, "tanh", name="after"), layers.Dense(K)]
        return keras.Sequential(inner, name="net")

    @pytest.mark.parametrize(
        ("cls", "options"), [(Hessian, {}), (GaussNewton, {}), (Fisher, {"kind": "monte_carlo"})], ids=str
    )
    def test_the_layer_is_named(self, cls, options):
        model = self.model()
        noise = model.layers[0].noise
        before = [ops.convert_to_numpy(v).copy() for v in model.variables]
        found = made(cls, model, training=True, **options)
        # Again, as nothing has been found to be right.
        for _ in range(2):
            with pytest.raises(ValueError) as caught:
                found @ np.ones(found.shape[0])
            message = str(caught.value)
            assert f"{cls.__name__} needs a model that returns the same result twice" in message
            assert f"The cause is the layer {noise.path!r} of class {Unseeded.__module__}.Unseeded." in message
            assert "block/noise" in noise.path and "keras.random.SeedGenerator" in message
        for variable, value in zip(model.variables, before, strict=True):
            assert np.array_equal(ops.convert_to_numpy(variable), value)

    def test_in_inference_it_is_fine(self):
        found = made(model=self.model())
        v = np.ones(found.shape[0])
        assert np.array_equal(found @ v, found @ v)

    def test_before_dense_and_what_is_made_of_products(self):
        found = made(model=self.model(), training=True)
        for compute in (found.dense, lambda: found.eigsh(k=1), lambda: found.trace(matvecs=6)):
            with refused("Hessian needs a model that returns the same result twice"):
                compute()

    def test_a_loss_that_draws(self):
        def loss(y_true, y_pred):
            return ops.mean((y_true - y_pred) ** 2 * (1 + draw(y_pred)), axis=-1)

        with refused(
            "returns the same result twice.* The cause is the loss, or what the model computes outside of its layers"
        ):
            made(loss=loss) @ np.ones(SIZE)

    def test_rounding_is_not_taken_for_it(self, monkeypatch):
        # The products with a vector to which the loss is flat are zero but for rounding, which need not repeat.
        found = made()
        noise = np.random.default_rng(0)
        monkeypatch.setattr(repeatability, "_first_product", lambda sums, batch: 1e-8 * noise.normal(size=SIZE))
        assert np.isfinite(found @ np.ones(SIZE)).all()

    def test_what_torch_draws_is_replayed(self, backend):
        if backend != "torch":
            pytest.skip("it is about torch")
        import torch

        class Drawing(layers.Layer):
            def call(self, x):
                return x * torch.rand(x.shape)

        model = keras.Sequential([keras.Input((D,)), Drawing(), layers.Dense(K)])
        found = made(model=model)
        v = np.ones(found.shape[0])
        assert np.array_equal(found @ v, found @ v)
