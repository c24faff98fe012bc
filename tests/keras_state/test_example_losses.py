"""The loss of each example against NumPy, for each loss of Keras and each of its reductions."""

import math
import typing

import keras
import numpy as np
import pytest
from keras import layers, losses, ops

from keras_gradtools.keras_internals.layers import set_keras_mask
from keras_gradtools.keras_state import example_losses
from tests.cases import tensor
from tests.input_gradients.reference import numpy

RNG = np.random.default_rng(0)
N, T, C = 4, 3, 5
REDUCTIONS = ["sum_over_batch_size", "sum", "mean", "mean_with_sample_weight"]
REAL = RNG.normal(size=(2, N, T, C))
POSITIVE = RNG.uniform(0.1, 2, size=(2, N, T, C))
BINARY = (RNG.integers(0, 2, (N, T, C)).astype("float64"), RNG.uniform(0.05, 0.95, (N, T, C)))
CLASSES = RNG.integers(0, C, (N, T))
PROBABILITIES = POSITIVE[1] / POSITIVE[1].sum(axis=-1, keepdims=True)
ONE_HOT = (np.eye(C)[CLASSES], PROBABILITIES)
STEPS = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]])


def unit(x):
    return x / np.sqrt((x**2).sum(axis=-1, keepdims=True))


def huber(y, p):
    error = abs(y - p)
    return np.where(error <= 1, error**2 / 2, error - 0.5).mean(axis=-1)


def binary_crossentropy(y, p):
    return -y * np.log(p) - (1 - y) * np.log(1 - p)


def true_class(y, p):
    return (y * p).sum(axis=-1)


class LossCase(typing.NamedTuple):
    loss: typing.Callable
    y: np.ndarray
    y_pred: np.ndarray
    value: typing.Callable


def case(loss, pair, value):
    return pytest.param(LossCase(loss, *pair, value), id=loss.__name__)


SPARSE = (CLASSES[..., None], PROBABILITIES)


def of_sparse(value):
    return lambda y, p: value(np.eye(C)[y[..., 0]], p)


CASES = [
    case(losses.MeanSquaredError, REAL, lambda y, p: ((y - p) ** 2).mean(axis=-1)),
    case(losses.MeanAbsoluteError, REAL, lambda y, p: abs(y - p).mean(axis=-1)),
    case(losses.MeanAbsolutePercentageError, POSITIVE, lambda y, p: 100 * (abs(y - p) / y).mean(axis=-1)),
    case(losses.MeanSquaredLogarithmicError, POSITIVE, lambda y, p: ((np.log1p(y) - np.log1p(p)) ** 2).mean(axis=-1)),
    case(losses.CosineSimilarity, REAL, lambda y, p: -(unit(y) * unit(p)).sum(axis=-1)),
    case(losses.Huber, 2 * REAL, huber),
    case(losses.LogCosh, REAL, lambda y, p: np.log(np.cosh(y - p)).mean(axis=-1)),
    case(losses.Hinge, np.sign(REAL[:1]).tolist() + [REAL[1]], lambda y, p: np.maximum(1 - y * p, 0).mean(axis=-1)),
    case(
        losses.SquaredHinge,
        np.sign(REAL[:1]).tolist() + [REAL[1]],
        lambda y, p: (np.maximum(1 - y * p, 0) ** 2).mean(axis=-1),
    ),
    case(
        losses.CategoricalHinge,
        (ONE_HOT[0], REAL[1]),
        lambda y, p: np.maximum(((1 - y) * p).max(axis=-1) - true_class(y, p) + 1, 0),
    ),
    case(
        losses.KLDivergence,
        (unit(POSITIVE[0]) ** 2, PROBABILITIES),
        lambda y, p: (y * np.log(y / p)).sum(axis=-1),
    ),
    case(losses.Poisson, POSITIVE, lambda y, p: (p - y * np.log(p)).mean(axis=-1)),
    case(losses.BinaryCrossentropy, BINARY, lambda y, p: binary_crossentropy(y, p).mean(axis=-1)),
    case(
        losses.BinaryFocalCrossentropy,
        BINARY,
        lambda y, p: ((1 - y * p - (1 - y) * (1 - p)) ** 2 * binary_crossentropy(y, p)).mean(axis=-1),
    ),
    case(losses.CategoricalCrossentropy, ONE_HOT, lambda y, p: -np.log(true_class(y, p))),
    case(
        losses.CategoricalFocalCrossentropy,
        ONE_HOT,
        lambda y, p: -0.25 * (1 - true_class(y, p)) ** 2 * np.log(true_class(y, p)),
    ),
    case(losses.SparseCategoricalCrossentropy, SPARSE, of_sparse(lambda y, p: -np.log(true_class(y, p)))),
]


