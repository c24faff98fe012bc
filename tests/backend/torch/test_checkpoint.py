"""A checkpoint calls its function again in the backward pass: what a tape has recorded, under what went for it then."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from tests.cases import KERAS, close, tensor

if keras.backend.backend() != "torch":
    pytest.skip("these are about torch", allow_module_level=True)

import torch  # noqa: E402
from torch.utils.checkpoint import checkpoint as imported_checkpoint  # noqa: E402

from keras_gradtools.keras_state.scopes import StateScope  # noqa: E402

X = np.array([0.5, -1.0, 2.0])
FIRST = (np.cos(X) + np.sin(X)) * np.exp(X)
SECOND = 2 * np.cos(X) * np.exp(X)


def product(x):
    return ops.sin(x) * ops.exp(x)


WAYS = {
    "keras.remat": keras.remat(product),
    "checkpoint": lambda x: torch.utils.checkpoint.checkpoint(product, x, use_reentrant=False),
    "imported": lambda x: imported_checkpoint(product, x, use_reentrant=False),
    "closed over": lambda x: keras.remat(lambda: product(x))(),
    "nested in a list": lambda x: keras.remat(lambda args: product(args[0]))([x]),
    "a keyword": lambda x: keras.remat(lambda *, y: product(y))(y=x),
    "one in another": lambda x: keras.remat(lambda y: keras.remat(product)(y) * 1.0)(x),
}
# Before 3.13, Keras' `remat` drops keyword arguments on torch, `training=True` among them.
drops_keywords = pytest.mark.skipif(KERAS < (3, 13), reason="this Keras drops the keyword arguments of a remat")
if KERAS < (3, 13):
    del WAYS["a keyword"]


@pytest.mark.parametrize("name", WAYS)
def test_of_a_leaf(name):
    def total(x):
        return ops.sum(WAYS[name](x))

    x = tensor(X, "float64")
    with kg.GradientTape(persistent=True) as tape:
        tape.watch(x)
        y = total(x)
    assert not x.requires_grad
    for _ in range(2):
        close(tape.gradient(y, x), FIRST)
    close(kg.grad(total)(x), FIRST)
    close(kg.jvp(WAYS[name], (x,), (ops.ones_like(x),))[1], FIRST)
    close(kg.hessian(total)(x), np.diag(SECOND))
    close(kg.hvp(total, (x,), (ops.ones_like(x),))[0], SECOND)
    close(kg.jacobian(WAYS[name])(x), np.diag(FIRST))
    assert not x.requires_grad


@pytest.mark.parametrize("name", [name for name in WAYS if name != "closed over"])
def test_the_native_backward_pass_goes_through_a_gradient(name):
    """As in training by a loss that has a derivative in it. By then the leaf is long given back."""
    x, w = tensor(X, "float64"), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    with kg.GradientTape() as tape:
        tape.watch(x)
        y = ops.sum(WAYS[name](x) * w * w)
    slope = tape.gradient(y, x)
    ops.sum(slope * slope).backward()
    close(w.grad, 4 * 2.0**3 * np.sum(FIRST**2))
    assert x.grad is None


def models(layers, x):
    """The same model of the same weights, under a checkpoint and without."""
    with keras.RematScope(mode="full"):
        kept = keras.Sequential([keras.Input(x.shape[1:]), *layers()])
    plain = keras.Sequential([keras.Input(x.shape[1:]), *layers()])
    assert all(layer._remat_mode is not None for layer in kept.layers)
    plain.set_weights(kept.get_weights())
    return kept, plain


def dense():
    return [keras.layers.Dense(3, activation="tanh"), keras.layers.Dense(1)]


POINTS = np.array([[1.0, 2.0], [3.0, -1.0]])


class TestFunctionalWeights:
    """What is computed again reads the weights of the call, and not those of the model."""

    def test_gradient(self):
        kept, plain = models(dense, POINTS)
        (fun, weights), (reference, _) = kg.functionalize(kept), kg.functionalize(plain)
        weights = [2 * w + 0.1 for w in weights]

        def loss(f):
            return lambda w: ops.sum(ops.square(f(w, tensor(POINTS))))

        expected = kg.grad(loss(reference))(weights)
        close(kg.grad(loss(fun))(weights), [g.numpy() for g in expected])
        vectors = [ops.ones_like(w) for w in weights]
        expected = kg.hvp(loss(reference), (weights,), (vectors,))[0]
        close(kg.hvp(loss(fun), (weights,), (vectors,))[0], [g.numpy() for g in expected], rtol=1e-4, atol=1e-5)

    def test_in_the_native_backward_pass(self):
        kept, plain = models(dense, POINTS)
        results = []
        for model in (kept, plain):
            fun, weights = kg.functionalize(model)
            scale = torch.tensor(2.0, requires_grad=True)
            slopes = kg.grad(lambda w, fun=fun, s=scale: s * ops.sum(ops.square(fun(w, tensor(POINTS)))))(
                [2 * w for w in weights]
            )
            sum(ops.sum(g * g) for g in slopes).backward()
            results.append(scale.grad)
        close(results[0], results[1].numpy())
        assert results[0] != 0

    def test_curvature(self):
        kept, plain = models(dense, POINTS)
        data = (POINTS.astype("float32"), np.ones((2, 1), "float32"))
        matrices = [
            np.asarray(kg.curvature.GaussNewton(m, keras.losses.MeanSquaredError(), data).dense())
            for m in (kept, plain)
        ]
        close(*matrices, rtol=1e-4, atol=1e-5)

    def test_of_a_variable_that_is_read_by_a_function_alone(self):
        v = keras.Variable(3.0)
        fun = keras.remat(lambda x: ops.sin(v * x))

        def value(w, x):
            with StateScope([(v, w)]):
                return fun(x)

        by_w, by_x = kg.grad(value, argnums=(0, 1))(2.0, 0.5)
        close([by_w, by_x], [0.5 * np.cos(1.0), 2 * np.cos(1.0)])


@drops_keywords
class TestWhatWentForTheCall:
    def check(self, layers, x, training=True, rtol=1e-4):
        """The gradient by input and weights, and the state left behind, are as without a checkpoint."""
        kept, plain = models(layers, x)
        found = []
        for model in (kept, plain):
            values = tensor(x)
            with kg.GradientTape() as tape:
                tape.watch(values)
                y = ops.sum(ops.square(ops.cast(model(values, training=training), "float32")))
            sources = [values, *model.trainable_variables]
            gradients = [ops.convert_to_numpy(ops.cast(g, "float32")) for g in tape.gradient(y, sources)]
            found.append([*gradients, *[ops.convert_to_numpy(v) for v in model.non_trainable_variables]])
        close(found[0], found[1], rtol=rtol, atol=1e-5)

    def test_attention_takes_the_kernel_of_the_forward_pass(self):
        class Attention(keras.layers.Layer):
            def build(self, shape):
                self.inner = keras.layers.MultiHeadAttention(2, 4)
                self.inner.build(shape, shape)

            def call(self, x):
                return self.inner(x, x)

        self.check(lambda: [Attention()], np.random.default_rng(0).normal(size=(2, 3, 4)))

    def test_dropout_draws_the_same_mask_and_its_seed_moves_once(self):
        self.check(lambda: [keras.layers.Dense(50), keras.layers.Dropout(0.5, seed=1)], POINTS)

    def test_dropout_in_a_layer_inside(self):
        """It goes by the mode of the call around, which is over when it is called again."""

        class Block(keras.layers.Layer):
            def build(self, shape):
                self.dropout = keras.layers.Dropout(0.5, seed=1)

            def call(self, x):
                return self.dropout(ops.sin(x))

        self.check(lambda: [Block()], np.ones((2, 40)))

    def test_statistics_move_once(self):
        self.check(lambda: [keras.layers.Dense(3), keras.layers.BatchNormalization()], POINTS)

    def test_mixed_precision(self):
        self.check(lambda: [keras.layers.Dense(3, dtype="mixed_bfloat16", activation="tanh")], POINTS)

    def test_an_assignment_in_between_is_an_error(self):
        """It would compute with the new value."""
        kept, _ = models(dense, POINTS)
        with kg.GradientTape() as tape:
            y = ops.sum(kept(tensor(POINTS)))
        kept.layers[0].kernel.assign(kept.layers[0].kernel * 2)
        with pytest.raises(RuntimeError, match="was overwritten before the derivative"):
            tape.gradient(y, kept.trainable_variables)

    def test_nothing_of_it_is_left(self):
        kept, _ = models(dense, POINTS)
        x = tensor(POINTS)
        with kg.GradientTape() as outer:
            outer.watch(x)
            with kg.GradientTape() as tape:
                tape.watch(x)
                y = ops.sum(kept(x))
            slope = tape.gradient(y, x)
            assert keras.src.backend.common.stateless_scope.get_stateless_scope() is None
        assert [id(v) for v in outer.watched_variables()] == [id(v) for v in kept.trainable_variables]
        assert outer.gradient(slope, kept.trainable_variables)[0] is not None

    def test_without_a_tape_torch_is_as_it_was(self):
        x = torch.tensor(X, requires_grad=True)
        keras.remat(product)(x).sum().backward()
        close(x.grad, FIRST)
