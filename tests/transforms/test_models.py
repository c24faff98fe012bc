"""Transforms on Keras models: the right values, and a model that is afterwards what it was before.

The references are the same models in NumPy, in double precision; a step into the complex plane takes their
derivatives without a rounding error.
"""

import contextlib
import functools
import typing

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from tests.cases import close, tensor


@keras.saving.register_keras_serializable("test_models")
class AddsLoss(layers.Layer):
    """The identity, with a loss on what passes; it counts how often its Python runs."""

    runs = 0

    def call(self, x):
        type(self).runs += 1
        self.add_loss(0.3 * ops.mean(x * x))
        return x


def dense_model():
    return [layers.Input((3,)), layers.Dense(4, "tanh", name="hidden"), layers.Dense(2, name="out")]


def normalization_model():
    first, hidden, out = dense_model()
    return [first, hidden, layers.BatchNormalization(momentum=0.9, name="norm"), out]


def dropout_model(seed=3):
    return [
        layers.Input((3,)),
        layers.Dense(6, "tanh", name="hidden"),
        layers.Dropout(0.5, seed=seed, name="drop"),
        layers.Dense(2, name="out"),
    ]


def losses_model():
    hidden = layers.Dense(4, "tanh", kernel_regularizer=keras.regularizers.L2(0.1), name="hidden")
    hidden.activity_regularizer = keras.regularizers.L2(0.2)
    return [layers.Input((3,)), hidden, AddsLoss(name="adds"), layers.Dense(2, name="out")]


def everything_model():
    first, hidden, adds, out = losses_model()
    return [
        first,
        hidden,
        layers.BatchNormalization(momentum=0.9, name="norm"),
        layers.Dropout(0.5, seed=3, name="drop"),
        adds,
        out,
    ]


def nested_model():
    """A model in a model, and one layer used twice."""
    shared = layers.Dense(3, "tanh", name="shared")
    inner = keras.Sequential([layers.Dense(3, "tanh", name="inner"), layers.BatchNormalization(name="norm")])
    x = layers.Input((3,))
    return keras.Model(x, shared(inner(shared(x))) + x)


def several_model():
    """Two inputs, which are used unequally, and two outputs."""
    a, b = layers.Input((2,)), layers.Input((3,))
    h = layers.Dense(3, "tanh", name="hidden")(layers.Concatenate()([a, b]))
    return keras.Model([a, b], [layers.Dense(1, name="out")(h), layers.Multiply()([h, b])])


def frozen_model():
    """The first layer and the statistics stand still; so does the normalization, also in training mode."""
    model = keras.Sequential(normalization_model())
    for name in ("hidden", "norm"):
        model.get_layer(name).trainable = False
    return model


def dense(v, name, x):
    return x @ v[f"{name}/kernel"] + v[f"{name}/bias"]


def normalized(v, x, training):
    mean = x.mean(0) if training else v["norm/moving_mean"]
    variance = ((x - mean) ** 2).mean(0) if training else v["norm/moving_variance"]
    return v["norm/gamma"] * (x - mean) / np.sqrt(variance + 1e-3) + v["norm/beta"]


def dense_reference(v, x, training, mask):
    return [dense(v, "out", np.tanh(dense(v, "hidden", x)))], []


def normalization_reference(v, x, training, mask):
    return [dense(v, "out", normalized(v, np.tanh(dense(v, "hidden", x)), training))], []


def dropout_reference(v, x, training, mask):
    return [dense(v, "out", mask * np.tanh(dense(v, "hidden", x)))], []


def activity_loss(h):
    """The regularizer's loss of an activity: newer versions of Keras divide it by the batch size, older ones do not."""
    probe = layers.Activation("linear", activity_regularizer=keras.regularizers.L2(1.0))
    probe(np.ones((2, 1), "float32"))
    is_mean = float(numpy(probe.losses[0])) < 1.5
    return 0.2 * np.sum(h**2) / (len(h) if is_mean else 1)


def losses_reference(v, x, training, mask):
    h = np.tanh(dense(v, "hidden", x))
    losses = [activity_loss(h), 0.3 * np.mean(h**2), 0.1 * np.sum(v["hidden/kernel"] ** 2)]
    return [dense(v, "out", h)], losses


