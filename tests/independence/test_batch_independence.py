"""batch_independence: tables of layers and models that mix the examples of a batch or do not, the report, bad input."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg

B, T, D = 6, 4, 3
NORM = "keras.layers.BatchNormalization"


class BatchStatistics(layers.Layer):
    """Normalization by the batch, by hand."""

    def call(self, x):
        return (x - ops.mean(x, axis=0)) / (ops.std(x, axis=0) + 1e-3)


class BatchAttention(layers.Layer):
    def call(self, x):
        return ops.matmul(ops.softmax(ops.matmul(x, ops.transpose(x)) / 2.0, axis=-1), x)


class Fold(layers.Layer):
    """Time steps as examples, around a layer of its own, and back: mixes nothing."""

    def __init__(self, inner, **kwargs):
        super().__init__(**kwargs)
        self.inner = inner

    def call(self, x):
        return ops.reshape(self.inner(ops.reshape(x, (-1, D))), (-1, T, 2))


class Pairs(layers.Layer):
    """Two examples make one row; and back."""

    def call(self, x):
        # Keras asks what comes out of a number of examples that may be odd.
        if x.shape[0] is None or x.shape[0] % 2:
            return x
        paired = ops.reshape(x, (-1, 2 * D))
        return ops.reshape(paired * ops.flip(paired, axis=-1), (-1, D))


class Roll(layers.Layer):
    def call(self, x):
        return ops.roll(x, 1, axis=0)


class Shuffle(layers.Layer):
    """Each example with the noise of another one, mixed in by a thousandth: mixup."""

    def call(self, x):
        return x + 1e-3 * ops.flip(x, axis=0)


class Own(keras.Model):
    """Mixes between its layers."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first, self.last = layers.Dense(4), layers.Dense(2)

    def call(self, x):
        h = self.first(x)
        return self.last(h - ops.mean(h, axis=0, keepdims=True))


class BackAndForth(layers.Layer):
    """Subtracts the mean and adds it again: what crosses is rounding."""

    def call(self, x):
        mean = ops.mean(ops.sin(x), axis=0)
        return (x - mean) + mean


class RoundingCrosses(layers.Layer):
    """The identity times 0.3. The derivatives by the mean cancel to rounding: sum(0.3 u) - 0.3 sum(u)."""

    def call(self, x):
        mean = ops.mean(ops.sin(x), axis=0)
        return (x - mean) * 0.3 + mean * 0.3


def vectors(*parts):
    return keras.Sequential([keras.Input((D,)), *parts])


def sequences(*parts):
    return keras.Sequential([keras.Input((T, D)), *parts])


def images(*parts):
    return keras.Sequential([keras.Input((6, 6, 2)), *parts])


def tokens(*parts):
    return keras.Sequential([keras.Input((T,), dtype="int32"), layers.Embedding(11, D), *parts])


def nested():
    inner = vectors(layers.Dense(D, "tanh"), layers.BatchNormalization(name="deep"))
    inner.name = "inner"
    return vectors(layers.Dense(D), inner, layers.Dense(2))


def residual():
    x = keras.Input((D,))
    h = layers.BatchNormalization(name="norm")(x)
    return keras.Model(x, layers.Add(name="add")([x, layers.Dense(D)(h)]))


def of_operations():
    x = keras.Input((D,))
    return keras.Model(x, x * 2.0 - ops.mean(x, axis=0, keepdims=True))


def attending():
    x = keras.Input((T, D))
    return keras.Model(x, layers.MultiHeadAttention(2, 3)(x, x))


def two_inputs(*parts):
    a, b = keras.Input((D,)), keras.Input((D,))
    h = layers.Concatenate()([a, b])
    for part in parts:
        h = part(h)
    return keras.Model([a, b], h)


def batch_hard():
    """The triplet loss with the hardest positive and negative example in the batch."""
    embed, labels = vectors(layers.Dense(4, "tanh")), np.arange(B) % 2

    def loss(x):
        z = embed(x)
        distances = ops.sum((z[:, None] - z[None]) ** 2, axis=-1)
        same = ops.convert_to_tensor(labels[:, None] == labels[None])
        hardest = ops.max(ops.where(same, distances, 0.0), axis=1)
        return hardest - ops.min(ops.where(same, 1e9, distances), axis=1)

    return loss


