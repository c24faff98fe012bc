"""Transforms on Keras models: the right values, and a model that is afterwards what it was before."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from tests.cases import close, tensor
from tests.transforms.models import (
    BATCH,
    AddsLoss,
    Mode,
    Setting,
    assign,
    built,
    contract,
    dropout_model,
    example,
    fresh,
    key,
    losses_model,
    near,
    numpy,
    state,
    unchanged,
)

EVERY_MODE = [
    Mode("dense", False),
    Mode("normalization", True),
    Mode("normalization", False),
    Mode("dropout", True),
    Mode("losses", False),
    Mode("everything", True),
    Mode("nested", True),
    Mode("several", False),
    Mode("frozen", True),
]
with_every_mode = pytest.mark.parametrize("mode", EVERY_MODE, ids=repr)


@with_every_mode
class TestEveryModel:
    def test_functionalize_is_the_model(self, mode):
        s = Setting(*mode)
        outputs, losses = s._evaluate(s.point)
        with unchanged(s.model):
            near(s.outputs(s.weights, s.x), outputs, 1e-5)
            found, found_losses = s.fun(s.weights, s.x, training=mode.training, return_losses=True)
            near(found, outputs, 1e-5)
            # Each loss once, in Keras' own order: of the calls, then of the regularizers.
            near(found_losses, [np.float64(x) for x in losses], 1e-5)
            moved = [p + 0.1 * d for p, d in zip(s.point, s.direction()[1], strict=True)]
            number = len(s.weights)
            near(
                s.outputs([tensor(p) for p in moved[:number]], keras.tree.pack_sequence_as(s.x, moved[number:])),
                s.numpy_outputs(moved),
                1e-5,
            )

    def test_gradients_by_weights_by_inputs_and_by_both(self, mode):
        s = Setting(*mode)
        expected, number = s.numpy_gradient(), len(s.weights)
        with unchanged(s.model):
            value, both = kg.value_and_grad(s.loss, argnums=(0, 1))(s.weights, s.x)
            near(value, s.numpy_loss(s.point))
            near(both, expected)
            if mode.name in ("normalization", "losses", "several"):
                near(kg.grad(s.loss)(s.weights, s.x), expected[:number])
                near(kg.grad(s.loss, argnums=1)(s.weights, s.x), expected[number:])


# "everything" has what the smaller ones have.
PRODUCTS = [Mode("everything", True), Mode("nested", True), Mode("several", False), Mode("frozen", True)]


@pytest.mark.parametrize("mode", PRODUCTS, ids=repr)
def test_products_with_the_jacobian(mode):
    s = Setting(*mode)
    jacobians = s.numpy_jacobians()
    tangents, direction = s.direction()
    pushed = contract(jacobians, direction)
    pulled = [
        sum(np.tensordot(c, row[k], axes=c.ndim) for c, row in zip(s.factors, jacobians, strict=True))
        for k in range(len(direction))
    ]
    with unchanged(s.model):
        out, tangent = kg.jvp(s.outputs, (s.weights, s.x), tangents)
        near(out, s.numpy_outputs(s.point))
        near(tangent, pushed)
        out, pullback = kg.vjp(s.outputs, s.weights, s.x)
        near(out, s.numpy_outputs(s.point))
        near(pullback(keras.tree.pack_sequence_as(out, s.factors)), pulled)
        out, pushforward = kg.linearize(s.outputs, s.weights, s.x)
        near(out, s.numpy_outputs(s.point))
        near(pushforward(*tangents), pushed)
        near(
            pushforward([None] * len(s.weights), tangents[1]),
            contract([row[len(s.weights) :] for row in jacobians], keras.tree.flatten(tangents[1])),
        )


@pytest.mark.parametrize("mode", [Mode("several", False), Mode("everything", True), Mode("frozen", True)], ids=repr)
class TestMatrices:
    def test_jacobian(self, mode):
        s = Setting(*mode)
        expected, number = s.numpy_jacobians(), len(s.weights)
        with unchanged(s.model):
            for _ in range(2):
                near(kg.jacobian(s.outputs, argnums=(0, 1))(s.weights, s.x), expected)
            found = kg.jacobian(s.outputs, argnums=1, mode="forward")(s.weights, s.x)
            near(found, [row[number:] for row in expected])

    def test_gauss_newton(self, mode):
        s = Setting(*mode)
        tangents, direction = s.direction()
        jacobians = s.numpy_jacobians()
        pushed = [2 * c * p for c, p in zip(s.factors, contract(jacobians, direction), strict=True)]
        expected = [
            sum(np.tensordot(u, row[k], axes=u.ndim) for u, row in zip(pushed, jacobians, strict=True))
            for k in range(len(direction))
        ]
        with unchanged(s.model):
            near(kg.ggnvp(s.outputs, s.score, (s.weights, s.x), tangents), expected, 3e-4)


SECOND_ORDER = [Mode("everything", True), Mode("nested", True), Mode("several", False)]


@pytest.mark.parametrize("mode", SECOND_ORDER, ids=repr)
def test_products_with_the_hessian(mode):
    s = Setting(*mode)
    tangents, direction = s.direction()
    expected = s.numpy_hvp(direction)
    by_weights = s.numpy_hvp([d if k < len(s.weights) else 0 * d for k, d in enumerate(direction)])
    with unchanged(s.model):
        near(kg.hvp(s.loss, (s.weights, s.x), tangents), expected, 3e-4)
        (found,) = kg.hvp(lambda w: s.loss(w, s.x), (s.weights,), tangents[:1])
        near(found, by_weights[: len(s.weights)], 3e-4)


@pytest.mark.parametrize("mode", [Mode("frozen", True)], ids=repr)
def test_hessian(mode):
    s = Setting(*mode)
    _, direction = s.direction()
    expected = np.concatenate([p.ravel() for p in s.numpy_hvp(direction)])
    with unchanged(s.model):
        blocks = kg.hessian(s.loss, argnums=(0, 1))(s.weights, s.x)
        matrix = numpy(kg.flatten_hessian(blocks)[0])
    near(matrix @ np.concatenate([d.ravel() for d in direction]), expected, 3e-4)
    near(matrix, matrix.T, 1e-5)


@pytest.mark.parametrize("name", ["dense", "normalization", "several"])
def test_batch_jacobian_of_independent_examples(name):
    s = Setting(name)
    number = len(s.weights)
    expected = [[np.stack([j[b][:, b] for b in range(BATCH)]) for j in row[number:]] for row in s.numpy_jacobians()]
    with unchanged(s.model):
        near(kg.batch_jacobian(lambda x: s.outputs(s.weights, x))(s.x), expected)
        near(kg.batch_jacobian(s.model)(s.x), expected)


@pytest.mark.parametrize(
    "mode", [pytest.param(Mode("losses", False), marks=pytest.mark.fast_on("torch")), Mode("dropout", True)], ids=repr
)
def test_the_gradient_of_each_example(mode):
    """Each is the gradient of a batch of one, its activity regularizer and its mask those of one example."""
    s = Setting(*mode)

    def loss(w, x):
        outputs, losses = s.fun(w, x, training=mode.training, return_losses=True)
        return ops.sum(outputs * outputs) + sum(losses)

    with unchanged(s.model):
        found = kg.per_example_grad(loss)(s.weights, s.x)
    x = s.x
    for b in range(BATCH):
        s.x, s.factors = x[b : b + 1], [np.ones((1, 2))]
        s.mask = s._mask()
        near([g[b] for g in found], s.numpy_gradient()[: len(s.weights)])


class TestModes:
    def test_the_modes_differ(self):
        training, inference = (Setting("normalization", t) for t in (True, False))
        by_training, by_inference = (kg.grad(s.loss)(s.weights, s.x) for s in (training, inference))
        near(by_training, training.numpy_gradient()[:6])
        near(by_inference, inference.numpy_gradient()[:6])
        assert np.abs(numpy(by_training[0]) - numpy(by_inference[0])).max() > 0.1

    @pytest.mark.parametrize("seed", [3, None])
    def test_two_calls_draw_the_same_mask(self, seed, backend):
        if seed is None and backend == "torch":
            pytest.skip("without a seed, Keras' dropout draws from torch's global generator")
        model = built(dropout_model(seed))
        fun, weights = kg.functionalize(model)
        x = example(model)

        def loss(w):
            return ops.sum(fun(w, x, training=True) ** 2)

        with unchanged(model):
            first, second = (numpy(kg.value_and_grad(loss)(weights)) for _ in range(2))
            near(second, first, 1e-6)
            near(loss(weights), first[0], 1e-6)

    def test_a_mask_is_another_after_training(self):
        model = fresh("dropout")
        seeds = [v for v in model.variables if "seed" in v.path]
        assert len(seeds) == 1
        before, masks = numpy(seeds[0].value), [Setting("dropout", True, model=model).mask]
        train = kg.jit(lambda x: model(x, training=True))
        for _ in range(2):
            train(tensor(example(model)))
            after = numpy(seeds[0].value)
            assert not np.array_equal(before, after)
            before = after
            s = Setting("dropout", True, model=model)
            masks.append(s.mask)
            with unchanged(model):
                near(kg.grad(s.loss)(s.weights, s.x), s.numpy_gradient()[:4])
        assert not np.array_equal(masks[0], masks[1]) and not np.array_equal(masks[1], masks[2])

    def test_unseeded_dropout_is_one_mask_in_one_call(self):
        """<u, J v> = <J' u, v>, and H is symmetric, whichever mask is drawn."""
        model = built(dropout_model(seed=None))
        fun, weights = kg.functionalize(model)
        rng = np.random.default_rng(0)
        v, u = ([rng.normal(size=w.shape).astype("float32") for w in weights] for _ in range(2))

        def gradient(w):
            return kg.grad(lambda w: ops.sum(fun(w, example(model), training=True) ** 2))(w)

        with unchanged(model):
            _, pushforward = kg.linearize(gradient, weights)
            hv, hu = pushforward(v), pushforward(u)
        left, right = (sum(np.sum(a * numpy(b)) for a, b in zip(*pair, strict=True)) for pair in ((u, hv), (v, hu)))
        assert abs(left) > 1
        np.testing.assert_allclose(left, right, rtol=1e-4)