def everything_reference(v, x, training, mask):
    h = np.tanh(dense(v, "hidden", x))
    dropped = mask * normalized(v, h, training)
    losses = [activity_loss(h), 0.3 * np.mean(dropped**2), 0.1 * np.sum(v["hidden/kernel"] ** 2)]
    return [dense(v, "out", dropped)], losses


def nested_reference(v, x, training, mask):
    h = np.tanh(dense(v, "inner", np.tanh(dense(v, "shared", x))))
    return [np.tanh(dense(v, "shared", normalized(v, h, training))) + x], []


def several_reference(v, inputs, training, mask):
    a, b = inputs
    h = np.tanh(dense(v, "hidden", np.concatenate([a, b], axis=1)))
    return [dense(v, "out", h), h * b], []


def frozen_reference(v, x, training, mask):
    return normalization_reference(v, x, False, mask)


MODELS = {
    "dense": (dense_model, dense_reference),
    "normalization": (normalization_model, normalization_reference),
    "dropout": (dropout_model, dropout_reference),
    "losses": (losses_model, losses_reference),
    "everything": (everything_model, everything_reference),
    "nested": (nested_model, nested_reference),
    "several": (several_model, several_reference),
    "frozen": (frozen_model, frozen_reference),
}
BATCH = 5


def numpy(structure):
    return keras.tree.map_structure(ops.convert_to_numpy, structure)


def key(variable):
    return "/".join(variable.path.split("/")[-2:])


def state(model):
    """The value of every variable, seeds and all. A tracer has none, and raises."""
    return [np.array(ops.convert_to_numpy(v.value)) for v in model.variables]


def assign(model, values):
    for variable, value in zip(model.variables, values, strict=True):
        variable.assign(value)


def example(model, seed=1):
    """Some inputs, in the model's nesting."""
    rng = np.random.default_rng(seed)
    inputs = model.inputs if len(model.inputs) > 1 else model.inputs[0]
    return keras.tree.map_structure(lambda i: rng.normal(size=(BATCH, *i.shape[1:])).astype("float32"), inputs)


def randomize(model):
    """Weights in general position, the same on every backend."""
    rng = np.random.default_rng(0)
    for v in model.weights:
        value = rng.normal(0, 0.5, v.shape)
        v.assign(abs(value) + 0.5 if "variance" in v.path or "gamma" in v.path else value)
    return model


def built(parts):
    return randomize(keras.Sequential(parts) if isinstance(parts, list) else parts)


@functools.cache
def _model_and_state(name):
    model = built(MODELS[name][0]())
    return model, state(model)


def fresh(name):
    """The model of that name, in its first state. It is built once, for the sake of what `predict` compiles."""
    model, values = _model_and_state(name)
    assign(model, values)
    return model


def same(actual, desired):
    for a, b in zip(actual, desired, strict=True):
        np.testing.assert_array_equal(a, b)


@contextlib.contextmanager
def unchanged(*models):
    """Asserts that the block leaves of the models every variable, loss, flag and prediction as it was."""
    inputs = [example(m, seed=2) for m in models]

    def look(model, x):
        marks = [(v.trainable, getattr(v._value, "requires_grad", None)) for v in model.variables]
        return state(model), numpy(list(model.losses)), marks

    predictions = [keras.tree.flatten(m.predict(x, verbose=0)) for m, x in zip(models, inputs, strict=True)]
    for m, x in zip(models, inputs, strict=True):
        m(x)  # whose losses are those of an eager call
    before = [look(m, x) for m, x in zip(models, inputs, strict=True)]
    yield
    for m, x, (values, losses, marks), predicted in zip(models, inputs, before, predictions, strict=True):
        assert_concrete(m)
        values_after, losses_after, marks_after = look(m, x)
        same(values_after, values)
        assert marks_after == marks
        same(keras.tree.flatten(m.predict(x, verbose=0)), predicted)
        same(losses_after, losses)


def assert_concrete(model):
    for v in model.variables:
        if keras.config.backend() == "jax":
            import jax

            assert not isinstance(v._value, jax.core.Tracer), v.path
        if keras.config.backend() == "torch":
            assert v._value.grad_fn is None and v._value.grad is None, v.path


