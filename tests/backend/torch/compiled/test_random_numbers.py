"""Compiled functions on torch draw the random numbers that the eager function draws."""

import keras
import pytest
from keras import layers, ops

import keras_gradtools as kg
from keras_gradtools.input_gradients.recorded_call import Snapshot

if keras.backend.backend() != "torch":
    pytest.skip("these are about torch", allow_module_level=True)

import torch  # noqa: E402

from tests.backend.torch.compiled.replays import assert_equal_to_eager, several  # noqa: E402


def dropout(seed):
    def make():
        model = keras.Sequential([layers.Input((8,)), layers.Dropout(0.5, seed=seed), layers.GaussianNoise(0.1)])
        return lambda x: model(x, training=True)

    return make


def replayed_masks():
    """A penalty whose second call of the model draws the mask of the first."""
    model = keras.Sequential([layers.Input((8,)), layers.Dense(4, activation="tanh"), layers.Dropout(0.5)])

    def call(x):
        snapshot = Snapshot(model)
        first = model(x, training=True)
        again = snapshot.replayed(lambda: model(x, training=True))
        return first, again, first - again

    return call


CASES = {
    "seeded dropout": dropout(3),
    "dropout without a seed": dropout(None),
    "keras.random": lambda: lambda x: x + keras.random.normal((8,)) * keras.random.uniform((8,), seed=7),
    "a seed generator": lambda: (lambda s: lambda x: keras.random.normal(x.shape, seed=s) + x)(
        keras.random.SeedGenerator(5)
    ),
    "categorical and shuffle": lambda: lambda x: (keras.random.categorical(x, 3, seed=None), keras.random.shuffle(x)),
    "torch": lambda: lambda x: x * torch.rand(8) + torch.nn.functional.dropout(x, 0.5) + torch.randn_like(x),
    "torch, in place": lambda: lambda x: (x * 1.0).uniform_(),
    "replayed masks": replayed_masks,
    "a gradient": lambda: kg.grad(
        lambda x: ops.sum(torch.nn.functional.dropout(x, 0.5) ** 2 * keras.random.normal((8,)))
    ),
}
WITH_GLOBAL_SEED = {"keras.random", "categorical and shuffle", "replayed masks", "a gradient"}


@pytest.mark.parametrize("case", CASES)
def test_equal_to_eager(case):
    # The first call may make Keras' global seed generator, which the second one reads.
    assert_equal_to_eager(CASES[case], several(4, 8, count=6), runs=3 if case in WITH_GLOBAL_SEED else 2)


def test_draws_outside_of_the_calls_count():
    def make():
        compiled = CASES["torch"]()

        def fun(x):
            return compiled(x)

        return fun

    def outside(compile):  # noqa: A002
        torch.manual_seed(0)
        fun = compile(make())
        return [(fun(x), torch.rand(2)) for (x,) in several(4, 8, count=6)]

    for (ours, mine), (theirs, other) in zip(outside(kg.jit), outside(lambda f: f), strict=True):
        assert torch.equal(ours, theirs) and torch.equal(mine, other)
