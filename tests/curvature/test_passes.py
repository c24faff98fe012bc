"""Data that differ from pass to pass are refused, and the cause is named; an order that does not matter is not."""

import functools

import keras
import numpy as np
import pytest
from keras import layers

import keras_gradtools as kg
from keras_gradtools.curvature import Fisher, GaussNewton, Hessian

RNG = np.random.default_rng(4)
N, D = 12, 3
X = RNG.normal(size=(N, D)).astype("float32")
T = RNG.normal(size=(N, 1)).astype("float32")
V = np.ones(D, "float32")


@functools.cache
def linear():
    return keras.Sequential([keras.Input((D,)), layers.Dense(1, use_bias=False)])


class Data:
    """Batches of a size, made anew at each pass by `order(number of the pass)`, the places of the examples."""

    def __init__(self, order, size=5, change=lambda x, number: x):
        self.order, self.size, self.change, self.passes = order, size, change, 0

    def __iter__(self):
        self.passes += 1
        places = self.order(self.passes)
        for start in range(0, len(places), self.size):
            chosen = places[start : start + self.size]
            yield self.change(X[chosen], self.passes), T[chosen]


def shuffled(number):
    return np.random.default_rng(number).permutation(N)


def dropping(number):
    return shuffled(number)[: N - N % 5]


@pytest.mark.parametrize("cls", [Hessian, GaussNewton, Fisher])
def test_a_shuffle_of_a_mean_is_fine(cls):
    found = cls(linear(), "mse", Data(shuffled), verbose=0)
    expected = 2 * X.T.astype("float64") @ X / N
    for _ in range(2):
        np.testing.assert_allclose(found @ V, expected @ V, rtol=1e-5)
    np.testing.assert_allclose(found.eigsh(k=1)[0], np.linalg.eigvalsh(expected)[-1:], rtol=1e-5)


def test_what_is_left_out():
    found = Hessian(linear(), "mse", Data(dropping), verbose=0)
    # Again, as nothing has been found to be right.
    for compute in (lambda: found @ V, found.dense, found.trace, found.loss, lambda: found.eigsh(k=1)):
        with pytest.raises(ValueError, match=r"Hessian goes through the data .*of 10 examples are missing .*drop_last"):
            compute()


def test_a_loader_that_shuffles_and_drops():
    torch = pytest.importorskip("torch")
    data = pytest.importorskip("torch.utils.data")
    arrays = data.TensorDataset(torch.from_numpy(X), torch.from_numpy(T))
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="needs the same examples each time. Received: .*DataLoader.*drop_last=True"):
        Hessian(linear(), "mse", data.DataLoader(arrays, batch_size=5, shuffle=True, drop_last=True), verbose=0) @ V
    loader = data.DataLoader(arrays, batch_size=5, shuffle=True)
    np.testing.assert_allclose(Hessian(linear(), "mse", loader, verbose=0) @ V, 2 * X.T @ (X @ V) / N, rtol=1e-5)


def test_a_dataset_that_shuffles(backend):
    if backend != "tensorflow":
        pytest.skip("TensorFlow is imported in its own process only")
    import tensorflow as tf

    data = tf.data.Dataset.from_tensor_slices((X, T)).shuffle(N, seed=1, reshuffle_each_iteration=True)
    with pytest.raises(ValueError, match="of 10 examples are missing in another pass: .*drop_remainder"):
        Hessian(linear(), "mse", data.batch(5, drop_remainder=True), verbose=0) @ V
    found = Hessian(linear(), "mse", data.batch(5), verbose=0)
    np.testing.assert_allclose(found @ V, 2 * X.T @ (X @ V) / N, rtol=1e-5)


class Augmented(keras.utils.PyDataset):
    def __init__(self):
        super().__init__()
        self.random = np.random.default_rng(0)

    def __len__(self):
        return 2

    def __getitem__(self, i):
        part = slice(6 * i, 6 * i + 6)
        return X[part] * self.random.choice([-1.0, 1.0], (6, 1)).astype("float32"), T[
            part
        ] + 0.01 * self.random.random()


def test_examples_that_are_augmented():
    noisy = Data(lambda number: np.arange(N), change=lambda x, number: x + np.float32(0.01 * number))
    for data in (noisy, Augmented()):
        with pytest.raises(ValueError, match="12 of 12 examples differ in another pass: they are drawn or augmented"):
            Hessian(linear(), "mse", data, verbose=0) @ V