def triplets_of_examples():
    """The same of triplets, one in each row: mixes nothing."""
    embed = vectors(layers.Dense(4, "tanh"))

    def loss(x):
        z = embed(x)
        return ops.sum((z - 1.0) ** 2, axis=1) - ops.sum((z + 1.0) ** 2, axis=1)

    return loss


# Each: what makes the model, the shape of an example, whether training, the layers that mix.
VECTOR, SEQUENCE, IMAGE, TOKENS = (D,), (T, D), (6, 6, 2), None
NORMALIZED = layers.BatchNormalization
MIXING = {
    "BatchNormalization": (lambda: vectors(layers.Dense(4), NORMALIZED(name="bn")), VECTOR, True, ["bn"]),
    "BatchNormalization of images": (
        lambda: images(layers.Conv2D(3, 3), NORMALIZED(name="bn"), layers.ReLU()),
        IMAGE,
        True,
        ["bn"],
    ),
    "BatchNormalization of sequences": (
        lambda: sequences(layers.LSTM(4, return_sequences=True), NORMALIZED(name="bn")),
        SEQUENCE,
        True,
        ["bn"],
    ),
    "two of them": (
        lambda: vectors(NORMALIZED(name="a"), layers.Dense(4, "tanh"), NORMALIZED(name="b")),
        VECTOR,
        True,
        ["a", "b"],
    ),
    "nested": (nested, VECTOR, True, ["inner/deep"]),
    "residual": (residual, VECTOR, True, ["norm"]),
    "in a model of two inputs": (lambda: two_inputs(NORMALIZED(name="bn")), (VECTOR, VECTOR), True, ["bn"]),
    "behind an embedding": (lambda: tokens(layers.Flatten(), NORMALIZED(name="bn")), TOKENS, True, ["bn"]),
    "TimeDistributed BatchNormalization": (
        lambda: sequences(layers.TimeDistributed(NORMALIZED(name="bn"), name="each")),
        SEQUENCE,
        True,
        None,
    ),
    "batch statistics by hand": (lambda: vectors(BatchStatistics(name="own")), VECTOR, False, ["own"]),
    "attention across the batch": (
        lambda: vectors(layers.Dense(4), BatchAttention(name="own")),
        VECTOR,
        False,
        ["own"],
    ),
    "reshape across the batch": (lambda: vectors(Pairs(name="own")), VECTOR, False, ["own"]),
    "roll": (lambda: vectors(layers.Dense(D), Roll(name="own")), VECTOR, False, ["own"]),
    "a thousandth of another example": (lambda: vectors(Shuffle(name="own")), VECTOR, False, ["own"]),
    "LayerNormalization of axis 0": (
        lambda: vectors(layers.LayerNormalization(axis=(0, 1), center=False, scale=False, name="ln")),
        VECTOR,
        False,
        ["ln"],
    ),
    "UnitNormalization of axis 0": (
        lambda: vectors(layers.UnitNormalization(axis=0, name="un")),
        VECTOR,
        False,
        ["un"],
    ),
    "Softmax of axis 0": (lambda: vectors(layers.Softmax(axis=0, name="softmax")), VECTOR, False, ["softmax"]),
    "between the layers of a model": (lambda: Own(name="own"), VECTOR, False, ["own"]),
    "an operation of a functional model": (of_operations, VECTOR, False, None),
    "Lambda": (lambda: vectors(layers.Lambda(lambda x: x + ops.max(x, axis=0), name="max")), VECTOR, False, ["max"]),
    "batch-hard loss": (batch_hard, VECTOR, False, []),
    "a contrastive loss": (
        lambda: lambda x: ops.logsumexp(ops.matmul(x, ops.transpose(x)), axis=1),
        VECTOR,
        False,
        [],
    ),
}
SEPARATE = {
    "Dense": (lambda: vectors(layers.Dense(4, "relu"), layers.Dense(2)), VECTOR, True),
    "BatchNormalization in inference mode": (lambda: vectors(layers.Dense(4), NORMALIZED()), VECTOR, False),
    "frozen BatchNormalization": (lambda: vectors(layers.Dense(4), NORMALIZED(trainable=False)), VECTOR, True),
    "dropout": (lambda: vectors(layers.Dense(8), layers.Dropout(0.5), layers.Dense(2)), VECTOR, True),
    "noise": (lambda: vectors(layers.GaussianNoise(0.5), layers.Dense(2)), VECTOR, True),
    "LayerNormalization": (lambda: vectors(layers.LayerNormalization()), VECTOR, True),
    "GroupNormalization": (lambda: images(layers.Conv2D(4, 3), layers.GroupNormalization(2)), IMAGE, True),
    "UnitNormalization": (lambda: vectors(layers.UnitNormalization()), VECTOR, True),
    "RMSNormalization": (lambda: vectors(layers.RMSNormalization()), VECTOR, True),
    "SpectralNormalization": (lambda: vectors(layers.SpectralNormalization(layers.Dense(4))), VECTOR, True),
    "Softmax": (lambda: vectors(layers.Softmax()), VECTOR, False),
    "convolutions and pooling": (
        lambda: images(layers.Conv2D(4, 3), layers.MaxPooling2D(2), layers.DepthwiseConv2D(2)),
        IMAGE,
        True,
    ),
    "transposed convolution": (lambda: images(layers.Conv2DTranspose(2, 3, strides=2)), IMAGE, False),
    "upsampling": (lambda: images(layers.UpSampling2D(2, interpolation="bilinear")), IMAGE, False),
    "convolution over time": (lambda: sequences(layers.Conv1D(4, 2, padding="causal")), SEQUENCE, True),
    "SpatialDropout": (lambda: images(layers.SpatialDropout2D(0.5)), IMAGE, True),
    "LSTM": (lambda: sequences(layers.LSTM(4)), SEQUENCE, True),
    "GRU": (lambda: sequences(layers.GRU(4, return_sequences=True)), SEQUENCE, True),
    "Bidirectional": (lambda: sequences(layers.Bidirectional(layers.SimpleRNN(3))), SEQUENCE, True),
    "attention along time": (attending, SEQUENCE, True),
    "TimeDistributed": (lambda: sequences(layers.TimeDistributed(layers.Dense(2, "tanh"))), SEQUENCE, True),
    "time steps as examples": (lambda: sequences(Fold(layers.Dense(2, "tanh"))), SEQUENCE, False),
    "global pooling": (lambda: images(layers.GlobalAveragePooling2D()), IMAGE, False),
    "Flatten, Reshape, Permute": (
        lambda: images(layers.Permute((3, 1, 2)), layers.Reshape((8, 9)), layers.Flatten()),
        IMAGE,
        False,
    ),
    "two inputs": (lambda: two_inputs(layers.Dense(3, "tanh")), (VECTOR, VECTOR), True),
    "embedding": (lambda: tokens(layers.SimpleRNN(3)), TOKENS, True),
    "PReLU": (lambda: vectors(layers.PReLU()), VECTOR, True),
    "subtracts the mean and adds it": (lambda: vectors(BackAndForth()), VECTOR, False),
    "a loss of each example": (triplets_of_examples, VECTOR, False),
}


