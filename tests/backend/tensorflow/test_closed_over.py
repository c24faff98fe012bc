"""What TensorFlow's rematerialization and custom gradients close over, by which they lose the gradient."""

import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from tests.cases import close, tensor

if keras.config.backend() != "tensorflow":
    pytest.skip("functions of TensorFlow", allow_module_level=True)

import tensorflow as tf

from keras_gradtools.backend.tensorflow import closed_over

pytestmark = pytest.mark.filterwarnings("ignore:.*save no memory where keras_gradtools records")

X = np.array([[1.0, -2.0, 0.5], [0.3, 0.7, -1.1], [2.0, 0.1, 0.4]])
KERNEL, BIAS = np.array([[0.5, -0.3], [0.2, 0.8], [-0.6, 0.1]]), np.array([0.1, -0.2])
REMATS = {"keras.remat": keras.remat, "tf.recompute_grad": tf.recompute_grad}


def rematerialized_model(mode):
    """tanh(x K + b), of whose squares the derivatives are known."""
    with keras.RematScope(mode, output_size_threshold=1, layer_names=["dense_in_remat"]):
        layer = keras.layers.Dense(2, activation="tanh", name="dense_in_remat")
        model = keras.Sequential([keras.Input((3,)), layer])
    model.set_weights([KERNEL, BIAS])
    return model


def gradient_of_squares():
    y = np.tanh(X @ KERNEL + BIAS)
    u = 2 * y * (1 - y**2)
    return [X.T @ u, u.sum(0)]


def hessian_of_squares_by_bias():
    y = np.tanh(X @ KERNEL + BIAS)
    return np.diag((2 * (1 - y**2) * (1 - 3 * y**2)).sum(0))


@pytest.mark.parametrize("compiler", [lambda f: f, kg.jit, lambda f: tf.function(f, jit_compile=True)])
@pytest.mark.parametrize("mode", ["full", "larger_than", "list_of_layers", "activations"])
def test_functional_weights_of_a_rematerialized_model(mode, compiler):
    fun, weights = kg.functionalize(rematerialized_model(mode))

    def loss(weights):
        return ops.sum(ops.square(fun(weights, tensor(X))))

    close(compiler(kg.grad(loss))(weights), gradient_of_squares(), 1e-4)
    units = [tensor(np.zeros((3, 2))), tensor([1.0, 0.0])]
    product = compiler(lambda w: kg.hvp(loss, (w,), (units,))[0])(weights)
    close(product[1], hessian_of_squares_by_bias()[0], 1e-4)


def test_hessian_of_a_rematerialized_model():
    fun, weights = kg.functionalize(rematerialized_model("full"))
    blocks = kg.hessian(lambda w: ops.sum(ops.square(fun(w, tensor(X)))))(weights)
    close(blocks[1][1], hessian_of_squares_by_bias(), 1e-4)


def test_curvature_of_a_rematerialized_model():
    hessian = kg.curvature.Hessian(rematerialized_model("full"), "mse", (X, np.zeros((3, 2))))
    close(hessian.dense()[-2:, -2:], hessian_of_squares_by_bias() / 6, 1e-4)


def test_second_order_training_of_a_rematerialized_model():
    model = rematerialized_model("full")
    trainer = kg.models.SecondOrder(model)
    trainer.compile(kg.optimizers.NewtonCG(), "mse")
    y = np.tanh(X @ np.ones((3, 2)) * 0.3)
    losses = trainer.fit(X, y, batch_size=3, epochs=8, verbose=0).history["loss"]
    assert losses[-1] < 1e-3 * losses[0]


def test_tape_over_a_rematerialized_model_to_second_order():
    model = rematerialized_model("full")
    kernel, bias = model.trainable_variables
    with kg.GradientTape() as outer:
        with kg.GradientTape() as inner:
            loss = ops.sum(ops.square(model(tensor(X))))
        gradient = inner.gradient(loss, [kernel, bias])
    close(gradient, gradient_of_squares(), 1e-4)
    close(outer.jacobian(gradient[1], bias), hessian_of_squares_by_bias(), 1e-4)


def test_dropout_in_a_rematerialized_model_has_one_mask():
    with keras.RematScope("full"):
        model = keras.Sequential([keras.Input((8,)), keras.layers.Dropout(0.5, seed=1)])
    x = tensor(np.ones((4, 8)))
    with kg.GradientTape() as tape:
        tape.watch(x)
        y = model(x, training=True)
    close(tape.gradient(y, x), ops.convert_to_numpy(y))