@keras.saving.register_keras_serializable("test_models")
class SlopeOf(layers.Layer):
    """Calls a layer that adds a loss, and again inside a transform."""

    def __init__(self, **options):
        super().__init__(**options)
        self.inner = AddsLoss()

    def call(self, x):
        y = self.inner(x)
        slope = kg.grad(lambda x: ops.sum(self.inner(x) ** 3))(x)
        return y + slope


class TestLosses:
    def test_a_transform_inside_a_layer_counts_no_loss_twice(self):
        model = keras.Sequential([layers.Input((3,)), SlopeOf()])
        x = example(model)
        expected = 0.3 * np.mean(x**2)
        near(model(x), x + 3 * x**2, 1e-5)
        assert len(model.losses) == 1
        near(model.losses[0], expected, 1e-5)
        fun, weights = kg.functionalize(model)
        assert weights == []
        with unchanged(model):
            _, losses = fun([], x, return_losses=True)
            assert len(losses) == 1
            near(losses[0], expected, 1e-5)
            gradient = kg.grad(lambda x: fun([], x, return_losses=True)[1][0])(x)
            near(gradient, 0.6 * x / x.size, 1e-5)
        model.compile(keras.optimizers.SGD(0.1), "mse")
        history = model.fit(x, x, batch_size=BATCH, epochs=2, verbose=0)
        np.testing.assert_allclose(history.history["loss"], expected + np.mean(9 * x**4), rtol=1e-5)

    def test_of_a_model_that_is_called_directly(self):
        """Its losses enter the gradient as they are, and stay what they were outside."""
        model = fresh("losses")
        s = Setting("losses", model=model)

        def loss(x):
            return s.score(model(x)) + sum(model.losses)

        with unchanged(model):
            near(kg.grad(loss)(s.x), s.numpy_gradient()[4])
        with kg.GradientTape() as tape:
            y = loss(tensor(s.x))
        near(tape.gradient(y, model.trainable_variables), s.numpy_gradient()[:4])

    def test_under_the_tape_and_in_functional_form_are_the_same(self):
        s = Setting("everything", True)
        values = state(s.model)
        with kg.GradientTape() as tape:
            y = s.score(s.model(s.x, training=True)) + sum(s.model.losses)
        found = tape.gradient(y, s.model.trainable_variables)
        assign(s.model, values)
        near(found, numpy(kg.grad(s.loss)(s.weights, s.x)), 1e-5)


