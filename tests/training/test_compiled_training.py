"""`CompiledTraining`, and the steps of the other wrappers when they are compiled: the same weights as without."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(48, 8)).astype("float32")
Y = RANDOM.integers(0, 3, 48)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def classifier(*more, seed=0):
    keras.utils.set_random_seed(seed)
    return keras.Sequential([layers.Input((8,)), layers.Dense(16, activation="tanh"), *more, layers.Dense(3)])


def noisy():
    return classifier(layers.BatchNormalization(), layers.Dropout(0.3, seed=1), layers.Dropout(0.1))


class Physics(keras.Model):
    """A model whose loss has its derivatives."""

    def __init__(self):
        super().__init__()
        self.inner = classifier()
        self.inner_of_sum = lambda x: ops.sum(self.inner(x), axis=-1, keepdims=True)
        self.build((None, 8))

    def build(self, shape):
        self.inner.build(shape)
        super().build(shape)

    def call(self, x, training=None):
        self.add_loss(0.1 * ops.mean(kg.batch_jacobian(self.inner)(x) ** 2))
        return self.inner(x, training=training)


def trained(make, wrap, optimizer, epochs, batch_size=16, **options):
    """The history, the weights and the optimizer's variables after `fit`."""
    model = make()
    wrapper = wrap(model)
    wrapper.compile(optimizer(), LOSS, metrics=["accuracy"], **options)
    history = wrapper.fit(
        X, Y, batch_size=batch_size, epochs=epochs, shuffle=False, verbose=0, validation_data=(X[:20], Y[:20])
    )
    return history.history, model.get_weights(), [ops.convert_to_numpy(v) for v in wrapper.optimizer.variables]


def assert_same(found, expected, exactly):
    for name, values in expected[0].items():
        np.testing.assert_allclose(found[0][name], values, rtol=0 if exactly else 1e-4, atol=0 if exactly else 1e-5)
    for a, b in zip(found[1] + found[2], expected[1] + expected[2], strict=True):
        np.testing.assert_allclose(a, b, rtol=0 if exactly else 1e-3, atol=0 if exactly else 1e-4)


def same(model):
    return model


def adam(**options):
    return lambda: keras.optimizers.Adam(0.01, **options)


def everything():
    schedule = keras.optimizers.schedules.CosineDecay(0.01, 200)
    return keras.optimizers.AdamW(schedule, weight_decay=0.01, clipnorm=0.5)


OPTIMIZERS = {
    "everything": everything,
    "moving average": adam(use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=5),
    "accumulation": adam(gradient_accumulation_steps=3),
    "loss scale": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), dynamic_growth_steps=4),
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True, global_clipnorm=0.3),
    "sgd": lambda: keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, 20), weight_decay=0.01),
    "adadelta": lambda: keras.optimizers.Adadelta(0.5),
    "adafactor": lambda: keras.optimizers.Adafactor(0.01),
    "lion": lambda: keras.optimizers.Lion(0.001),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.01, momentum=0.9, centered=True),
    "ftrl": lambda: keras.optimizers.Ftrl(0.1),
}


def exactly(backend):
    # torch runs the recorded operations of the eager step.
    return backend == "torch"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_plain_training(optimizer, backend):
    if backend != "torch" and optimizer != "momentum":
        pytest.skip("on TensorFlow and JAX, Keras compiles the steps of both")
    run = OPTIMIZERS[optimizer]
    expected = trained(classifier, same, run, 5)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs its steps eagerly")
        assert_same(trained(classifier, kg.models.CompiledTraining, run, 5), expected, exactly(backend))


def test_three_hundred_steps(backend):
    if backend != "torch":
        pytest.skip("on TensorFlow and JAX, Keras compiles the steps of both")
    expected = trained(noisy, same, everything, 100)
    assert_same(trained(noisy, kg.models.CompiledTraining, everything, 100), expected, True)


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["plain", "exact"])
def test_three_hundred_steps_by_inductor(wrapper, backend):
    if backend != "torch":
        pytest.skip("inductor is torch's compiler")
    wrap, plain = (kg.models.CompiledTraining, same) if wrapper == "plain" else (WRAPPERS["exact"],) * 2
    expected = trained(noisy, plain, everything, 100, jit_compile=False)
    # Rounding grows over the steps: inductor rounds each of them differently.
    assert_same(trained(noisy, wrap, everything, 100, jit_compile="inductor"), expected, False)


