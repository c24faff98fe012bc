"""Programs of functions and models that are gone are gone as well: memory levels off."""

import gc
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg

ROUNDS = 1000
# What 600 fresh functions or models may leave behind: 32 KiB each is less than any program takes.
MOST_MEGABYTES = 20


def use_function(i):
    """One use of a function that is new, by one of the transforms that keep programs."""
    factor = float(i)

    def fun(x):
        return ops.sum(ops.sin(factor * x) * x)

    x = ops.convert_to_tensor(np.linspace(0.1, 1.0, 4, dtype="float32"))
    uses = (
        lambda: kg.jit(fun)(x),
        lambda: kg.jit(kg.grad(fun))(x),
        lambda: kg.grad(fun)(x),
        lambda: kg.jacobian(lambda x: fun(x) * x)(x),
        lambda: kg.hessian(fun)(x),
        lambda: kg.laplacian(lambda x: ops.sum(ops.sin(factor * x), axis=-1))(ops.reshape(x, (2, 2))),
    )
    uses[i % len(uses)]()


def use_model(i):
    """The same with a model that is new."""
    x, y = np.ones((2, 2), "float32"), np.ones((2, 1), "float32")
    model = make_model(i)
    fun, weights = kg.functionalize(model)

    def loss(weights):
        return ops.sum(fun(weights, x) ** 2)

    def product():
        hessian = kg.curvature.Hessian(model, "mse", (x, y))
        hessian @ hessian.gradient()

    uses = (
        lambda: kg.jit(model)(ops.convert_to_tensor(x)),
        lambda: kg.batch_jacobian(model)(ops.convert_to_tensor(x)),
        lambda: kg.grad(loss)(weights),
        lambda: kg.hvp(loss, (weights,), (weights,)),
        lambda: kg.hessian(loss)(weights),
        product,
    )
    uses[i % len(uses)]()


def make_model(i):
    """A model that is new: Keras itself keeps something of each on some backends."""
    return keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, activation="tanh"), keras.layers.Dense(1)])


WORKS = {"function": use_function, "model": use_model, "nothing": make_model}


def resident_megabytes():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def growth(work):
    """By how many megabytes a process grows in the last 600 of 1,000 rounds of `work`."""
    command = [sys.executable, "-m", "tests.transforms.test_program_memory", work]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": "."})
    return float(done.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="resident memory is read as Linux gives it")
class TestMemory:
    def test_of_a_thousand_functions_levels_off(self):
        assert growth("function") < MOST_MEGABYTES

    def test_of_a_thousand_models_levels_off(self):
        """But for what Keras keeps of a model that was only made."""
        assert growth("model") - growth("nothing") < MOST_MEGABYTES


if __name__ == "__main__":
    for number in range(ROUNDS):
        WORKS[sys.argv[1]](number)
        if number + 1 == 2 * ROUNDS // 5:
            before = resident_megabytes()
    print(resident_megabytes() - before)