class TestWeights:
    def test_they_are_copies_in_the_order_of_the_trainable_variables(self):
        model = fresh("nested")
        before = numpy([v.value for v in model.trainable_variables])
        _, weights = kg.functionalize(model)
        close(weights, before, rtol=0, atol=0)
        for v in model.trainable_variables:
            v.assign(0 * v)
        close(weights, before, rtol=0, atol=0)

    def test_a_shared_layer_gets_the_sum_of_its_places(self):
        """x -> (x w) w: 2 x w."""
        shared = layers.Dense(1, use_bias=False)
        model = keras.Sequential([layers.Input((1,)), shared, layers.Dense(1, use_bias=False)])
        doubled = keras.Model(model.inputs, shared(model(model.inputs[0])))
        shared.kernel.assign([[3.0]])
        model.layers[1].kernel.assign([[5.0]])
        fun, weights = kg.functionalize(doubled)
        x = np.array([[2.0]], "float32")
        with unchanged(doubled, model):
            found = kg.grad(lambda w: ops.sum(fun(w, x)))(weights)
            close(found, [np.array([[2 * 2 * 3 * 5.0]]), np.array([[2 * 3 * 3.0]])])
            assert numpy(kg.hessian(lambda w: ops.sum(fun(w, x)))(weights)[0][0]).item() == pytest.approx(20)

    def test_frozen_ones_enter_with_their_current_values(self):
        s = Setting("frozen", True)
        assert [key(v) for v in s.model.trainable_variables] == ["out/kernel", "out/bias"]
        assert [tuple(w.shape) for w in s.weights] == [(4, 2), (2,)]
        jacobian, compiled = kg.jacobian(s.outputs, argnums=(0, 1)), kg.jit(kg.grad(s.loss))
        for factor in (1, 2, -0.5):
            for name in ("hidden/kernel", "norm/moving_mean", "norm/gamma"):
                (v,) = [v for v in s.model.weights if key(v) == name]
                v.assign(factor * v)
            with unchanged(s.model):
                near(jacobian(s.weights, s.x), s.numpy_jacobians())
                near(kg.grad(s.loss)(s.weights, s.x), s.numpy_gradient()[:2])
                near(compiled(s.weights, s.x), s.numpy_gradient()[:2])
        # Never what the model holds in the place of what was given.
        s.model.get_layer("out").kernel.assign(np.zeros((4, 2)))
        near(jacobian(s.weights, s.x), s.numpy_jacobians())

    @pytest.mark.parametrize(
        "transform", [kg.jacobian, kg.batch_jacobian, lambda f: kg.jit(kg.grad(lambda x: ops.sum(f(x))))]
    )
    def test_new_ones_are_seen_and_nothing_is_traced_again(self, transform, backend):
        model = built(losses_model())
        transformed = transform(lambda x: model(x))
        x = tensor(example(model))
        before = numpy(transformed(x))
        transformed(x)
        runs = AddsLoss.runs
        for factor in (2.0, 0.0):
            (kernel,) = [v for v in model.weights if key(v) == "out/kernel"]
            values = numpy(kernel.value)
            kernel.assign(factor * values)
            # The output is linear in the last kernel.
            near(transformed(x), factor * before, 1e-5)
            kernel.assign(values)
        assert backend == "torch" or AddsLoss.runs == runs

    def test_of_functional_form_nothing_is_traced_again(self, backend):
        s = Setting("losses")
        hessian = kg.hessian(s.loss)
        compiled = kg.jit(kg.value_and_grad(s.loss))
        tangents = s.direction()[0]
        compiled_product = kg.jit(lambda w, v: kg.hvp(lambda w: s.loss(w, s.x), (w,), (v,)))
        calls = [
            lambda w: hessian(w, s.x)[0][0],
            lambda w: compiled(w, s.x),
            lambda w: compiled_product(w, [tensor(t) for t in tangents[0]]),
        ]
        for call in calls:
            first = numpy(call(s.weights))
            runs = AddsLoss.runs
            near(call([w + 0.0 for w in s.weights]), first, 1e-6)
            assert backend == "torch" or AddsLoss.runs == runs


