"""`kg.jit` with another compiler than the usual one: XLA on TensorFlow, inductor on torch."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from tests.cases import tensor
from tests.compilers import compiled_by

COMPILERS = {"tensorflow": "xla", "torch": "inductor"}
X = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")


def test_an_unknown_compiler_is_refused(backend):
    with pytest.raises(ValueError, match="compiler='llvm'"):
        kg.jit(lambda x: x, compiler="llvm")
    other = {"tensorflow": "inductor", "jax": "xla", "torch": "xla"}[backend]
    with pytest.raises(ValueError, match=f"on {backend}.*compiler='{other}'"):
        kg.jit(lambda x: x, compiler=other)


@pytest.mark.slow
class TestPrograms:
    @pytest.fixture
    def compiler(self, backend):
        if backend not in COMPILERS:
            pytest.skip("JAX always uses XLA")
        return COMPILERS[backend]

    def test_the_gradient_of_a_penalty(self, compiler):
        model = keras.Sequential([layers.Input((3,)), layers.Dense(8, activation="silu"), layers.Dense(1)])

        def penalty(x):
            return ops.sum(kg.grad(lambda x: ops.sum(model(x)))(x) ** 2)

        gradient = kg.grad(penalty)
        compiled = kg.jit(gradient, compiler=compiler)
        compiled_by(lambda: compiled(tensor(X)))
        for scale in (1.0, 2.0, 100.0):
            found, expected = (ops.convert_to_numpy(f(tensor(scale * X))) for f in (compiled, gradient))
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        model.set_weights([2 * w for w in model.get_weights()])
        found, expected = (ops.convert_to_numpy(f(tensor(X))) for f in (compiled, gradient))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)

    def test_variables_that_it_assigns(self, compiler):
        total = keras.Variable(np.zeros(3, "float32"))

        def add(x):
            total.assign_add(ops.sum(x, axis=0))
            return total * 2.0

        compiled = kg.jit(add, compiler=compiler)
        for count in range(1, 6):
            np.testing.assert_allclose(ops.convert_to_numpy(compiled(tensor(X))), 2 * count * X.sum(0), rtol=1e-5)
        np.testing.assert_allclose(ops.convert_to_numpy(total), 5 * X.sum(0), rtol=1e-5)

    def test_without_a_c_compiler(self, compiler, monkeypatch):
        if compiler != "inductor":
            pytest.skip("XLA needs none")
        from torch._inductor import config

        monkeypatch.setattr(config.cpp, "cxx", ("no_such_compiler",))
        compiled = kg.jit(lambda x: ops.sum(ops.sin(x) * 3.25), compiler=compiler)
        compiled_by(lambda: compiled(tensor(X)))
        with pytest.raises(RuntimeError, match="needs a C.. compiler.*Install g.. or clang"):
            compiled(tensor(X))
