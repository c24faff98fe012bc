"""Keras models of every kind of state, and the same models in NumPy, in double precision.

A step into the complex plane takes the derivatives of these without a rounding error.
"""

import contextlib
import functools
import typing

import keras
import numpy as np
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