class TestLayers:
    def test_several_inputs_and_keywords(self):
        layer = Bilinear()
        a, b = (np.random.default_rng(k).normal(size=(4, k)).astype("float32") for k in (2, 3))
        layer(a, b)
        kernel = np.arange(6, dtype="float32").reshape(2, 3)
        layer.kernel.assign(kernel)
        fun, weights = kg.functionalize(layer)
        close(fun(weights, a, b, power=2), np.sum(a @ kernel * b, axis=1) ** 2, rtol=1e-4)
        found = kg.grad(lambda w, a, b: ops.sum(fun(w, a, b)), argnums=(0, 1, 2))(weights, a, b)
        near(found, [a.T @ b, b @ kernel.T, a @ kernel], 1e-5)
        found = kg.grad(lambda w, a, b: ops.sum(fun(w, a, b, training=True)), argnums=(0, 2))(weights, a, b)
        near(found, [3 * a.T @ b, 3 * a @ kernel], 1e-5)
        close(layer.kernel.value, kernel, rtol=0, atol=0)


class Bilinear(layers.Layer):
    def build(self, a_shape, b_shape):
        self.kernel = self.add_weight(shape=(a_shape[-1], b_shape[-1]))

    def call(self, a, b, power=1, training=False):
        return ops.sum(ops.matmul(a, self.kernel) * b, axis=1) ** power * (3 if training else 1)