def by_complex_step(fun, leaves):
    """The Jacobian of `fun`, from a list of arrays to one array, by each of them."""
    jacobians = []
    for k, leaf in enumerate(leaves):
        columns = []
        for i in np.ndindex(leaf.shape):
            moved = [x.astype(complex) for x in leaves]
            moved[k][i] += 1e-30j
            columns.append(np.imag(fun(moved)) / 1e-30)
        out = columns[0].shape
        jacobians.append(np.moveaxis(np.array(columns), 0, -1).reshape(*out, *leaf.shape))
    return jacobians


def near(actual, desired, tolerance=1e-4):
    """Close, for the scale of all the values."""
    actual, desired = keras.tree.flatten(actual), keras.tree.flatten(desired)
    assert len(actual) == len(desired)
    scale = max([1.0, *(np.max(np.abs(d), initial=0) for d in desired)])
    for a, d in zip(actual, desired, strict=True):
        close(a, d, rtol=tolerance, atol=tolerance * scale)


class Setting:
    """A model in one mode: its functional form and a scalar loss, and both in NumPy."""

    def __init__(self, name, training=False, model=None):
        self.model = model or fresh(name)
        self.training = training
        self.reference = MODELS[name][1]
        self.fun, self.weights = kg.functionalize(self.model)
        self.x = example(self.model)
        rng = np.random.default_rng(3)
        shapes = [tuple(y.shape) for y in keras.tree.flatten(self.fun(self.weights, self.x))]
        self.factors = [rng.normal(size=s).astype("float32") for s in shapes]
        self.mask = self._mask()

    def _mask(self):
        """What Dropout multiplies by: it draws the same as long as its seed stands still."""
        if not self.training or not any(layer.name == "drop" for layer in self.model.layers):
            return 1.0
        drop = self.model.get_layer("drop")
        given, dropped = kg.functionalize(keras.Model(self.model.inputs, [drop.input, drop.output]))[0](
            self.weights[: 2 if len(self.weights) == 4 else 4], self.x, training=True
        )
        mask = numpy(dropped) / numpy(given)
        assert {2.0} <= set(np.unique(np.round(mask, 3))) <= {0.0, 2.0}
        return np.round(mask)

    def outputs(self, weights, x):
        return self.fun(weights, x, training=self.training)

    def loss(self, weights, x):
        outputs, losses = self.fun(weights, x, training=self.training, return_losses=True)
        return self.score(outputs) + sum(losses)

    def score(self, outputs):
        return sum(ops.sum(tensor(c) * y * y) for c, y in zip(self.factors, keras.tree.flatten(outputs), strict=True))

    # The same in NumPy, of a list of arrays: the weights, then the inputs.

    @property
    def point(self):
        return [x.astype("float64") for x in numpy([*self.weights, *keras.tree.flatten(self.x)])]

    def _evaluate(self, leaves):
        number = len(self.weights)
        values = {key(v): ops.convert_to_numpy(v.value).astype("float64") for v in self.model.weights}
        values |= {key(v): w for v, w in zip(self.model.trainable_variables, leaves[:number], strict=True)}
        return self.reference(values, keras.tree.pack_sequence_as(self.x, leaves[number:]), self.training, self.mask)

    def numpy_outputs(self, leaves):
        return self._evaluate(leaves)[0]

    def numpy_loss(self, leaves):
        outputs, losses = self._evaluate(leaves)
        return sum(np.sum(c * y * y) for c, y in zip(self.factors, outputs, strict=True)) + sum(losses)

    def numpy_gradient(self, leaves=None):
        return by_complex_step(self.numpy_loss, self.point if leaves is None else leaves)

    def numpy_jacobians(self):
        """For each output, by each leaf."""
        number = len(self.factors)
        return [by_complex_step(lambda p: self.numpy_outputs(p)[k], self.point) for k in range(number)]  # noqa: B023

    def numpy_hvp(self, direction, h=1e-5):
        ahead, behind = (
            self.numpy_gradient([p + s * h * d for p, d in zip(self.point, direction, strict=True)]) for s in (1, -1)
        )
        return [(a - b) / (2 * h) for a, b in zip(ahead, behind, strict=True)]

    def direction(self, seed=4):
        """Tangents as the transforms take them, `(for weights, for x)`, and as a list."""
        rng = np.random.default_rng(seed)
        flat = [rng.normal(size=p.shape).astype("float32") for p in self.point]
        number = len(self.weights)
        return (flat[:number], keras.tree.pack_sequence_as(self.x, flat[number:])), flat


