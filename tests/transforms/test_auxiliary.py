"""has_aux: what a function returns beside its value comes back as it is, in the forms of JAX."""

import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from tests.cases import close, tensor
from tests.compilers import COMPILERS

X = np.array([0.5, -1.0, 2.0])

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf
if keras.backend.backend() == "torch":
    import torch

    class OneByOne(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, u):
            return u


def aux_of(x):
    """Any nesting, of anything."""
    return {"twice": 2 * x, "none": None, "name": "cube", "count": 3, "pair": (x[0], [True])}


def vector(x):
    return x**3, aux_of(x)


def scalar(x):
    return ops.sum(x**3), aux_of(x)


def check_aux(aux, x=X):
    assert aux["none"] is None and aux["name"] == "cube" and aux["count"] == 3 and aux["pair"][1] == [True]
    assert type(aux["count"]) is int and type(aux["pair"][1][0]) is bool
    assert list(aux) == ["twice", "none", "name", "count", "pair"] and type(aux["pair"]) is tuple
    close(aux["twice"], 2 * x)
    close(aux["pair"][0], x[0])


class TestJacobian:
    @pytest.mark.parametrize("mode", ["forward", "reverse"])
    @pytest.mark.parametrize("chunk_size", [None, 2])
    def test_values(self, mode, chunk_size):
        fun = kg.jacobian(vector, mode=mode, chunk_size=chunk_size, has_aux=True)
        for scale in (1.0, 3.0):  # by the same program
            found, aux = fun(tensor(scale * X))
            close(found, np.diag(3 * (scale * X) ** 2))
            check_aux(aux, scale * X)

    def test_aux_of_another_trace_is_another_one(self):
        fun = kg.jacobian(lambda x, name: (x * x, {"name": name, "shape": tuple(x.shape)}), has_aux=True)
        assert fun(tensor([1.0]), "a")[1] == {"name": "a", "shape": (1,)}
        assert fun(tensor([1.0, 2.0]), "b")[1] == {"name": "b", "shape": (2,)}
        assert fun(tensor([1.0]), "a")[1] == {"name": "a", "shape": (1,)}

    def test_a_function_that_cannot_be_compiled(self):
        def by_value(x):
            return (x if float(x[0]) > 0 else -x), aux_of(x)

        fun = kg.jacobian(by_value, has_aux=True)
        for _ in range(2):
            found, aux = fun(tensor(X))
            close(found, np.eye(3))
            check_aux(aux)

    def test_a_pair_is_needed(self):
        for transform in (kg.jacobian, kg.batch_jacobian, kg.hessian):
            with pytest.raises(ValueError, match=f"under `{transform.__name__}` must return a pair"):
                transform(lambda x: x, has_aux=True)(tensor([[1.0, 2.0, 3.0]]))
            with pytest.raises(ValueError, match="expects True or False as `has_aux`"):
                transform(lambda x: x, has_aux="yes")


class TestBatchJacobian:
    @pytest.mark.parametrize("chunk_size", [None, 2])
    def test_values(self, chunk_size):
        x = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
        found, aux = kg.batch_jacobian(vector, chunk_size=chunk_size, has_aux=True)(tensor(x))
        close(found, [np.diag(3 * row**2) for row in x])
        check_aux(aux, x)

    def test_that_is_checked_for_independence(self):
        x = tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
        _, aux = kg.batch_jacobian(vector, check_independence=True, has_aux=True)(x)
        check_aux(aux, ops.convert_to_numpy(x))
        with pytest.raises(ValueError, match="depends on the input of others"):
            kg.batch_jacobian(lambda x: (x - ops.mean(x, axis=0), None), check_independence=True, has_aux=True)(x)


class TestHessian:
    @pytest.mark.parametrize("chunk_size", [None, 2])
    def test_values(self, chunk_size):
        found, aux = kg.hessian(scalar, chunk_size=chunk_size, has_aux=True)(tensor(X))
        close(found, np.diag(6 * X))
        check_aux(aux)
        found, aux = kg.hessian(vector, chunk_size=chunk_size, has_aux=True)(tensor(X))
        close(found, np.einsum("ij,jk,j->ijk", np.eye(3), np.eye(3), 6 * X))
        check_aux(aux)


def test_linearize():
    out, push, aux = kg.linearize(vector, tensor(X), has_aux=True)
    close(out, X**3)
    check_aux(aux)
    close(push(np.ones(3)), 3 * X**2)
    _, push, aux = kg.linearize(kg.grad(scalar, has_aux=True), tensor(X), has_aux=True)
    close(push(np.ones(3)), 6 * X)
    check_aux(aux)


def test_first_order():
    check_aux(kg.grad(scalar, has_aux=True)(tensor(X))[1])
    check_aux(kg.value_and_grad(scalar, has_aux=True)(tensor(X))[0][1])
    check_aux(kg.vjp(vector, tensor(X), has_aux=True)[2])
    check_aux(kg.jvp(vector, (tensor(X),), (X,), has_aux=True)[2])


def one_by_one(x):
    """`x` itself, by what no backend can vectorize."""
    if keras.backend.backend() == "torch":
        return OneByOne.apply(x)
    if keras.backend.backend() == "tensorflow":
        return tf.py_function(lambda x: x, [x], x.dtype)
    return x


