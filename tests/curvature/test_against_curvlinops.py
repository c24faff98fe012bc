"""The operators against those of curvlinops, on the same model in plain torch."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_gradtools as kg

if keras.config.backend() != "torch":
    pytest.skip("curvlinops is a library of torch", allow_module_level=True)

import curvlinops  # noqa: E402
import torch  # noqa: E402

RNG = np.random.default_rng(0)
N, D, H, C = 23, 5, 7, 3
X = RNG.normal(size=(N, D)).astype("float32")
CLASSES = RNG.integers(0, C, N)
VALUES = RNG.normal(size=(N, C)).astype("float32")
LOSSES = {
    "cross-entropy": (
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        torch.nn.CrossEntropyLoss(),
        CLASSES,
        torch.tensor(CLASSES),
    ),
    "mse": ("mse", torch.nn.MSELoss(), VALUES, torch.tensor(VALUES)),
}


@pytest.fixture(scope="module")
def models():
    """The same network in Keras and in torch, whose kernels are transposed."""
    ours = keras.Sequential([keras.Input((D,)), layers.Dense(H, "tanh"), layers.Dense(C)])
    ours.set_weights([RNG.normal(size=v.shape).astype("float32") for v in ours.trainable_variables])
    theirs = torch.nn.Sequential(torch.nn.Linear(D, H), torch.nn.Tanh(), torch.nn.Linear(H, C))
    with torch.no_grad():
        for parameter, weight in zip(theirs.parameters(), ours.get_weights(), strict=True):
            parameter.copy_(torch.tensor(weight.T))
    return ours, theirs


def transposed(columns):
    """Columns over the weights in Keras' layout as curvlinops takes them, or back: kernels are transposed."""
    parts, start = [], 0
    for rows, cols in ((D, H), (1, H), (H, C), (1, C)):
        part = columns[start : start + rows * cols].reshape(rows, cols, -1)
        parts.append(part.transpose(1, 0, 2).reshape(rows * cols, -1))
        start += rows * cols
    return np.concatenate(parts)


def back(columns):
    """The inverse of `transposed`."""
    parts, start = [], 0
    for rows, cols in ((D, H), (1, H), (H, C), (1, C)):
        part = columns[start : start + rows * cols].reshape(cols, rows, -1)
        parts.append(part.transpose(1, 0, 2).reshape(rows * cols, -1))
        start += rows * cols
    return np.concatenate(parts)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("operator", "options", "theirs"),
    [
        ("Hessian", {}, "HessianLinearOperator"),
        ("GaussNewton", {}, "GGNLinearOperator"),
        ("Fisher", {}, "GGNLinearOperator"),
        ("Fisher", {"kind": "empirical"}, "EFLinearOperator"),
    ],
)
def test_products(models, loss, operator, options, theirs):
    ours, network = models
    keras_loss, torch_loss, y, y_torch = LOSSES[loss]
    matrix = getattr(kg.curvature, operator)(ours, keras_loss, (X, y), batch_size=10, verbose=0, **options)
    batches = [(torch.tensor(X[i : i + 10]), y_torch[i : i + 10]) for i in range(0, N, 10)]
    reference = getattr(curvlinops, theirs)(network, torch_loss, list(network.parameters()), batches)
    v = RNG.normal(size=(matrix.shape[0], 4)).astype("float32")
    expected = back((reference @ torch.tensor(transposed(v))).numpy(force=True))
    if options and loss == "mse":
        # The outer products of the gradients of a mean over C outputs have its 1 / C twice, those of curvlinops once.
        expected = expected / C
    np.testing.assert_allclose(matrix @ v, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