def contract(jacobians, direction):
    return [sum(np.tensordot(j, d, axes=d.ndim) for j, d in zip(row, direction, strict=True)) for row in jacobians]


class Mode(typing.NamedTuple):
    name: str
    training: bool

    def __repr__(self):
        return f"{self.name}-{'training' if self.training else 'inference'}"


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

    def test_products_with_the_jacobian(self, mode):
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


@pytest.mark.parametrize("mode", [Mode("losses", False), Mode("dropout", True)], ids=repr)
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


def train_step(model):
    """Gradient descent by hand, on a model in training mode."""

    def step(x, y):
        with kg.GradientTape() as tape:
            loss = ops.mean((model(x, training=True) - y) ** 2) + sum(model.losses)
        gradients = tape.gradient(loss, model.trainable_variables)
        for v, g in zip(model.trainable_variables, gradients, strict=True):
            v.assign(v - 0.1 * g)
        return loss

    return step


class TestJit:
    def test_a_train_step_is_the_eager_one(self):
        model = fresh("everything")
        first = state(model)
        x, y = tensor(example(model)), tensor(np.ones((BATCH, 2)))
        runs = []
        for step in (train_step(model), kg.jit(train_step(model))):
            assign(model, first)
            losses = numpy([step(x, y) for _ in range(3)])
            assert_concrete(model)
            runs.append((losses, state(model)))
        (eager_losses, eager), (losses, compiled) = runs
        near(losses, eager_losses, 1e-5)
        near(compiled, [v.astype("float64") for v in eager], 1e-5)
        for v, a, b in zip(model.variables, compiled, first, strict=True):
            assert not np.array_equal(a, b), f"{v.path} stood still"

    def test_a_tape_inside_sees_the_regularizers(self):
        """0.1 |w|^2: 0.2 w."""
        layer = layers.Dense(1, use_bias=False, kernel_regularizer=keras.regularizers.L2(0.1))
        model = keras.Sequential([layers.Input((2,)), layer])
        layer.kernel.assign([[1.0], [2.0]])

        def gradient(x):
            with kg.GradientTape() as tape:
                y = ops.sum(model(x)) + sum(model.losses)
            return tape.gradient(y, layer.kernel)

        for compiled in (gradient, kg.jit(gradient)):
            close(compiled(tensor([[3.0, 5.0]])), [[3.2], [5.4]])

    def test_statistics_are_written_back_once_a_call(self):
        """m <- 0.9 m + 0.1 mean, of the batch of that call."""
        model = built(normalization_model())
        values = {key(v): v for v in model.weights}
        forward = kg.jit(lambda x: model(x, training=True))
        for seed in range(3):
            x = example(model, seed)
            before = {k: numpy(v.value).astype("float64") for k, v in values.items()}
            h = np.tanh(dense(before, "hidden", x))
            near(forward(tensor(x)), normalization_reference(before, x, True, 1.0)[0][0], 1e-5)
            near(values["norm/moving_mean"].value, 0.9 * before["norm/moving_mean"] + 0.1 * h.mean(0), 1e-5)
            near(values["norm/moving_variance"].value, 0.9 * before["norm/moving_variance"] + 0.1 * h.var(0), 1e-5)

    def test_the_model_is_alive_afterwards(self, tmp_path):
        model = built(everything_model())
        x, y = example(model), np.ones((BATCH, 2), "float32")
        step = kg.jit(train_step(model))
        for _ in range(2):
            step(tensor(x), tensor(y))
        s = Setting("everything", model=model)
        near(model(x), s.numpy_outputs(s.point)[0])
        near(model.predict(x, verbose=0), s.numpy_outputs(s.point)[0])
        near(kg.grad(s.loss)(s.weights, s.x), s.numpy_gradient()[: len(s.weights)])
        model.save(tmp_path / "model.keras")
        again = keras.saving.load_model(tmp_path / "model.keras")
        near(again.predict(x, verbose=0), s.numpy_outputs(s.point)[0])
        model.compile("sgd", "mse")
        model.fit(x, y, epochs=1, verbose=0)
        s = Setting("everything", model=model)
        near(model.predict(x, verbose=0), s.numpy_outputs(s.point)[0])
        # The program of the step goes on from where `fit` has left.
        before = state(model)
        loss = step(tensor(x), tensor(y))
        after = state(model)
        assign(model, before)
        near(loss, numpy(train_step(model)(tensor(x), tensor(y))), 1e-5)
        near(after, [v.astype("float64") for v in state(model)], 1e-5)

    @pytest.mark.parametrize(
        "compose",
        [
            lambda f: kg.jit(kg.grad(f, argnums=(0, 1))),
            lambda f: kg.grad(kg.jit(f), argnums=(0, 1)),
            lambda f: kg.jit(kg.grad(kg.jit(f), argnums=(0, 1))),
        ],
        ids=["jit of grad", "grad of jit", "jit of grad of jit"],
    )
    def test_both_orders(self, compose):
        s = Setting("everything", True)
        composed = compose(s.loss)
        weights, x = s.weights, tensor(s.x)
        for factor in (1.0, 0.5):
            s.weights = [factor * w for w in weights]
            with unchanged(s.model):
                near(composed(s.weights, x), s.numpy_gradient())

    def test_batch_jacobian_inside(self):
        s = Setting("normalization")
        expected = np.stack([s.numpy_jacobians()[0][6][b][:, b] for b in range(BATCH)])
        compiled = kg.jit(lambda w, x: kg.batch_jacobian(lambda x: s.outputs(w, x))(x))
        with unchanged(s.model):
            near(compiled(s.weights, tensor(s.x)), expected)

    @pytest.mark.parametrize("compiled_first", [True, False], ids=["compiled first", "transform first"])
    def test_of_a_model_drops_its_state_in_a_transform_only(self, compiled_first):
        """One compiled forward pass, called by itself and inside a transform."""
        model = built(normalization_model())
        s = Setting("normalization", True, model=model)
        forward = kg.jit(lambda x: model(x, training=True))
        mean = model.get_layer("norm").moving_mean

        def call():
            before, h = (
                numpy(mean.value),
                np.tanh(dense({key(v): numpy(v.value) for v in model.weights}, "hidden", s.x)),
            )
            forward(tensor(s.x))
            near(mean.value, (0.9 * before + 0.1 * h.mean(0)).astype("float64"), 1e-5)

        if compiled_first:
            call()
        with unchanged(model):
            near(kg.grad(lambda x: s.score(forward(x)))(s.x), s.numpy_gradient()[6])
        call()

    @pytest.mark.parametrize("compiled_first", [True, False], ids=["compiled first", "functional first"])
    def test_inside_a_functionalized_model(self, compiled_first):
        """The weights that are given go through what a layer compiles of itself."""
        layer = CompilesItself()
        model = keras.Sequential([layers.Input((1,)), layer])
        fun, weights = kg.functionalize(model)
        layer.kernel.assign([[5.0]])
        x = np.array([[2.0]], "float32")
        if compiled_first:
            close(model(x), [[20.0]])
        with unchanged(model):
            close(fun([tensor([[3.0]])], x), [[12.0]])
            close(kg.grad(lambda w: ops.sum(fun(w, x)))([tensor([[3.0]])]), [np.array([[4.0]])])
        close(model(x), [[20.0]])


