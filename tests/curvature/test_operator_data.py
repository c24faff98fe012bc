"""One curvature from each kind of data, models of several inputs and outputs, and the progress that is shown."""

import functools

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_gradtools.curvature import Fisher, GaussNewton, Hessian
from keras_gradtools.curvature.operators import operator
from keras_gradtools.display import progress

RNG = np.random.default_rng(5)
N, D, K, SIZE = 17, 3, 2, 5
X = RNG.normal(size=(N, D)).astype("float32")
T = RNG.normal(size=(N, K)).astype("float32")
Y = RNG.integers(0, K, N)
SAMPLE_WEIGHT = RNG.uniform(0.2, 2.0, N).astype("float32")
KERNEL = RNG.normal(size=(D, K)).astype("float32")
BATCHES = [slice(start, start + SIZE) for start in range(0, N, SIZE)]
EYE = np.eye(D * K, dtype="float32")


# What is compiled is kept with the model, by the loss: most of the time would go there.
@functools.cache
def linear():
    model = keras.Sequential([keras.Input((D,)), layers.Dense(K, use_bias=False)])
    model.set_weights([KERNEL])
    return model


def of_linear(curvatures, x=X):
    """J' H J / N of z = x W, for the curvatures `(N, K, K)` of the loss by z."""
    x = x.astype("float64")
    n = x.shape[1] * curvatures.shape[1]
    return np.einsum("nd,ne,nkl->dkel", x, x, curvatures).reshape(n, n) / len(x)


def curvature_of_squares(weight=None):
    return np.einsum("n,kl->nkl", np.ones(N) if weight is None else weight, 2 / K * np.eye(K))


def curvature_of_cross_entropies(z):
    p = np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)
    return p[..., None] * np.eye(p.shape[-1]) - p[..., :, None] * p[..., None, :]


def assert_close(found, desired, tolerance=1e-5):
    assert found.shape == desired.shape
    np.testing.assert_allclose(found.astype("float64"), desired, rtol=0, atol=tolerance * np.abs(desired).max())


class Sequence(keras.utils.PyDataset):
    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, i):
        return self.batches[i]