class TestNamedCompilers:
    """`jit_compile` takes the names that `kg.jit` takes as `compiler`."""

    def test_an_unknown_name(self, backend):
        names = {"tensorflow": "inductor", "jax": "xla", "torch": "xla"}
        for name in (names[backend], "llvm"):
            with pytest.raises(ValueError, match=f"CompiledTraining expects True, False or 'auto'.*='{name}'"):
                kg.models.CompiledTraining(classifier()).compile("sgd", LOSS, jit_compile=name)

    def test_a_model_that_was_saved_on_another_backend(self, backend):
        model = kg.models.InputGradientRegularized(classifier(), 0.1)
        model.compile("sgd", LOSS)
        config = {**model.get_compile_config(), "jit_compile": {"torch": "xla"}.get(backend, "inductor")}
        model.compile_from_config(config)
        assert model.jit_compile is True

    def test_the_name_is_saved(self, backend, tmp_path):
        if backend == "jax":
            pytest.skip("JAX has one compiler")
        name = {"tensorflow": "xla", "torch": "inductor"}[backend]
        model = kg.models.InputGradientRegularized(classifier(), 0.1)
        model.compile("sgd", LOSS, jit_compile=name)
        assert model.jit_compile is True
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        assert loaded.get_compile_config()["jit_compile"] == name
        loaded.compile("sgd", LOSS, jit_compile=True)
        assert loaded.get_compile_config()["jit_compile"] is True


def test_derivatives_in_the_model():
    def fitted(wrap):
        keras.utils.set_random_seed(0)
        return trained(Physics, wrap, adam(), 4)

    # Rounding differs: in the eager step on torch, only the batch Jacobian is compiled.
    assert_same(fitted(kg.models.CompiledTraining), fitted(same), exactly=False)


WRAPPERS = {
    "exact": lambda model: kg.models.InputGradientRegularized(model, 0.1, method="exact"),
    "finite differences": lambda model: kg.models.InputGradientRegularized(model, 0.1, method="finite_difference"),
    "projections": lambda model: kg.models.InputGradientRegularized(
        model, 0.1, target="outputs", method="random_projection", seed=2
    ),
    "frozen statistics": lambda model: kg.models.InputGradientRegularized(
        model, 0.1, method="exact", frozen_statistics=True
    ),
    "pgd": lambda model: kg.models.AdversarialTraining(model, kg.attacks.PGD(0.1, steps=2), seed=4),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers(wrapper, backend):
    if backend != "torch":
        pytest.skip("on TensorFlow and JAX, Keras compiles the steps of both")
    wrap = WRAPPERS[wrapper]
    expected = trained(noisy, wrap, everything, 4, jit_compile=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs its steps eagerly")
        assert_same(trained(noisy, wrap, everything, 4, jit_compile=True), expected, True)


def test_mixed_precision(backend):
    if backend != "torch":
        pytest.skip("on TensorFlow and JAX, Keras compiles the steps of both")

    def make():
        before = keras.config.dtype_policy()
        keras.config.set_dtype_policy("mixed_bfloat16")
        try:
            return classifier()
        finally:
            keras.config.set_dtype_policy(before)

    optimizer = OPTIMIZERS["momentum"]
    found = trained(make, kg.models.CompiledTraining, optimizer, 3)
    assert_same(found, trained(make, same, optimizer, 3), True)


def test_a_layer_that_is_frozen_between_two_fits():
    model = classifier()
    compiled = kg.models.CompiledTraining(model)
    compiled.compile("adam", LOSS)
    compiled.fit(X, Y, epochs=4, verbose=0)
    before = model.layers[0].get_weights()
    model.layers[0].trainable = False
    compiled.compile("adam", LOSS)
    compiled.fit(X, Y, epochs=4, verbose=0)
    for a, b in zip(before, model.layers[0].get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_learning_rate_of_a_callback(backend):
    if backend != "torch":
        pytest.skip("on TensorFlow and JAX, Keras compiles the steps of both")

    def fitted(wrap):
        model = classifier()
        wrapper = wrap(model)
        wrapper.compile(keras.optimizers.SGD(0.1), LOSS)
        schedule = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
        wrapper.fit(X, Y, epochs=6, shuffle=False, verbose=0, callbacks=[schedule])
        return model.get_weights()

    for a, b in zip(fitted(kg.models.CompiledTraining), fitted(same), strict=True):
        np.testing.assert_array_equal(a, b)


def test_predict_and_evaluate():
    model = classifier(layers.Dropout(0.5))
    compiled = kg.models.CompiledTraining(model)
    compiled.compile("adam", LOSS, metrics=["accuracy"])
    model.compile("adam", LOSS, metrics=["accuracy"])
    for _ in range(2):
        np.testing.assert_allclose(
            compiled.predict(X, batch_size=8, verbose=0), model.predict(X, batch_size=8, verbose=0), rtol=1e-6
        )
        found = compiled.evaluate(X, Y, batch_size=8, verbose=0)
        np.testing.assert_allclose(found, model.evaluate(X, Y, batch_size=8, verbose=0), rtol=1e-5)
        model.set_weights([2 * w for w in model.get_weights()])


def test_a_step_that_cannot_be_recorded_says_so(backend):
    if backend != "torch":
        pytest.skip("on TensorFlow and JAX, Keras compiles the step, and an error says what it cannot compile")

    def loss(y, y_pred):
        return ops.mean((y_pred - ops.cast(y[:, None], "float32")) ** 2) * float(ops.mean(y_pred) ** 0)

    compiled = kg.models.CompiledTraining(classifier())
    compiled.compile("sgd", loss)
    with pytest.warns(UserWarning, match="CompiledTraining runs its steps eagerly.*Python reads the value of a tensor"):
        compiled.fit(X, Y, verbose=0)