def examples(shape, seed):
    rng = np.random.default_rng(seed)
    if shape is TOKENS:
        return rng.integers(0, 11, (B, T)).astype("int32")
    if isinstance(shape[0], tuple):
        return [examples(part, seed + i) for i, part in enumerate(shape)]
    return rng.normal(size=(B, *shape)).astype("float32")


def draw_weights(model, seed):
    if isinstance(model, keras.Model):
        rng = np.random.default_rng(seed)
        for v in model.trainable_variables:
            v.assign(rng.normal(size=v.shape) / np.sqrt(max(v.shape[0] if len(v.shape) else 1, 1)))


def judge_mixing(case, seeds):
    make, shape, training, names = MIXING[case]
    model = make()
    for seed in seeds:
        draw_weights(model, seed)
        report = kg.diagnostics.batch_independence(model, examples(shape, seed), training=training, seed=seed)
        assert not report.independent and report.leak > 1e-4, (seed, report)
        if names is not None:
            assert list(report.layers) == names, (seed, report)


def judge_separate(case, seeds):
    make, shape, training = SEPARATE[case]
    model = make()
    for seed in seeds:
        draw_weights(model, seed)
        report = kg.diagnostics.batch_independence(model, examples(shape, seed), training=training, seed=seed)
        assert report.independent and report.layers == () and report.leak < 1e-6, (seed, report)