def expected_losses(values, reduction, mask):
    """What each example contributes to the reduced loss, of which it is the mean."""
    kept = (values * mask).reshape(N, -1).sum(axis=1)
    return N * kept / (1 if reduction == "sum" else mask.sum())


def with_mask(y_pred, mask):
    y_pred = tensor(y_pred)
    if mask is not None:
        set_keras_mask(y_pred, ops.convert_to_tensor(mask.astype(bool)))
    return y_pred


# What a sum is divided by does not depend on the loss. The last two reductions are the mean of the first by other
# names; they are tried on single losses below.
SUMMED = ("MeanSquaredError", "CosineSimilarity", "BinaryCrossentropy", "SparseCategoricalCrossentropy")


@pytest.mark.parametrize(
    ("case", "reduction"),
    [
        pytest.param(
            *case.values,
            reduction,
            id=f"{case.id}-{reduction}",
            marks=[] if reduction == REDUCTIONS[0] or (reduction == "sum" and case.id in SUMMED) else pytest.mark.slow,
        )
        for case in CASES
        for reduction in REDUCTIONS
    ],
)
def test_losses_of_keras(case, reduction):
    compiled = example_losses.compiled(case.loss(reduction=reduction))
    y, y_pred = np.asarray(case.y), np.asarray(case.y_pred)
    dtype = "int32" if y.dtype == "int64" else "float32"
    # Sequences and single steps, with padding and without.
    for cut in (slice(None), 0):
        labels, predicted = y[:, cut], y_pred[:, cut]
        values = case.value(labels, predicted)
        for mask in (None, STEPS[:, cut]):
            given = with_mask(predicted, mask)
            found = example_losses.example_losses(compiled, tensor(labels, dtype), given)
            expected = expected_losses(values, reduction, np.ones_like(values) if mask is None else mask)
            np.testing.assert_allclose(numpy(found), expected, rtol=2e-5, atol=1e-6)
            total = example_losses.total_loss(compiled, tensor(labels, dtype), given)
            np.testing.assert_allclose(numpy(total), np.mean(expected), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_loss_that_masks_by_itself(reduction):
    # The circle loss leaves out the examples whose loss is zero: here the last, which has a class of its own.
    y = np.array([0, 0, 1, 1])
    y_pred = unit(RNG.normal(size=(N, C)))
    loss = losses.Circle(gamma=2, reduction=reduction)
    values = numpy(loss.call(tensor(y, "int32"), tensor(y_pred)))
    compiled = example_losses.compiled(loss)
    found = example_losses.example_losses(compiled, tensor(y, "int32"), tensor(y_pred))
    np.testing.assert_allclose(numpy(found), expected_losses(values, reduction, values > 0), rtol=1e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_losses_that_choose_their_axes(reduction):
    y, p = BINARY
    overlap, sizes = (2 * y * p).sum(axis=(1, 2)), (y + p).sum(axis=(1, 2))
    compiled = example_losses.compiled(losses.Dice(axis=(1, 2), reduction=reduction))
    found = example_losses.example_losses(compiled, tensor(y), tensor(p))
    np.testing.assert_allclose(numpy(found), (N if reduction == "sum" else 1) * (1 - overlap / sizes), rtol=1e-5)
    whole = example_losses.compiled(losses.Dice(reduction=reduction))
    assert example_losses.example_losses(whole, tensor(y), tensor(p)) is None


@pytest.mark.parametrize("shape", [(N,), (N, 2), (N, 2, 3)])
def test_functions_that_keep_axes(shape):
    y_pred = RNG.normal(size=shape)
    compiled = example_losses.compiled(lambda y, y_pred: y_pred**2)
    found = example_losses.example_losses(compiled, tensor(np.zeros(shape)), tensor(y_pred))
    np.testing.assert_allclose(numpy(found), (y_pred**2).reshape(N, -1).mean(axis=1), rtol=1e-5)


def test_a_batch_of_one():
    compiled = example_losses.compiled("mse")
    found = example_losses.example_losses(compiled, tensor([[1.0, 2.0]]), tensor([[0.0, 0.0]]))
    np.testing.assert_allclose(numpy(found), [2.5], rtol=1e-6)


def test_nothing_but_padding_is_zero():
    for reduction in REDUCTIONS:
        compiled = example_losses.compiled(losses.MeanSquaredError(reduction=reduction))
        found = example_losses.example_losses(compiled, tensor(REAL[0]), with_mask(REAL[1], np.zeros((N, T))))
        np.testing.assert_array_equal(numpy(found), np.zeros(N))


class OwnLoss(keras.losses.Loss):
    def call(self, y, y_pred):
        return ops.sum(ops.abs(y - y_pred), axis=-1)


def two_outputs(loss, loss_weights=None):
    inputs = keras.Input((C,))
    model = keras.Model(inputs, {"p": layers.Dense(C, name="p")(inputs), "q": layers.Dense(1, name="q")(inputs)})
    model.compile("sgd", loss, loss_weights=loss_weights, metrics={"p": "mae"})
    return model


Y = {"p": REAL[0, :, 0], "q": REAL[0, :, 1, :1]}
Y_PRED = {"p": REAL[1, :, 0], "q": REAL[1, :, 1, :1]}


@pytest.mark.parametrize("loss_weights", [None, {"p": 0.3, "q": 2.0}])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_several_outputs(reduction, loss_weights):
    model = two_outputs({"p": OwnLoss(reduction=reduction), "q": "mse"}, loss_weights)
    y, y_pred = ({k: tensor(v) for k, v in x.items()} for x in (Y, Y_PRED))
    found = example_losses.example_losses(model._compile_loss, y, y_pred)
    p = abs(Y["p"] - Y_PRED["p"]).sum(axis=1) * (N if reduction == "sum" else 1)
    q = ((Y["q"] - Y_PRED["q"]) ** 2)[:, 0]
    expected = 0.3 * p + 2 * q if loss_weights else p + q
    np.testing.assert_allclose(numpy(found), expected, rtol=1e-5)
    np.testing.assert_allclose(numpy(model.compute_loss(None, y, y_pred)), expected.mean(), rtol=1e-5)


def test_an_output_without_a_loss():
    model = two_outputs({"q": "mse"})
    y, y_pred = ({k: tensor(v) for k, v in x.items()} for x in (Y, Y_PRED))
    found = example_losses.example_losses(model._compile_loss, {"p": None, "q": y["q"]}, y_pred)
    np.testing.assert_allclose(numpy(found), ((Y["q"] - Y_PRED["q"]) ** 2)[:, 0], rtol=1e-5)


def test_what_keras_tracks_is_left_alone():
    model = two_outputs({"p": "mse", "q": "mse"})
    x, y = REAL[0, :, 2].astype("float32"), {k: v.astype("float32") for k, v in Y.items()}
    before = model.train_on_batch(x, y, return_dict=True)
    state = [numpy(v.value) for metric in model.metrics for v in metric.variables]
    y_pred = {k: tensor(v) for k, v in Y_PRED.items()}
    example_losses.example_losses(model._compile_loss, {k: tensor(v) for k, v in Y.items()}, y_pred)
    example_losses.total_loss(model._compile_loss, {k: tensor(v) for k, v in Y.items()}, y_pred)
    after = [numpy(v.value) for metric in model.metrics for v in metric.variables]
    np.testing.assert_array_equal(np.hstack([v.ravel() for v in state]), np.hstack([v.ravel() for v in after]))
    assert any(np.any(v) for v in state)
    assert model.get_metrics_result() == before


class TestOneNumberForTheBatch:
    def test_by_itself(self):
        compiled = example_losses.compiled(lambda y, y_pred: ops.mean((y - y_pred) ** 2))
        assert example_losses.example_losses(compiled, tensor(REAL[0]), tensor(REAL[1])) is None
        total = example_losses.total_loss(compiled, tensor(REAL[0]), tensor(REAL[1]))
        np.testing.assert_allclose(numpy(total), ((REAL[0] - REAL[1]) ** 2).mean(), rtol=1e-5)

    @pytest.mark.parametrize("scalar", ["p", "q"])
    def test_beside_one_for_each_example(self, scalar):
        loss = {"p": "mse", "q": "mse", scalar: lambda y, y_pred: ops.mean(y_pred**2)}
        model = two_outputs(loss)
        y, y_pred = ({k: tensor(v) for k, v in x.items()} for x in (Y, Y_PRED))
        assert example_losses.example_losses(model._compile_loss, y, y_pred) is None

    def test_is_forgotten_at_the_next_loss(self):
        scalar = example_losses.compiled(lambda y, y_pred: ops.mean(y_pred))
        example_losses.example_losses(scalar, tensor(REAL[0]), tensor(REAL[1]))
        found = example_losses.example_losses(example_losses.compiled("mae"), tensor(REAL[0]), tensor(REAL[1]))
        np.testing.assert_allclose(numpy(found), abs(REAL[0] - REAL[1]).mean(axis=(1, 2)), rtol=1e-5)


def test_a_loss_that_fails_leaves_keras_as_it_was():
    def failing(y, y_pred):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        example_losses.example_losses(example_losses.compiled(failing), tensor(REAL[0]), tensor(REAL[1]))
    loss = losses.MeanSquaredError()(tensor(REAL[0]), tensor(REAL[1]))
    assert math.isclose(float(numpy(loss)), ((REAL[0] - REAL[1]) ** 2).mean(), rel_tol=1e-5)