@pytest.mark.parametrize("compiler", [lambda f: f, tf.function, lambda f: tf.function(f, jit_compile=True)])
@pytest.mark.parametrize("remat", REMATS.values(), ids=REMATS)
def test_what_a_rematerialized_function_closes_over(remat, compiler):
    """(a c)^2 by c, where a is the argument and c is closed over: 2 a^2 c, 2 a^2 and 0."""

    def fun(c):
        return remat(lambda a: ops.square(a * c))(tensor(3.0))

    derivatives = kg.grad(fun), kg.grad(kg.grad(fun)), kg.grad(kg.grad(kg.grad(fun)))
    close([compiler(d)(tensor(2.0)) for d in derivatives], [36.0, 18.0, 0.0])
    close(compiler(lambda c: kg.jvp(fun, (c,), (tensor(0.5),))[1])(tensor(2.0)), 18.0)


def test_per_example_gradients_by_what_is_closed_over():
    found = kg.per_example_grad(lambda w, x: ops.sum(keras.remat(lambda x: x * w * w)(x)))(3.0, tensor([1.0, 2.0]))
    close(found, [6.0, 12.0])


def test_rematerialization_is_kept_where_keras_runs_alone():
    calls = []

    @keras.remat
    def square(x):
        calls.append(x)
        return x * x

    x = tensor(3.0)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = square(x)
    close(tape.gradient(y, x), 6.0)
    assert len(calls) == 2
    with kg.GradientTape() as tape:
        tape.watch(x)
        y = square(x)
    close(tape.gradient(y, x), 6.0)
    assert len(calls) == 3


@pytest.mark.filterwarnings("default")
def test_the_memory_that_is_not_saved_is_said_once():
    closed_over._warn_kept.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            kg.grad(keras.remat(lambda x: x * x))(3.0)
    assert [str(w.message)[:49] for w in caught] == ["On TensorFlow, `keras.RematScope`, `keras.remat` "]


def custom_square(a, c):
    """a c, by a custom gradient that closes over c."""

    @tf.custom_gradient
    def product(a):
        return a * c, lambda u: u * c

    return product(a)


@pytest.mark.parametrize("compiler", [lambda f: f, kg.jit])
def test_a_source_that_a_custom_gradient_closes_over_is_an_error(compiler):
    a, c = tensor(2.0), tensor(3.0)
    gradient = compiler(kg.grad(custom_square, argnums=(0, 1)))
    with pytest.raises(ValueError, match="lost in 'product', a function under `tf.custom_gradient`"):
        gradient(a, c)
    with pytest.raises(ValueError, match="lost in 'product'"):
        kg.jvp(custom_square, (a, c), (a, c))
    with kg.GradientTape() as tape:
        tape.watch([a, c])
        y = custom_square(a, c)
    with pytest.raises(ValueError, match="lost in 'product'"):
        tape.gradient(y, c)


def test_a_functional_weight_that_a_custom_gradient_reads_is_an_error():
    class Doubled(keras.layers.Layer):
        def build(self, shape):
            self.scale = self.add_weight(shape=(), initializer="ones")

        def call(self, x):
            @tf.custom_gradient
            def scaled(x):
                return x * self.scale, lambda u, variables=(): (u * self.scale, [None] * len(variables))

            return scaled(x)

    layer = Doubled()
    x = tensor([1.0, 2.0])
    layer(x)
    fun, weights = kg.functionalize(layer)
    with pytest.raises(ValueError, match="lost in 'scaled'"):
        kg.grad(lambda w, x: ops.sum(fun(w, x)), argnums=(0, 1))(weights, x)


def test_a_function_that_is_traced_under_the_tape():
    """What its custom gradient computed is of a graph, and no value of the tape's."""
    v = tf.Variable(3.0)

    @tf.function
    def square(x):
        @tf.custom_gradient
        def call():
            def grad_fn(u, variables=None):
                return (), [2 * u * v * x for v in variables]

            return v * v * x, grad_fn

        return call()

    x, other = tensor(2.0), tensor(5.0)
    for _ in range(2):  # traced, and as it was
        with kg.GradientTape(persistent=True) as tape:
            tape.watch([x, other])
            y = square(x) * 1.0
        close(tape.gradient(y, v), 12.0)
        assert tape.gradient(y, other) is None
        close(tape.gradient(y, x), 0.0)  # as TensorFlow's own tape has it: the function closes over `x`


def test_what_a_custom_gradient_has_nothing_to_do_with_is_zero():
    a, c = tensor(2.0), tensor(3.0)
    gradient = kg.grad(lambda a, c: ops.sin(a) + 0 * ops.stop_gradient(custom_square(a, c)), argnums=(0, 1))
    close(gradient(a, c), (np.cos(2.0), 0.0))
    no_gradient = tf.custom_gradient(lambda a, c: (a * c, lambda u: (u * c, None)))
    close(kg.grad(no_gradient, argnums=(0, 1))(a, c), (3.0, 0.0))


def test_what_custom_gradient_of_this_package_closes_over_is_a_constant():
    def fun(a, c):
        return kg.custom_gradient(lambda a: (a * c, lambda u: u * c))(a)

    close(kg.grad(fun, argnums=(0, 1))(tensor(2.0), tensor(3.0)), (3.0, 0.0))