class TestPerExampleGrad:
    x, y = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), np.array([0.0, 1.0, 2.0])

    def loss(self, w, x, y):
        out = ops.matmul(x, w)
        return ops.sum((out - y) ** 2), {"out": out, "weights": w, "name": "loss", "rank": len(x.shape), "none": None}

    def test_values(self):
        w = np.array([0.5, -1.0])
        found, aux = kg.per_example_grad(self.loss, has_aux=True)(tensor(w), tensor(self.x), tensor(self.y))
        close(found, 2 * (self.x @ w - self.y)[:, None] * self.x)
        close(aux["out"], (self.x @ w)[:, None])
        close(aux["weights"], np.tile(w, (3, 1)))
        assert (aux["name"], aux["rank"], aux["none"]) == ("loss", 2, None)

    def test_without_tensors(self):
        found, aux = kg.per_example_grad(lambda w, x: (ops.sum(w * x), "aux"), has_aux=True)(2.0, tensor(self.y))
        close(found, self.y)
        assert aux == "aux"

    def test_one_example_at_a_time(self):
        w = tensor([0.5, -1.0])

        def loss(w, x):
            out = one_by_one(x)
            return ops.sum(out * w), (out, "aux")

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found, aux = kg.per_example_grad(loss, has_aux=True)(w, tensor(self.x))
        close(found, self.x)
        close(aux[0], self.x[:, None])
        assert aux[1] == "aux"

    def test_of_no_example(self):
        found, aux = kg.per_example_grad(self.loss, has_aux=True)(
            tensor([1.0, 2.0]), np.zeros((0, 2), "float32"), np.zeros(0, "float32")
        )
        close(found, np.zeros((0, 2)))
        close(aux["out"], np.zeros((0, 1)))
        assert (aux["name"], aux["rank"], aux["none"]) == ("loss", 2, None)

    def test_a_pair_is_needed(self):
        with pytest.raises(ValueError, match="under `per_example_grad` must return a pair"):
            kg.per_example_grad(lambda w, x: ops.sum(w * x), has_aux=True)(2.0, tensor(self.y))


TRANSFORMS = {
    "jacobian": (lambda fun: kg.jacobian(fun, has_aux=True), vector, np.diag(3 * X**2)),
    "chunks": (lambda fun: kg.jacobian(fun, has_aux=True, chunk_size=2), vector, np.diag(3 * X**2)),
    "hessian": (lambda fun: kg.hessian(fun, has_aux=True), scalar, np.diag(6 * X)),
    "grad": (lambda fun: kg.grad(fun, has_aux=True), scalar, 3 * X**2),
}


# Eagerly, each is tried above; XLA compiles what `tf.function` has traced.
@pytest.mark.parametrize(
    "compiler", [c for c in COMPILERS if c.name not in ("eager", "tf.function")], ids=lambda c: c.name
)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_compiled_by_others(compiler, name):
    transform, fun, expected = TRANSFORMS[name]

    def call(x):
        found, aux = transform(fun)(x)
        check_structure(aux)
        return found, aux["twice"]

    def check_structure(aux):
        assert aux["none"] is None and aux["name"] == "cube" and aux["count"] == 3

    close(compiler.compile(call)(tensor(X)), (expected, 2 * X))


@pytest.mark.parametrize("transform", [kg.grad, kg.jacobian, kg.hessian])
def test_a_variable_stands_for_the_value_that_it_has_then(transform):
    v = keras.Variable(3.0)
    fun = transform(lambda x: (ops.sum(x * x * v), [v]), has_aux=True)
    _, (first,) = fun(tensor(X))
    v.assign(5.0)
    _, (second,) = fun(tensor(X))
    assert ops.is_tensor(first) and not isinstance(first, keras.Variable)
    close([first, second], [3.0, 5.0])
    w = tensor([1.0, 2.0])
    _, (per_example,) = kg.per_example_grad(lambda w, x: (ops.sum(w * x), (v,)), has_aux=True)(w, tensor(np.eye(2)))
    v.assign(7.0)
    close(per_example, [5.0, 5.0])
    with kg.GradientTape() as tape:
        _, (aux,) = fun(tensor(X))
    close(tape.gradient(aux, v), 1.0)


class TestNested:
    """What an inner function says beside its value is differentiated as any value is, and is none of its own."""

    def test_gradient_of_what_has_aux(self):
        def inner(x):
            gradient, aux = kg.grad(scalar, has_aux=True)(x)
            return ops.sum(gradient * aux["twice"]), aux

        found, aux = kg.grad(inner, has_aux=True)(tensor(X))  # of 6 x^3
        close(found, 18 * X**2)
        check_aux(aux)

    def test_directly(self):
        found, aux = kg.jacobian(kg.grad(scalar, has_aux=True), has_aux=True)(tensor(X))
        close(found, np.diag(6 * X))
        check_aux(aux)
        found, aux = kg.jacobian(kg.jacobian(vector, has_aux=True), has_aux=True)(tensor(X))
        close(found, np.einsum("ij,jk,j->ijk", np.eye(3), np.eye(3), 6 * X))
        check_aux(aux)

    def test_under_a_tape(self):
        x = tensor(X)
        with kg.GradientTape(persistent=True) as tape:
            tape.watch(x)
            found, aux = kg.jacobian(vector, has_aux=True)(x)
            gradients, per_example = kg.per_example_grad(
                lambda w, e: (ops.sum(w * w * e), ops.sum(w**3)), has_aux=True
            )(x, tensor([1.0, 2.0]))
        close(tape.gradient(found, x), 6 * X)
        close(tape.gradient(aux["twice"], x), np.full(3, 2.0))
        close(tape.gradient(gradients, x), np.full(3, 6.0))
        close(tape.gradient(per_example, x), 6 * X**2)


def test_a_variable_as_aux_has_the_value_of_the_call():
    c = keras.Variable(1.0)

    def fun(x):
        c.assign(ops.sum(x))
        return ops.sum(x) * c, c

    _, aux = kg.grad(fun, has_aux=True)(tensor([1.0, 2.0]))
    close(aux, 3.0)
    close(c.value, 1.0)