# The loops of recurrent layers take long to compile. Each of them stands here in one table; the tests of every seed
# have them all.
LONG = ("BatchNormalization of sequences", "LSTM", "Bidirectional")


# The check is the same code on every backend, of a few gradients. Each backend has these; torch, all of them.
FEW = (
    "two of them",
    "nested",
    "behind an embedding",
    "attention across the batch",
    "reshape across the batch",
    "a thousandth of another example",
    "between the layers of a model",
    "a contrastive loss",
    "Dense",
    "BatchNormalization in inference mode",
    "dropout",
    "noise",
    "convolutions and pooling",
    "two inputs",
    "subtracts the mean and adds it",
)


def fast(table):
    return [
        pytest.param(case, marks=() if case in FEW else pytest.mark.fast_on("torch"))
        for case in table
        if case not in LONG
    ]


@pytest.mark.parametrize("case", fast(MIXING))
def test_what_mixes_is_found_and_named(case):
    judge_mixing(case, range(1))


@pytest.mark.parametrize("case", fast(SEPARATE))
def test_what_does_not_mix_is_not_accused(case):
    judge_separate(case, range(1))


@pytest.mark.slow
@pytest.mark.parametrize("case", MIXING)
def test_what_mixes_is_found_with_every_seed(case):
    judge_mixing(case, range(20))


@pytest.mark.slow
@pytest.mark.parametrize("case", SEPARATE)
def test_what_does_not_mix_is_never_accused(case):
    judge_separate(case, range(20))


def test_the_tables_are_large():
    assert len(MIXING) + len(SEPARATE) >= 50


def normalized(seed=0):
    model = vectors(layers.Dense(4, "tanh"), layers.BatchNormalization(name="bn"), layers.Dense(2))
    draw_weights(model, seed)
    return model


def test_the_leak_is_that_of_the_whole_jacobian():
    model, x = normalized(), examples(VECTOR, 0)
    report = kg.diagnostics.batch_independence(model, x, training=True)
    jacobian = ops.convert_to_numpy(kg.jacobian(lambda x: model(x, training=True))(x)).astype("float64")
    from keras_gradtools.independence import cross_example_gradients

    u = np.random.default_rng(0).uniform(0.5, 1.5, (B, 2))
    crossing = within = 0.0
    for half in cross_example_gradients.halves(B, 0):
        pulled = np.einsum("bk,bkjd->jd", u * half[:, None], jacobian)
        crossing += (pulled[~half] ** 2).sum()
        within += (pulled[half] ** 2).sum()
    np.testing.assert_allclose(report.leak, np.sqrt(crossing / within), rtol=1e-4)


def test_the_report_in_words():
    model, x = normalized(), examples(VECTOR, 0)
    text = str(kg.diagnostics.batch_independence(model, x, training=True))
    assert f"'bn' ({NORM})" in text and "6 examples" in text and "training=False" in text
    text = str(kg.diagnostics.batch_independence(model, x))
    assert "independent" in text and "no gradient crosses" in text
    rounded = kg.diagnostics.batch_independence(vectors(BackAndForth()), x)
    assert ("rounding noise" in str(rounded)) == (rounded.leak > 0)


def test_rounding_is_no_leak():
    x = examples(VECTOR, 0)
    report = kg.diagnostics.batch_independence(vectors(RoundingCrosses()), x)
    assert 0 < report.leak < 1e-6 and report.independent and report.layers == ()
    assert "rounding noise" in str(report)
    beside = vectors(RoundingCrosses(), layers.BatchNormalization(name="bn"))
    assert kg.diagnostics.batch_independence(beside, x, training=True).layers == ("bn",)
    with kg.GradientTape() as tape:
        tape.watch(x := ops.convert_to_tensor(x))
        y = RoundingCrosses()(x)
    expected = np.broadcast_to(0.3 * np.eye(D), (B, D, D))
    found = ops.convert_to_numpy(tape.batch_jacobian(y, x, check_independence=True))
    np.testing.assert_allclose(found, expected, atol=1e-6)


