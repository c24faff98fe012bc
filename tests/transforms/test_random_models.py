"""Random programs of layers, variables, containers and Python.

They are compared with central differences in double precision, and with the framework's own gradient.
"""

import os

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from tests.cases import tensor
from tests.random_models import STEPS, Program, mapped

# How many programs the slow test tries, from which one on.
COUNT, START = int(os.environ.get("PROGRAMS", "500")), int(os.environ.get("FIRST_PROGRAM", "1000"))
# The step of the differences. Programs of two attentions and two normalizations need one this short.
H = 2e-4


def first(program, which):
    steps = [(h, 0) if which == 0 else (0, h) for h in (-2 * H, -H, H, 2 * H)]
    low2, low, high, high2 = (program.along(*s) for s in steps)
    return (low2 - 8 * low + 8 * high - high2) / (12 * H)


def second(program):
    """The mixed second derivative along both directions, of fourth order."""
    total = 0.0
    weights = {-2: 1, -1: -8, 1: 8, 2: -1}
    for i, a in weights.items():
        for j, b in weights.items():
            total += a * b * program.along(i * H, j * H)
    return total / (12 * H) ** 2


def dot(tree, direction):
    pairs = []
    mapped(lambda g, d: pairs.append(float(np.sum(ops.convert_to_numpy(g).astype("float64") * d))), tree, direction)
    return sum(pairs)


def own_gradient(fun, x):
    """The gradient that the framework itself finds for one tensor; what `fun` assigns is dropped."""
    backend = keras.config.backend()

    def scoped(x):
        with keras.StatelessScope():
            return fun(x)

    if backend == "jax":
        import jax

        return jax.grad(scoped)(x)
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(x)
            y = scoped(x)
        return tape.gradient(y, x)
    import torch

    leaf = x.detach().clone().requires_grad_()
    return torch.autograd.grad(scoped(leaf), leaf)[0]


def check(seed, compiles=False):
    keras.utils.clear_session(free_memory=False)
    program = Program(seed)
    weights, x = mapped(tensor, (program.weights, program.x))
    v, w = ((mapped(tensor, d)) for d in program.directions)
    slopes, curvature = [first(program, 0), first(program, 1)], second(program)
    fun = program.in_keras
    found = {}

    value, gradients = kg.value_and_grad(fun, argnums=(0, 1))(weights, x)
    found["value"] = float(value), program.along()
    assert gradients[0]["pair"][1] is None and (gradients[0]["bias"] is None) == (weights["bias"] is None)
    found["grad"] = dot(gradients, program.directions[0]), slopes[0]
    found["jvp"] = float(kg.jvp(fun, (weights, x), v)[1]), slopes[0]
    found["linearize"] = float(kg.linearize(fun, weights, x)[1](*w)), slopes[1]
    found["hvp"] = dot(kg.hvp(fun, (weights, x), v), program.directions[1]), curvature
    with kg.GradientTape() as outer:
        outer.watch(x)
        with kg.GradientTape() as inner:
            inner.watch(x)
            # In a transform, so that what the program assigns is dropped, and the next check begins as this one.
            y = kg.value_and_grad(lambda x: fun(weights, x))(x)[0]
        inner_gradient = inner.gradient(y, x)
        slope = ops.sum(inner_gradient * v[1])
    nested = outer.gradient(slope, x, unconnected_gradients="zero")
    by_x = kg.hvp(lambda x: fun(weights, x), (x,), (v[1],))
    found["tapes"] = dot(nested, program.directions[1][1]), dot(by_x[0], program.directions[1][1])
    own = own_gradient(lambda x: fun(weights, x), x)
    found["the framework's own"] = dot(gradients[1], program.directions[0][1]), dot(own, program.directions[0][1])
    if compiles:
        found["jit"] = dot(kg.jit(kg.grad(fun, argnums=(0, 1)))(weights, x), program.directions[0]), slopes[0]

    scale = 1 + max(map(abs, [*slopes, curvature, found["value"][1]]))
    for name, (got, expected) in found.items():
        assert abs(got - expected) < 2e-3 * scale, f"{name} of program {seed}, {program.names}: {got}, not {expected}"


# The second of the two that compute the same formula.
LIKE_ANOTHER = "attention, a layer"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.fast_on("torch") if name == LIKE_ANOTHER else ()) for name in STEPS]
)
def test_each_step_by_itself(name, monkeypatch):
    monkeypatch.setattr("tests.random_models.STEPS", {name: STEPS[name]})
    check(1, compiles=True)


def test_programs():
    for seed in range(4):
        check(seed)


@pytest.mark.slow
def test_many_programs():
    """`PROGRAMS=10000` tries so many."""
    for seed in range(START, START + COUNT):
        check(seed, compiles=seed % 50 == 0)