def _functional():
    return kg.functionalize(fresh("dense"))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: kg.functionalize(3), "takes a Keras model or layer. Received: 3"),
        (lambda: kg.functionalize(ops.tanh), "takes a Keras model or layer. Received: <function tanh"),
        (
            lambda: kg.functionalize(keras.Sequential([layers.Dense(1)], name="raw")),
            "built model. Received: the unbuilt model 'raw'",
        ),
        (lambda: kg.functionalize(layers.Dense(1, name="raw")), "built model. Received: the unbuilt model 'raw'"),
        (
            lambda: _functional()[0](_functional()[1][:3], np.ones((1, 3))),
            "\\(4, 2\\), \\(2,\\)\\]. Received: \\[\\(3, 4\\), \\(4,\\), \\(4, 2\\)\\]",
        ),
        (lambda: _functional()[0]([*_functional()[1], 1.0], np.ones((1, 3))), "Received: .*\\(2,\\), \\(\\)\\]"),
        (lambda: _functional()[0](_functional()[1][::-1], np.ones((1, 3))), "Received: \\[\\(2,\\), \\(4, 2\\)"),
        (lambda: _functional()[0](None, np.ones((1, 3))), "takes a list of weights of the shapes"),
        (lambda: _functional()[0](_functional()[1][0], np.ones((1, 3))), "Received: \\[\\(3, 4\\)\\]"),
    ],
)
def test_errors_of_functionalize(call, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call()