class TestWhatCannotBeTold:
    """A third verdict: nothing that is looked at is other than zero."""

    @staticmethod
    def behind_zeros(*outputs):
        x = keras.Input((D,))
        h = layers.BatchNormalization(name="bn")(x)
        zeros = layers.Dense(2, "softmax", kernel_initializer="zeros", name="zeros")(h)
        return keras.Model(x, [zeros, layers.Dense(2, name="other")(x)] if outputs else zeros)

    def test_a_head_of_zeros(self):
        model, x = self.behind_zeros(), examples(VECTOR, 0)
        report = kg.diagnostics.batch_independence(model, x, training=True)
        assert report.independent is None and report.leak == 0.0 and report.layers == ("bn",)
        text = str(report)
        assert "cannot decide" in text and "the gradient is zero everywhere" in text and f"'bn' ({NORM})" in text
        assert "is correct" not in text
        # Once it is trained, it can be told.
        model.get_layer("zeros").kernel.assign(np.ones((D, 2)) * [1.0, -1.0])
        assert kg.diagnostics.batch_independence(model, x, training=True).independent is False

    def test_one_of_two_outputs(self):
        report = kg.diagnostics.batch_independence(self.behind_zeros("both"), examples(VECTOR, 0), training=True)
        assert report.independent is None and "of 1 of the 2 outputs is zero everywhere" in str(report)
        assert kg.diagnostics.batch_independence(lambda x: [x, ops.softmax(x)], examples(VECTOR, 0)).independent

    def test_tokens(self):
        model = tokens(layers.Flatten(), layers.Dense(2, kernel_initializer="zeros"))
        report = kg.diagnostics.batch_independence(model, examples(TOKENS, 0))
        assert report.independent is None and "no output changes when examples change places" in str(report)
        same = np.ones((B, T), "int32")
        assert kg.diagnostics.batch_independence(tokens(layers.Flatten(), layers.Dense(2)), same).independent is None

    def test_who_asks(self):
        # The batch Jacobian is zero, and right; what a callback will measure later is not.
        model, x = self.behind_zeros(), examples(VECTOR, 0)
        found = kg.batch_jacobian(model, check_independence=True)(x, training=True)
        assert not np.any(ops.convert_to_numpy(found))
        model.compile("sgd", "mse")
        monitor = kg.callbacks.BatchJacobianMonitor(x, training=True)
        with pytest.warns(UserWarning, match="BatchJacobianMonitor: .* the test cannot decide"):
            model.fit(x, np.ones((B, 2), "float32"), verbose=0, callbacks=[monitor])


class TestWhatIsDrawn:
    def test_dropout_of_tokens(self):
        # Two calls are compared: they have one mask, also that of torch's own generator.
        for dropout in (layers.Dropout(0.5), layers.Dropout(0.5, seed=1), layers.GaussianNoise(0.5)):
            report = kg.diagnostics.batch_independence(tokens(dropout, layers.SimpleRNN(3)), examples(TOKENS, 0), True)
            assert report.independent is True and report.leak < 1e-6, report

    def test_the_generator_goes_on(self):
        model = tokens(layers.Dropout(0.5), layers.SimpleRNN(3))
        x = ops.ones((50,))
        drawn = []
        for ask in (False, True):
            keras.utils.set_random_seed(3)
            dropout = layers.Dropout(0.5)
            if ask:
                kg.diagnostics.batch_independence(model, examples(TOKENS, 0), training=True)
            drawn.append(ops.convert_to_numpy(dropout(x, training=True)))
        np.testing.assert_array_equal(*drawn)

    def test_what_no_seed_repeats(self):
        noise = np.random.default_rng(0)

        def fun(x):
            return ops.cast(x, "float32") * noise.uniform()

        report = kg.diagnostics.batch_independence(fun, examples(TOKENS, 0))
        assert report.independent is None and "two calls with the same examples differ" in str(report)


