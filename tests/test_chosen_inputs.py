"""Models of a floating-point input and an integer one: the one is differentiated by, the other is carried along."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg

N, D, K = 6, 3, 2
RNG = np.random.default_rng(0)
X = RNG.uniform(0.2, 0.8, (N, D)).astype("float32")
CATEGORY = np.array([0, 1, 2, 0, 2, 1], "int32")
EXAMPLES = {"category": CATEGORY, "x": X}
TABLE = RNG.normal(size=(3, D)).astype("float32")
KERNEL = RNG.normal(size=(D, K)).astype("float32")
LABELS = np.array([0, 1, 0, 1, 1, 0], "int32")


@keras.saving.register_keras_serializable(package="tests")
class Sines(layers.Layer):
    """sin(x e_c), whose second derivative is not zero."""

    def call(self, inputs):
        x, embedded = inputs
        return ops.sin(x * embedded)

    def compute_output_shape(self, input_shape):
        return input_shape[0]


def conditional():
    """f(x, c) = V^T sin(x * e_c), with e the rows of an embedding."""
    x, category = keras.Input((D,), name="x"), keras.Input((), dtype="int32", name="category")
    embedded = layers.Embedding(3, D)(category)
    model = keras.Model({"x": x, "category": category}, layers.Dense(K, use_bias=False)(Sines()([x, embedded])))
    model.set_weights([TABLE, KERNEL])
    return model


def jacobian(x=X, category=CATEGORY):
    """Its Jacobian by x, of each example, of shape (N, K, D)."""
    e = TABLE[category].astype("float64")
    return np.einsum("dk,nd->nkd", KERNEL.astype("float64"), e * np.cos(x * e))


def numbers(x):
    return ops.convert_to_numpy(ops.stop_gradient(x)).astype("float64")


def close(found, expected, rtol=1e-4, atol=1e-5):
    np.testing.assert_allclose(numbers(found) if ops.is_tensor(found) else found, expected, rtol=rtol, atol=atol)


CHOICES = [None, "x", ["x"], 1]


@pytest.mark.parametrize("inputs", CHOICES)
@pytest.mark.parametrize("mode", ["auto", "forward", "reverse"])
def test_batch_jacobian(inputs, mode):
    found = kg.batch_jacobian(conditional(), mode, inputs=inputs)(EXAMPLES)
    assert found["category"] is None
    close(found["x"], jacobian())


@pytest.mark.parametrize("inputs", [None, "x"])
def test_batch_jacobian_in_chunks_inside_jit_and_by_lists(inputs):
    model = conditional()
    close(kg.batch_jacobian(model, chunk_size=2, inputs=inputs)(EXAMPLES)["x"], jacobian())
    compiled = kg.jit(lambda x, c: kg.batch_jacobian(model, inputs=inputs)({"category": c, "x": x})["x"])
    close(compiled(ops.convert_to_tensor(X), ops.convert_to_tensor(CATEGORY)), jacobian())

    def fun(inputs):
        return model({"x": inputs[0], "category": inputs[1]})

    position = None if inputs is None else 0
    by_x, by_category = kg.batch_jacobian(fun, inputs=position)([X, CATEGORY])
    assert by_category is None
    close(by_x, jacobian())


def test_new_categories_need_no_new_program():
    transformed = kg.batch_jacobian(conditional())
    transformed(EXAMPLES)
    close(transformed({"category": CATEGORY[::-1], "x": X})["x"], jacobian(category=CATEGORY[::-1]))


def test_several_floating_point_inputs_and_a_number_beside_them():
    def fun(inputs):
        a, b, step = inputs["a"], inputs["b"], ops.cast(inputs["step"], "float32")
        return step * a * ops.sum(b, axis=1, keepdims=True)

    inputs = {"a": X, "b": 2 * X, "step": np.int32(3)}
    both = kg.batch_jacobian(fun)(inputs)
    eye, total = np.eye(D)[None], (2 * X).sum(axis=1)[:, None, None]
    by_a, by_b = 3 * total * eye, 3 * X[:, :, None] * np.ones((1, 1, D))
    close(both["a"], by_a)
    close(both["b"], by_b)
    assert both["step"] is None
    one = kg.batch_jacobian(fun, inputs="b")(inputs)
    assert one["a"] is None
    close(one["b"], by_b)
    spectrum = kg.diagnostics.jacobian_spectrum(fun, inputs, inputs="b", method="implicit")
    close(spectrum.spectral_norm, np.linalg.svd(by_b, compute_uv=False)[:, 0])
    whole = kg.diagnostics.jacobian_spectrum(fun, inputs, method="explicit")
    expected = np.linalg.svd(np.concatenate([by_a, by_b], axis=2), compute_uv=False)
    close(whole.singular_values, expected)


@pytest.mark.parametrize("make", ["category", 0])
def test_an_input_without_a_gradient_is_no_choice(make):
    with pytest.raises(ValueError, match=r"batch_jacobian differentiates with respect to floating-point inputs.*int32"):
        kg.batch_jacobian(conditional(), inputs=make)(EXAMPLES)


def test_choices_that_do_not_fit():
    with pytest.raises(ValueError, match="that the model does not have.*'y'. The inputs are 'category', 'x'"):
        kg.batch_jacobian(conditional(), inputs="y")(EXAMPLES)
    with pytest.raises(ValueError, match="jacobian_spectrum expects the name of an input.*inputs=True"):
        kg.diagnostics.jacobian_spectrum(conditional(), EXAMPLES, inputs=True)
    with pytest.raises(ValueError, match="perturbs one floating-point input. Received: 2 of them.*`inputs`"):
        kg.attacks.fgsm(lambda z: z["a"] * z["b"], {"a": X, "b": X}, LABELS, 0.1, loss="mse")
    with pytest.raises(ValueError, match=r"inputs must have the same batch size or be scalars.*\(6, 3\), \(4,\)"):
        kg.attacks.fgsm(conditional(), {"category": CATEGORY[:4], "x": X}, LABELS, 0.1)


@pytest.mark.parametrize("method", ["explicit", "implicit"])
@pytest.mark.parametrize("inputs", [None, "x"])
def test_spectrum(method, inputs):
    spectrum = kg.diagnostics.jacobian_spectrum(conditional(), EXAMPLES, method=method, inputs=inputs)
    values = np.linalg.svd(jacobian(), compute_uv=False)
    close(spectrum.spectral_norm, values[:, 0], rtol=1e-3)
    close(spectrum.frobenius_norm, np.sqrt((values**2).sum(axis=1)), rtol=1e-3)


@pytest.mark.parametrize("inputs", [None, "x"])
def test_lipschitz_constant_of_a_small_ball_is_the_spectral_norm(inputs):
    found = kg.diagnostics.local_lipschitz(conditional(), EXAMPLES, radius=0.01, iterations=30, inputs=inputs)
    close(found, np.linalg.svd(jacobian(), compute_uv=False)[:, 0], rtol=0.03)


def test_independence_by_the_chosen_input_alone():
    assert kg.diagnostics.batch_independence(conditional(), EXAMPLES).independent
    assert kg.diagnostics.batch_independence(conditional(), EXAMPLES, inputs="x").independent

    def crossing(inputs):
        return inputs["x"] + ops.cast(ops.roll(inputs["category"], 1), "float32")[:, None]

    assert kg.diagnostics.batch_independence(crossing, EXAMPLES).independent is False
    assert kg.diagnostics.batch_independence(crossing, EXAMPLES, inputs="x").independent
    checked = kg.batch_jacobian(crossing, check_independence=True, inputs="x")
    close(checked(EXAMPLES)["x"], np.tile(np.eye(D), (N, 1, 1)))
    with pytest.raises(ValueError, match="depends on the input of others"):
        kg.batch_jacobian(crossing, check_independence=True)(EXAMPLES)

    def mixing(inputs):
        return inputs["x"] + ops.mean(inputs["x"])

    assert kg.diagnostics.batch_independence(mixing, EXAMPLES, inputs="x").independent is False


@pytest.mark.parametrize("inputs", [pytest.param(None, marks=pytest.mark.fast_on("torch")), "x"])
def test_layers(inputs):
    model = conditional()
    x, category = keras.Input((D,), name="x"), keras.Input((), dtype="int32", name="category")
    given = {"x": x, "category": category}
    by_x = keras.Model(given, kg.layers.BatchJacobian(model, inputs=inputs)(given))
    close(by_x(EXAMPLES), jacobian())
    laplacian = kg.layers.Laplacian(model, inputs=inputs)
    e = TABLE[CATEGORY].astype("float64")
    close(laplacian(EXAMPLES), -(e**2 * np.sin(X * e)) @ KERNEL)
    divergence = kg.layers.Divergence(model, axes=[0, 2], inputs=inputs)
    close(divergence(EXAMPLES), (jacobian()[:, 0, 0] + jacobian()[:, 1, 2])[:, None])
    again = kg.layers.BatchJacobian.from_config(kg.layers.BatchJacobian(model, inputs=inputs).get_config())
    again.layer.set_weights([TABLE, KERNEL])
    close(again(EXAMPLES), jacobian())


def test_a_layer_of_several_floating_point_inputs_wants_a_choice():
    a, b = keras.Input((D,), name="a"), keras.Input((D,), name="b")
    model = keras.Model([a, b], a * b)
    with pytest.raises(
        ValueError, match="BatchJacobian differentiates with respect to one input. Received: 2.*`inputs`"
    ):
        kg.layers.BatchJacobian(model)([X, X])
    close(kg.layers.BatchJacobian(model, inputs="b")([X, 2 * X]), X[:, :, None] * np.eye(D))


def cross_entropy_gradient(x, y=LABELS, category=CATEGORY):
    e = TABLE[category].astype("float64")
    logits = np.sin(x * e) @ KERNEL.astype("float64")
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p = p / p.sum(axis=1, keepdims=True) - np.eye(K)[y]
    return np.einsum("nk,nkd->nd", p, jacobian(x, category))


@pytest.mark.parametrize("inputs", [None, "x"])
@pytest.mark.parametrize("batch_size", [128, 4])
def test_fgsm_moves_the_chosen_input(inputs, batch_size):
    found = kg.attacks.fgsm(
        conditional(), EXAMPLES, LABELS, 0.05, inputs=inputs, batch_size=batch_size, verbose=0, clip=None
    )
    np.testing.assert_array_equal(found["category"], CATEGORY)
    close(found["x"], X + 0.05 * np.sign(cross_entropy_gradient(X)))


def test_the_attack_of_a_function_with_a_number_beside_the_examples():
    model = conditional()

    def fun(inputs):
        x, category, sign = inputs
        return ops.cast(sign, "float32") * model({"x": x, "category": category})

    inputs = [X, CATEGORY, np.int32(-1)]
    found = kg.attacks.fgsm(fun, inputs, LABELS, 0.05, batch_size=4, verbose=0, clip=None)
    close(found[0], X + 0.05 * np.sign(cross_entropy_gradient(X, 1 - LABELS)))


@pytest.mark.parametrize("norm", ["inf", 2])
def test_pgd_finds_what_is_worse_than_fgsm(norm):
    model = conditional()

    def loss(x):
        logits = numbers(model({"x": ops.convert_to_tensor(x), "category": ops.convert_to_tensor(CATEGORY)}))
        return np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(N), LABELS]

    attack = {"norm": norm, "verbose": 0, "clip": None, "loss": "cross_entropy"}
    one = kg.attacks.fgsm(model, EXAMPLES, LABELS, 0.2, **attack)
    many = kg.attacks.pgd(model, EXAMPLES, LABELS, 0.2, **attack, random_start=False, batch_size=4)
    assert np.all(loss(many["x"]) >= loss(one["x"]) - 1e-5)
    moved = np.abs(many["x"] - X).max(axis=1) if norm == "inf" else np.linalg.norm(many["x"] - X, axis=1)
    assert np.all(moved <= 0.2001)


@pytest.mark.fast_on("torch")
def test_metrics_and_report():
    model = conditional()
    metrics = kg.attacks.robustness_metrics(model, EXAMPLES, LABELS, (0.05,), steps=3, verbose=0, batch_size=4)
    lengths = np.linalg.norm(cross_entropy_gradient(X), axis=1)
    close(metrics["gradient_norm_mean"], lengths.mean(), rtol=1e-3)
    close(metrics["jacobian_norm"], np.sqrt((jacobian() ** 2).sum(axis=(1, 2)).mean()), rtol=1e-3)
    report = kg.attacks.robustness_report(model, EXAMPLES, LABELS, norm=2, steps=3, verbose=0, batch_size=4)
    logits = np.sin(X * TABLE[CATEGORY]) @ KERNEL
    margin = logits[np.arange(N), LABELS] - logits[np.arange(N), 1 - LABELS]
    close(report.margin, margin, rtol=1e-3)
    slope = np.linalg.norm(jacobian()[:, 0] - jacobian()[:, 1], axis=1)
    close(report.first_order, np.maximum(margin, 0) / slope, rtol=1e-3)


def compiled_model():
    model = conditional()
    model.compile(keras.optimizers.SGD(0.0), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


@pytest.mark.parametrize("inputs", [pytest.param(None, marks=pytest.mark.fast_on("torch")), "x"])
def test_monitors(inputs):
    jacobians = kg.callbacks.BatchJacobianMonitor(EXAMPLES, radius=0.01, inputs=inputs)
    attacks = kg.callbacks.RobustnessMonitor((EXAMPLES, LABELS), epsilons=(0.05,), steps=2, inputs=inputs)
    history = compiled_model().fit(EXAMPLES, LABELS, epochs=1, verbose=0, callbacks=[jacobians, attacks]).history
    values = np.linalg.svd(jacobian(), compute_uv=False)
    close(history["jacobian_spectral_norm_max"][0], values[:, 0].max(), rtol=1e-3)
    close(history["jacobian_local_lipschitz_max"][0], values[:, 0].max(), rtol=0.1)
    lengths = np.linalg.norm(cross_entropy_gradient(X), axis=1)
    close(history["val_gradient_norm_max"][0], lengths.max(), rtol=1e-3)


@pytest.mark.parametrize("inputs", [None, "x"])
def test_adversarial_training_is_on_the_attacked_input(inputs, tmp_path):
    model = conditional()
    adversarial = kg.models.AdversarialTraining(model, kg.attacks.FGSM(0.05, clip=None), inputs=inputs)
    adversarial.compile(keras.optimizers.SGD(0.0), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    moved = {"category": CATEGORY, "x": (X + 0.05 * np.sign(cross_entropy_gradient(X))).astype("float32")}
    loss = adversarial.fit(EXAMPLES, LABELS, verbose=0, batch_size=N).history["loss"][0]
    close(loss, adversarial.evaluate(moved, LABELS, verbose=0))
    adversarial.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    close(again.fit(EXAMPLES, LABELS, verbose=0, batch_size=N).history["loss"][0], loss)