class OnlyIterable:
    """Batches that do not say how many they are."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def batches_of(*arrays):
    return [tuple(a[place] for a in arrays) for place in BATCHES]


def dataset(arrays):
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices(arrays).batch(SIZE)


def filtered_dataset(arrays):
    # Of unknown length.
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices(arrays).filter(lambda *_: True).batch(SIZE)


def loader(arrays):
    torch = pytest.importorskip("torch")
    data = pytest.importorskip("torch.utils.data")
    # A loader makes each batch a list.
    return data.DataLoader(data.TensorDataset(*(torch.from_numpy(a) for a in arrays)), batch_size=SIZE)


MAKERS = {
    "arrays": lambda arrays: arrays,
    "tensors": lambda arrays: tuple(map(ops.convert_to_tensor, arrays)),
    "doubles": lambda arrays: tuple(np.asarray(a, "float64") for a in arrays),
    "list of batches": lambda arrays: batches_of(*arrays),
    "list of lists": lambda arrays: [list(batch) for batch in batches_of(*arrays)],
    "list of tensors": lambda arrays: [tuple(map(ops.convert_to_tensor, b)) for b in batches_of(*arrays)],
    "iterable": lambda arrays: OnlyIterable(batches_of(*arrays)),
    "PyDataset": lambda arrays: Sequence(batches_of(*arrays)),
    "tf.data": dataset,
    "tf.data of unknown length": filtered_dataset,
    "DataLoader": loader,
}
NEEDS_TENSORFLOW = ("tf.data", "tf.data of unknown length")


@pytest.mark.parametrize("kind", MAKERS)
def test_each_kind_of_data(kind, backend):
    if kind in NEEDS_TENSORFLOW and backend != "tensorflow":
        pytest.skip("TensorFlow is imported in its own process only")
    for arrays in ((X, T), (X, T, SAMPLE_WEIGHT)):
        found = Hessian(linear(), "mse", MAKERS[kind](arrays), batch_size=SIZE, verbose=0)
        expected = of_linear(curvature_of_squares(*arrays[2:]))
        for _ in range(2):
            assert_close(found @ EYE, expected)


@pytest.mark.parametrize("kind", ["arrays", "list of batches", "DataLoader"])
@pytest.mark.parametrize(("cls", "options"), [(GaussNewton, {}), (Fisher, {}), (Fisher, {"kind": "empirical"})])
def test_data_for_the_others(kind, cls, options):
    found = cls(linear(), "mse", MAKERS[kind]((X, T, SAMPLE_WEIGHT)), batch_size=SIZE, verbose=0, **options)
    expected = of_linear(curvature_of_squares(SAMPLE_WEIGHT))
    if options:
        z = X @ KERNEL.astype("float64")
        g = np.einsum("nd,nk->ndk", X, 2 / K * (z - T)).reshape(N, -1)
        expected = np.einsum("n,na,nb->ab", SAMPLE_WEIGHT, g, g) / N
    assert_close(found @ EYE, expected)


def test_a_part_that_is_none():
    assert_close(Hessian(linear(), "mse", (X, T, None), verbose=0) @ EYE, of_linear(curvature_of_squares()))


def test_batches_of_their_own_sizes():
    # Each counts by its examples; `batch_size` is that of arrays only.
    places = [slice(0, 1), slice(1, 12), slice(12, N)]
    found = Hessian(linear(), "mse", [(X[p], T[p]) for p in places], batch_size=2, verbose=0)
    assert_close(found @ EYE, of_linear(curvature_of_squares()))


def test_an_empty_batch_adds_nothing():
    batches = [(X, T), (X[:0], T[:0])]
    assert_close(Hessian(linear(), "mse", batches, verbose=0) @ EYE, of_linear(curvature_of_squares()))


def test_integers_are_examples_as_well():
    x = np.arange(2 * D).reshape(2, D)
    found = Hessian(linear(), "mse", (x, np.zeros((2, K), "int64")), verbose=0)
    assert_close(found @ EYE, of_linear(curvature_of_squares()[:2], x))


def test_monte_carlo_draws_by_batch():
    # From arrays or from batches of them: the same labels.
    options = {"kind": "monte_carlo", "samples": 2, "verbose": 0}
    one = Fisher(linear(), "mse", (X, T), batch_size=SIZE, **options) @ EYE
    assert np.array_equal(Fisher(linear(), "mse", batches_of(X, T), **options) @ EYE, one)


# --- several inputs and outputs ---


class TestSeveral:
    @staticmethod
    @functools.cache
    def model(kind):
        a, b = keras.Input((2,), name="a"), keras.Input((1,), name="b")
        x = layers.Concatenate()([a, b])
        u = layers.Dense(K, use_bias=False, name="u")(x)
        v = layers.Dense(3, use_bias=False, name="v")(x)
        inputs, outputs = ({"a": a, "b": b}, {"u": u, "v": v}) if kind == "dict" else ([a, b], [u, v])
        model = keras.Model(inputs, outputs)
        model.set_weights([KERNEL, np.linspace(-1, 1, D * 3).reshape(D, 3)])
        return model

    CLASSES = RNG.integers(0, 3, N)

    def data(self, kind):
        if kind == "dict":
            return {"a": X[:, :2], "b": X[:, 2:]}, {"u": T, "v": self.CLASSES}
        return [X[:, :2], X[:, 2:]], [T, self.CLASSES]

    def losses(self, kind):
        cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        return {"u": "mse", "v": cross_entropy} if kind == "dict" else ["mse", cross_entropy]

    def expected(self, weights=(1, 1)):
        matrix = np.zeros((15, 15))
        u, v = weights
        matrix[:6, :6] = u * of_linear(curvature_of_squares())
        z = X @ self.model("dict").get_weights()[1].astype("float64")
        matrix[6:, 6:] = v * of_linear(curvature_of_cross_entropies(z))
        return matrix

    @pytest.mark.parametrize(
        ("cls", "kind"),
        [
            *[(Hessian, "dict"), (GaussNewton, "list")],
            *[pytest.param(*c, marks=pytest.mark.fast_on("torch")) for c in ((Hessian, "list"), (GaussNewton, "dict"))],
        ],
    )
    def test_several_inputs_and_outputs(self, cls, kind):
        found = cls(self.model(kind), self.losses(kind), self.data(kind), batch_size=SIZE, verbose=0)
        assert_close(found @ np.eye(15), self.expected())

    @pytest.mark.parametrize("cls", [Hessian, GaussNewton])
    def test_the_compiled_losses_with_weights(self, cls):
        model = self.model("dict")
        model.compile(loss=self.losses("dict"), loss_weights={"u": 2.0, "v": 0.5})
        found = cls(model, None, self.data("dict"), verbose=0)
        assert_close(found @ np.eye(15), self.expected((2, 0.5)))

    def test_sample_weights_for_each_output(self):
        x, y = self.data("dict")
        weights = {"u": np.full(N, 3.0, "float32"), "v": np.zeros(N, "float32")}
        found = GaussNewton(self.model("dict"), self.losses("dict"), (x, y, weights), verbose=0)
        assert_close(found @ np.eye(15), self.expected((3, 0)))

    def test_one_output_has_no_loss(self):
        # Its weights have no part, and are zero rather than missing.
        x, y = self.data("dict")
        found = Hessian(self.model("dict"), {"u": "mse", "v": None}, (x, {"u": y["u"], "v": y["v"]}), verbose=0)
        assert_close(found @ np.eye(15), self.expected((1, 0)))

    def test_batches_of_dicts(self):
        x, y = self.data("dict")
        batches = [({k: v[p] for k, v in x.items()}, {k: v[p] for k, v in y.items()}) for p in BATCHES]
        found = Hessian(self.model("dict"), self.losses("dict"), batches, verbose=0)
        assert_close(found @ np.eye(15), self.expected())

    def test_a_dict_dataset(self, backend):
        if backend != "tensorflow":
            pytest.skip("TensorFlow is imported in its own process only")
        found = Hessian(self.model("dict"), self.losses("dict"), dataset(self.data("dict")), verbose=0)
        assert_close(found @ np.eye(15), self.expected())

    def test_the_fisher_matrix_is_of_one_output(self):
        x, y = self.data("list")
        with pytest.raises(ValueError, match="Fisher knows the distributions of"):
            Fisher(self.model("list"), self.losses("list"), (x, y), verbose=0)


# --- progress ---


class TestProgress:
    def columns(self):
        # Three products of up to 64 columns.
        return np.ones((D * K, 130), "float32")

    def test_a_bar(self, capsys):
        found = Hessian(linear(), "mse", (X, T), batch_size=SIZE, verbose=1)
        found @ self.columns()
        out = capsys.readouterr().out
        assert "Hessian @ matrix" in out and "3/3" in out

    def test_a_bar_of_dense(self, capsys, monkeypatch):
        # Two rows for each program.
        monkeypatch.setattr(operator, "_NUMBERS_OF_A_CALL", 2 * D * K)
        GaussNewton(linear(), "mse", (X, T), batch_size=SIZE, verbose=1).dense(chunk_size=2)
        out = capsys.readouterr().out
        assert "GaussNewton.dense" in out and "3/3" in out

    def test_none(self, capsys):
        found = Hessian(linear(), "mse", (X, T), batch_size=SIZE, verbose=0)
        found @ self.columns()
        found.dense(chunk_size=2)
        found.trace(matvecs=6)
        assert capsys.readouterr().out == ""

    def test_none_for_what_is_quick(self, capsys):
        found = Hessian(linear(), "mse", (X, T), batch_size=SIZE)
        found @ self.columns()
        found.dense(chunk_size=2)
        assert capsys.readouterr().out == ""

    def test_one_product_has_no_bar(self, capsys):
        found = Hessian(linear(), "mse", (X, T), batch_size=SIZE, verbose=1)
        found @ self.columns()[:, 0]
        assert capsys.readouterr().out == ""

    def test_one_for_what_takes_long(self, capsys, monkeypatch):
        monkeypatch.setattr(progress.Progress, "QUIET_SECONDS", 0.0)
        monkeypatch.setattr(operator, "_NUMBERS_OF_A_CALL", 2 * D * K)
        Hessian(linear(), "mse", (X, T), batch_size=SIZE).dense(chunk_size=2)
        assert "Hessian.dense" in capsys.readouterr().out