class CompilesItself(layers.Layer):
    def build(self, shape):
        self.kernel = self.add_weight(shape=(1, 1), name="kernel")
        self.compiled = kg.jit(lambda x: 2 * ops.matmul(x, self.kernel))

    def call(self, x):
        return self.compiled(x)

    def compute_output_shape(self, shape):
        return shape


class TestTapes:
    def test_tape_over_transform(self):
        """The gradient of half the squared norm of the gradient, H g."""
        s = Setting("normalization", True)
        gradient = s.numpy_gradient()
        expected = s.numpy_hvp([*gradient[:6], 0 * gradient[6]])[:6]
        with unchanged(s.model):
            with kg.GradientTape() as tape:
                g = kg.grad(s.loss)([v.value for v in s.model.trainable_variables], s.x)
                energy = sum(ops.sum(x * x) for x in g) / 2
            near(tape.gradient(energy, s.model.trainable_variables), expected, 3e-4)

    def test_tape_over_the_functional_form(self):
        s = Setting("dense")
        with unchanged(s.model):
            with kg.GradientTape() as tape:
                y = s.loss([v.value for v in s.model.trainable_variables], s.x)
            near(tape.gradient(y, s.model.trainable_variables), s.numpy_gradient()[:4])

    def test_tape_over_a_transform_of_the_model(self):
        """A penalty on the gradient by the inputs, whose weights the transform only reads."""
        s = Setting("nested", True)
        gradient = s.numpy_gradient()
        expected = s.numpy_hvp([*(0 * g for g in gradient[:-1]), gradient[-1]])[:-1]
        with unchanged(s.model):
            with kg.GradientTape() as tape:
                g = kg.grad(lambda x: s.score(s.model(x, training=True)))(s.x)
                energy = ops.sum(g * g) / 2
            near(tape.gradient(energy, s.model.trainable_variables), expected, 3e-4)

    def test_transform_over_tape(self):
        s = Setting("everything", True)

        def energy(weights):
            with kg.GradientTape() as tape:
                tape.watch(weights)
                y = s.loss(weights, s.x)
            return sum(ops.sum(g * g) for g in tape.gradient(y, weights)) / 2

        gradient = s.numpy_gradient()
        expected = s.numpy_hvp([*gradient[:-1], 0 * gradient[-1]])[:-1]
        with unchanged(s.model):
            near(kg.grad(energy)(s.weights), expected, 3e-4)

    def test_the_variables_stand_for_the_weights_that_were_given(self):
        s = Setting("dense")
        s.weights = [0.5 * w for w in s.weights]
        with unchanged(s.model):
            with kg.GradientTape() as tape:
                y = s.loss(s.weights, s.x)
            near(tape.gradient(y, s.model.trainable_variables), s.numpy_gradient()[:4])


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