def test_two_passes_that_are_equal_by_chance():
    # A change at the fourth pass.
    found = Hessian(linear(), "mse", Data(lambda number: np.arange(N - (number > 4))), verbose=0)
    found @ V
    with pytest.raises(ValueError, match="1 of 12 examples are missing in another pass"):
        for _ in range(3):
            found @ V


def test_what_can_be_gone_through_once():
    class Once:
        def __init__(self):
            self.batches = iter([(X, T)])

        def __iter__(self):
            return self.batches

    class Twice:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter([(X, T)] if self.passes < 3 else [])

    with pytest.raises(ValueError, match="Hessian needs examples. Received: an empty data set|only once"):
        Hessian(linear(), "mse", Once(), verbose=0) @ V
    with pytest.raises(ValueError, match="which can be iterated only once. Pass a list of its batches"):
        Hessian(linear(), "mse", Twice(), verbose=0) @ V

    def generate():
        yield X, T

    with pytest.raises(ValueError, match=r"Received: .*generate.* Give the list of the batches that it returns"):
        Hessian(linear(), "mse", generate, verbose=0)


class TestAnOrderThatMatters:
    def test_batch_normalization(self):
        model = keras.Sequential([keras.Input((D,)), layers.BatchNormalization(name="norm"), layers.Dense(1)])
        with pytest.raises(
            ValueError, match="another order each time.*depends on the others of its batch in '.*norm' of class"
        ):
            Hessian(model, "mse", Data(shuffled), training=True, verbose=0).eigsh(k=1)
        # In inference mode, or in one order, it is fine.
        for options in ({"training": False}, {"training": True, "data": Data(lambda number: np.arange(N))}):
            found = Hessian(model, "mse", options.pop("data", Data(shuffled)), verbose=0, **options)
            v = np.ones(found.shape[0], "float32")
            np.testing.assert_allclose(found @ v, found @ v, rtol=1e-4)

    def test_batch_normalization_before_a_head_of_zeros(self):
        # The loss is the same in any order, and its second derivative is not.
        head = layers.Dense(2, kernel_initializer="zeros")
        model = keras.Sequential([keras.Input((D,)), layers.BatchNormalization(), head])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

        class Classes(Data):
            def __iter__(self):
                return ((x, (t[:, 0] > 0).astype("int32")) for x, t in super(Classes, self).__iter__())

        with pytest.raises(ValueError, match="another order each time"):
            GaussNewton(model, loss, Classes(shuffled, size=4), training=True, verbose=0) @ np.ones(14, "float32")

    def test_dropout(self):
        model = keras.Sequential([keras.Input((D,)), layers.Dropout(0.5, name="drop"), layers.Dense(1)])
        with pytest.raises(ValueError, match="the random numbers of '.*drop' of class .* depend on the position of"):
            Hessian(model, "mse", Data(shuffled), training=True, verbose=0) @ np.ones(4, "float32")

    def test_a_sum_over_batches_of_different_sizes(self):
        loss = keras.losses.MeanSquaredError(reduction="sum")
        with pytest.raises(ValueError, match=r"is not a mean over its examples, as with reduction='sum'"):
            Hessian(linear(), loss, Data(shuffled), verbose=0) @ V
        np.testing.assert_allclose(
            Hessian(linear(), loss, Data(shuffled, size=4), verbose=0) @ V, 4 * 2 * X.T @ (X @ V) / N, rtol=1e-5
        )

    def test_labels_that_are_drawn(self):
        found = Fisher(linear(), "mse", Data(shuffled), kind="monte_carlo", verbose=0)
        with pytest.raises(ValueError, match="the labels that are drawn depend on the position of an example"):
            found @ V
        # Of which the loss knows nothing.
        np.testing.assert_allclose(found.gradient(), found.gradient(), rtol=1e-5)


def test_it_is_looked_at_once_and_without_the_model():
    data = Data(lambda number: np.arange(N))
    found = Hessian(linear(), "mse", data, verbose=0)
    found @ V
    assert data.passes <= 4
    before = data.passes
    for _ in range(3):
        found @ V
    assert data.passes == before + 3


def test_the_noise_of_gradients_may_be_of_other_examples():
    kg.diagnostics.gradient_noise_scale(linear(), "mse", Data(dropping))
