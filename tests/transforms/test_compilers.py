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

    def test_seeded_and_unseeded_masks(self, compiler):
        if compiler != "inductor":
            pytest.skip("masks of TensorFlow's two compilers differ")
        hidden = [layers.Dense(8, activation="silu"), layers.Dropout(0.4, seed=3), layers.Dropout(0.4)]
        model = keras.Sequential([layers.Input((3,)), *hidden, layers.Dense(1)])

        def gradient(x):
            return kg.grad(lambda x: ops.sum(model(x, training=True) ** 2))(x)

        def drawn(fun):
            keras.utils.set_random_seed(0)
            model.layers[1].seed_generator.state.assign([3, 0])
            return [ops.convert_to_numpy(fun(tensor(X))) for _ in range(6)]

        found, expected = drawn(kg.jit(gradient, compiler=compiler)), drawn(gradient)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        assert len({x.tobytes() for x in found}) == 6

    def test_draws_in_place_keep_their_turn(self, compiler):
        if compiler != "inductor":
            pytest.skip("TensorFlow draws nothing in place")
        import torch

        seeds = keras.random.SeedGenerator(7)

        def fun(x):
            first, second = torch.empty(4, 3).normal_(), torch.rand(4, 3)
            return ops.tanh(x) * first + second + keras.random.normal((4, 3), seed=seeds)

        def drawn(fun):
            keras.utils.set_random_seed(0)
            seeds.state.assign([7, 0])
            return [ops.convert_to_numpy(fun(tensor(X))) for _ in range(5)]

        np.testing.assert_allclose(drawn(kg.jit(fun, compiler=compiler)), drawn(fun), rtol=1e-5, atol=1e-6)

    def test_a_branch_on_a_value(self, compiler):
        if compiler != "inductor":
            pytest.skip("TensorFlow traces no branches")

        def fun(x, w):
            y = ops.sum(ops.tanh(x * w) * ops.exp(-(x**2)) + ops.sin(x) * ops.cos(w))
            return kg.grad(lambda x: ops.sum(ops.sin(x) ** 3))(x) * y if y > 0 else -w * y

        compiled = kg.jit(fun, compiler=compiler)
        for scale in (1.0, -1.0) * 5:
            given = tensor(X), tensor(scale * np.abs(X))
            found, expected = (ops.convert_to_numpy(f(*given)) for f in (compiled, fun))
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)

    def test_memory_that_several_groups_overwrite(self, compiler):
        """A variable is overwritten before and after a seeded draw, through a view too."""
        if compiler != "inductor":
            pytest.skip("TensorFlow has no views")
        total, seeds = keras.Variable(np.zeros((4, 3), "float32")), keras.random.SeedGenerator(7)

        def step(x):
            for _ in range(3):
                total.assign(ops.tanh(total + ops.sin(x) * ops.cos(total)) * 0.5)
            total.value[0] += 1.0
            y = keras.random.normal((4, 3), seed=seeds) * total
            for _ in range(3):
                total.assign(ops.tanh(total + y) + ops.sin(total) * 0.1)
            return y, total * 2.0

        def run(fun):
            total.assign(np.zeros((4, 3), "float32"))
            seeds.state.assign([7, 0])
            results = [fun(tensor(X)) for _ in range(5)]
            return [[ops.convert_to_numpy(r) for r in pair] for pair in results], ops.convert_to_numpy(total)

        def unattached(x):
            import torch

            with torch.no_grad():
                return step(x)

        found, expected = run(kg.jit(unattached, compiler=compiler)), run(unattached)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)

    def test_without_a_c_compiler(self, compiler, monkeypatch):
        if compiler != "inductor":
            pytest.skip("XLA needs none")
        from torch._inductor import config

        monkeypatch.setattr(config.cpp, "cxx", ("no_such_compiler",))
        compiled = kg.jit(lambda x: ops.sum(ops.sin(x) * 3.25), compiler=compiler)
        compiled_by(lambda: compiled(tensor(X)))
        with pytest.raises(RuntimeError, match="needs a C.. compiler.*Install g.. or clang"):
            compiled(tensor(X))