@pytest.mark.parametrize("training", [False, True])
def test_mixed_precision(training):
    """Half precision inside; the weights and what is by them in single precision."""

    def make(policy):
        keras.config.set_dtype_policy(policy)
        try:
            return built([*normalization_model()[:-1], layers.Dense(2, name="out", dtype="float32")])
        finally:
            keras.config.set_dtype_policy("float32")

    single, mixed = make("float32"), make("mixed_float16")
    s, m = (Setting("normalization", training, model=model) for model in (single, mixed))
    expected = s.numpy_gradient()
    direction = s.direction()[0]
    with unchanged(mixed):
        found = kg.grad(m.loss, argnums=(0, 1))(m.weights, tensor(m.x))
        compiled = kg.jit(kg.grad(m.loss))(m.weights, tensor(m.x))
        _, pushed = kg.jvp(m.outputs, (m.weights, tensor(m.x)), direction)
        (product,) = kg.hvp(lambda w: m.loss(w, m.x), (m.weights,), direction[:1])
    for g in [*found[0], found[1], *compiled, pushed, *product]:
        assert keras.backend.standardize_dtype(g.dtype) == "float32"
    near(found, expected, 1e-2)
    near(compiled, expected[:6], 1e-2)
    near(pushed, contract(s.numpy_jacobians(), keras.tree.flatten(direction))[0], 1e-2)
    near(product, s.numpy_hvp([*direction[0], 0 * expected[6]])[:6], 2e-2)
    # In half precision, or the test would say nothing.
    hidden = kg.functionalize(mixed.get_layer("hidden"))
    assert keras.backend.standardize_dtype(hidden[0](hidden[1], m.x).dtype) == "float16"


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


@pytest.mark.parametrize("compiled", [False, True])
def test_an_error_inside_leaves_the_model_alone(compiled):
    s = Setting("everything", True)

    def broken(w, x):
        s.loss(w, x)
        raise KeyError("mine")

    transform = kg.jit(kg.grad(broken)) if compiled else kg.grad(broken)
    with unchanged(s.model), pytest.raises(KeyError, match="mine"):
        transform(s.weights, tensor(s.x))
    with unchanged(s.model), pytest.raises(KeyError, match="mine"):
        kg.jacobian(broken)(s.weights, tensor(s.x))