class MaskOfTheBatch(keras.Model):
    """As a transformer whose padding mask is that of all examples."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.embedding, self.last = layers.Embedding(11, D), layers.Dense(2)

    def call(self, tokens):
        is_padding = ops.any(ops.equal(tokens, 3), axis=0)
        return self.last(ops.where(is_padding[None, :, None], 0.0, self.embedding(tokens)))


class Masking(layers.Layer):
    """Mixes examples by the Keras mask that it is given."""

    supports_masking = True

    def call(self, h, mask=None):
        return h if mask is None else h * ops.cast(ops.any(mask, axis=0), h.dtype)[None, :, None]


class TestMasks:
    """No gradient passes through a mask: the layer is named by what comes out when the others are replaced."""

    def test_in_the_call_of_the_model(self):
        report = kg.diagnostics.batch_independence(MaskOfTheBatch(name="own"), examples(TOKENS, 0))
        assert report.independent is False and report.layers == ("own",)
        assert f"The cause is the model's own call, that of {__name__}.MaskOfTheBatch" in str(report)
        wrapped = tokens_through(MaskOfTheBatch(name="inner"), layers.Flatten(), layers.Dense(2))
        assert kg.diagnostics.batch_independence(wrapped, examples(TOKENS, 0)).layers == ("inner",)

    def test_in_a_layer(self):
        x = keras.Input((T,), dtype="int32")
        h = Masking(name="masking")(layers.Embedding(11, D, mask_zero=True)(x))
        model = keras.Model(x, layers.Dense(2)(h))
        sparse = examples(TOKENS, 0) * (np.arange(B * T).reshape(B, T) % 7 == 0)
        report = kg.diagnostics.batch_independence(model, sparse.astype("int32"))
        assert report.independent is False and report.layers == ("masking",)

    def test_that_a_layer_hands_to_the_next_one(self):
        class Own(keras.Model):
            def __init__(self):
                super().__init__()
                self.embedding, self.masking = layers.Embedding(11, D, mask_zero=True), Masking(name="masking")

            def call(self, x):
                return self.masking(self.embedding(x))

        sparse = (examples(TOKENS, 0) * (np.arange(B * T).reshape(B, T) % 7 == 0)).astype("int32")
        report = kg.diagnostics.batch_independence(Own(), sparse)
        assert report.independent is False and report.layers == ("masking",)

    def test_of_the_examples(self):
        # What the user hands over has a mask of its own.
        tokens = (np.arange(B * T).reshape(B, T) % 3 != 0).astype("int32")
        embedded = layers.Embedding(11, D, mask_zero=True)(tokens)
        counts = []

        class Counting(layers.Layer):
            supports_masking = True

            def call(self, h, mask=None):
                counts.append(mask is not None)
                return h

        report = kg.diagnostics.batch_independence(Counting(), embedded)
        assert report.independent is True and all(counts)

    def test_in_a_function(self):
        embed = tokens(layers.Flatten())
        report = kg.diagnostics.batch_independence(
            lambda x: embed(x) * ops.mean(ops.cast(x, "float32")), np.arange(B * T).reshape(B, T) % 11
        )
        assert report.independent is False and report.layers == ()
        assert "outside of layers" in str(report) and "diagnostics.batch_independence" not in str(report)


def tokens_through(*parts):
    return keras.Sequential([keras.Input((T,), dtype="int32"), *parts])


def test_the_advice_suits_the_call():
    x = examples(VECTOR, 0)
    # No mode in which it was not called, for what has none.
    for model, training in ((vectors(BatchStatistics()), False), (lambda x: x + ops.mean(x, axis=0), False)):
        text = str(kg.diagnostics.batch_independence(model, x, training=training))
        assert "training" not in text and "BatchNormalization" not in text
    text = str(kg.diagnostics.batch_independence(normalized(), x, training=True))
    assert "call the model with training=False" in text and "training=True" not in text


def test_nothing_changes():
    keras.utils.set_random_seed(3)
    model = vectors(layers.Dense(4), layers.BatchNormalization(), layers.Dropout(0.5, seed=1))
    before = [ops.convert_to_numpy(v) for v in model.variables]
    kg.diagnostics.batch_independence(model, examples(VECTOR, 0), training=True)
    for v, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(v), value)
    drawn = ops.convert_to_numpy(keras.random.normal((3,)))
    keras.utils.set_random_seed(3)
    vectors(layers.Dense(4), layers.BatchNormalization(), layers.Dropout(0.5, seed=1))
    np.testing.assert_array_equal(ops.convert_to_numpy(keras.random.normal((3,))), drawn)


def test_the_cost_does_not_grow_with_the_batch():
    calls = []

    def fun(x):
        calls.append(x.shape[0])
        return ops.sin(x)

    for size in (4, 64):
        kg.diagnostics.batch_independence(fun, np.ones((size, 3), "float32"))
    assert calls == [4, 64]


def test_a_small_leak_in_a_large_batch():
    x = np.random.default_rng(0).normal(size=(2000, 3)).astype("float32")
    for fun in (
        lambda x: x + ops.mean(x, axis=0),
        lambda x: ops.concatenate([x[:1] + 0.1 * x[-1:], x[1:]], axis=0),  # one pair
    ):
        assert not kg.diagnostics.batch_independence(fun, x).independent


def test_batch_jacobian_checks():
    model, x = normalized(), ops.convert_to_tensor(examples(VECTOR, 0))
    plain = kg.batch_jacobian(model)(x)
    checked = kg.batch_jacobian(model, check_independence=True)
    np.testing.assert_array_equal(ops.convert_to_numpy(checked(x)), ops.convert_to_numpy(plain))
    with pytest.raises(ValueError, match="batch_jacobian: the model .* The cause is the layer 'bn'"):
        checked(x, training=True)


@pytest.mark.parametrize("persistent", [False, True])
def test_the_tape_checks(persistent):
    model, x = normalized(), ops.convert_to_tensor(examples(VECTOR, 0))
    with kg.GradientTape(persistent=persistent) as tape:
        tape.watch(x)
        y = model(x, training=False)
    found = tape.batch_jacobian(y, x, check_independence=True)
    np.testing.assert_allclose(
        ops.convert_to_numpy(found), ops.convert_to_numpy(kg.batch_jacobian(model)(x)), rtol=1e-5, atol=1e-6
    )
    with kg.GradientTape(persistent=persistent) as tape:
        tape.watch(x)
        y = model(x, training=True)
    with pytest.raises(ValueError, match="GradientTape.batch_jacobian: .*batch_independence"):
        tape.batch_jacobian(y, x, check_independence=True)


def test_inside_a_compiled_function_nothing_is_known():
    @kg.jit
    def compiled(x):
        return kg.batch_jacobian(ops.sin, check_independence=True)(x)

    x = np.ones((3, 2), "float32")
    if keras.config.backend() == "torch":  # runs eagerly
        assert compiled(x).shape == (3, 2, 2)
    else:
        with pytest.raises(ValueError, match="not known inside a compiled function"):
            compiled(x)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (lambda: ("net", examples(VECTOR, 0)), "expects a Keras model, a layer or a function"),
        (lambda: (ops.sin, examples(VECTOR, 0)[:1]), "two examples or more"),
        (lambda: (ops.mean, examples(VECTOR, 0)), "outputs with one batch size"),
        (lambda: (lambda x: x[:2], examples(VECTOR, 0)), "as many outputs as examples"),
        (lambda: (lambda x: ops.cast(x, "int32"), examples(VECTOR, 0)), "returns floating-point tensors"),
        (lambda: (lambda x: ops.sqrt(x - x), examples(VECTOR, 0)), "not finite"),
        (lambda: (ops.sin, []), "expects tensors or arrays as `x`"),
        (lambda: (ops.sin, [np.ones((3, 2)), np.ones((2, 2))]), "inputs with one batch size"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        kg.diagnostics.batch_independence(*arguments())


def test_training_is_for_models():
    with pytest.raises(ValueError, match="no `training` for functions"):
        kg.diagnostics.batch_independence(ops.sin, examples(VECTOR, 0), training=True)
    with pytest.raises(ValueError, match="True or False as `training`"):
        kg.diagnostics.batch_independence(ops.sin, examples(VECTOR, 0), training=1)
