"""hessian, flatten_hessian, hvp, ggnvp, linearize and higher orders: closed forms, SciPy's Rosenbrock, identities."""

import keras
import numpy as np
import pytest
import scipy.optimize
from keras import ops

import keras_gradtools as kg
from tests.cases import CASES_WITH_HESSIAN, case_id, close, tensor
from tests.compilers import with_every_compiler

RNG = np.random.default_rng(0)
POINT = np.array([-0.5, 0.8, 0.3, -0.2, 0.6])
DIRECTION = np.array([0.3, -1.0, 0.5, 0.2, -0.7])


def rosenbrock(x):
    return ops.sum((1 - x[:-1]) ** 2 + 100 * (x[1:] - x[:-1] ** 2) ** 2)


def normal(*shape):
    return RNG.normal(size=shape).astype("float32")


class TestRosenbrock:
    """Against SciPy's own derivatives."""

    def test_gradient(self):
        close(kg.grad(rosenbrock)(tensor(POINT)), scipy.optimize.rosen_der(POINT), rtol=1e-4, atol=1e-3)

    @pytest.mark.parametrize("chunk_size", [None, 1, 2, 7])
    def test_hessian(self, chunk_size):
        found = kg.hessian(rosenbrock, chunk_size=chunk_size)(tensor(POINT))
        close(found, scipy.optimize.rosen_hess(POINT), rtol=1e-4, atol=1e-3)

    def test_product(self):
        (found,) = kg.hvp(rosenbrock, (tensor(POINT),), (tensor(DIRECTION),))
        close(found, scipy.optimize.rosen_hess_prod(POINT, DIRECTION), rtol=1e-4, atol=1e-3)

    def test_linearized_product(self):
        gradient, product = kg.linearize(kg.grad(rosenbrock), tensor(POINT))
        close(gradient, scipy.optimize.rosen_der(POINT), rtol=1e-4, atol=1e-3)
        for v in (DIRECTION, POINT, DIRECTION):
            close(product(tensor(v)), scipy.optimize.rosen_hess_prod(POINT, v), rtol=1e-4, atol=1e-3)

    def test_newton_finds_the_minimum(self):
        x = np.array([1.1, 1.2, 0.9, 1.1, 1.2])
        for _ in range(12):
            h, g = kg.hessian(rosenbrock)(tensor(x)), kg.grad(rosenbrock)(tensor(x))
            x = x - np.linalg.solve(ops.convert_to_numpy(h).astype("float64"), ops.convert_to_numpy(g))
        close(x, np.ones(5), rtol=1e-3)


@pytest.mark.parametrize("case", CASES_WITH_HESSIAN, ids=case_id)
def test_closed_forms(case):
    """Of the function's sum: the closed form is the Hessian of each output."""
    x = tensor(case.inputs[0])
    outputs = case.hessian.ndim - 2 * x.ndim if hasattr(x, "ndim") else 0
    hessian = case.hessian.sum(axis=tuple(range(outputs))) if outputs else case.hessian

    def total(x):
        return ops.sum(case.fun(x))

    close(kg.hessian(total)(x), hessian, rtol=1e-4, atol=1e-4)
    v = RNG.normal(size=tuple(x.shape))
    close(kg.hvp(total, (x,), (tensor(v),))[0], np.tensordot(hessian, v, v.ndim), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("compile", [lambda fun: fun, kg.jit], ids=["eager", "kg.jit"])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_an_empty_tensor_beside_others(chunk_size, compile):
    p = {"a": tensor(np.zeros((0, 3))), "b": tensor([1.0, 2.0])}

    def cubes(p):
        return ops.sum(p["b"] ** 3) + ops.sum(p["a"] ** 2)

    by_empty, by_full = (
        {"a": np.zeros((0, 3, 0, 3)), "b": np.zeros((0, 3, 2))},
        {"a": np.zeros((2, 0, 3)), "b": np.diag([6.0, 12.0])},
    )
    close(compile(kg.hessian(cubes, chunk_size=chunk_size))(p), {"a": by_empty, "b": by_full})
    close(compile(lambda p: kg.hvp(cubes, (p,), (p,)))(p), ({"a": np.zeros((0, 3)), "b": np.array([6.0, 24.0])},))


@with_every_compiler
def test_compiled_by_others(compiler):
    x, v = tensor(POINT), tensor(DIRECTION)
    close(compiler.compile(kg.hessian(rosenbrock))(x), scipy.optimize.rosen_hess(POINT), rtol=1e-4, atol=1e-3)
    product = compiler.compile(lambda x, v: kg.hvp(rosenbrock, (x,), (v,))[0])
    close(product(x, v), scipy.optimize.rosen_hess_prod(POINT, DIRECTION), rtol=1e-4, atol=1e-3)
    linearized = compiler.compile(lambda x, v: kg.linearize(kg.grad(rosenbrock), x)[1](v))
    close(linearized(x, v), scipy.optimize.rosen_hess_prod(POINT, DIRECTION), rtol=1e-4, atol=1e-3)


class TestBlocks:
    """f = sum_i a_i^2 b_i + (a' M a) with a of shape (2,), b of shape (2, 1)."""

    m = np.array([[2.0, 1.0], [0.0, 3.0]])
    a, b = np.array([1.0, -2.0]), np.array([[0.5], [4.0]])

    def fun(self, a, b):
        return ops.sum(a**2 * b[:, 0]) + ops.sum(a * ops.matmul(tensor(self.m), a))

    def expected(self):
        aa = np.diag(2 * self.b[:, 0]) + self.m + self.m.T
        ab = np.diag(2 * self.a)[:, :, None]
        return aa, ab

    def test_several_arguments(self):
        aa, ab = self.expected()
        found = kg.hessian(self.fun, argnums=(0, 1))(tensor(self.a), tensor(self.b))
        close(found, ((aa, ab), (ab.transpose(1, 2, 0), np.zeros((2, 1, 2, 1)))))

    @pytest.mark.parametrize("chunk_size", [None, 3])
    def test_nested_argument_and_its_matrix(self, chunk_size):
        aa, ab = self.expected()
        blocks = kg.hessian(lambda p: self.fun(p["x"][0], p["y"]), chunk_size=chunk_size)(
            {"x": [tensor(self.a)], "y": tensor(self.b)}
        )
        close(blocks["x"][0]["y"], ab)
        close(blocks["y"]["x"][0], ab.transpose(1, 2, 0))
        matrix, unravel = kg.flatten_hessian(blocks)
        close(matrix, np.block([[aa, ab[:, :, 0]], [ab[:, :, 0].T, np.zeros((2, 2))]]))
        close(unravel(tensor([1.0, 2.0, 3.0, 4.0])), {"x": [[1, 2]], "y": [[3], [4]]})

    @pytest.mark.parametrize(
        "structure", [[0], [[0]], (0, 1), {"a": {"b": 0}, "c": [1, 2]}, [[0, 1], [2, 3]], [[0, 1]]]
    )
    def test_the_structure_of_the_argument_is_found(self, structure):
        argument = keras.tree.map_structure(lambda i: tensor(normal(i + 1)), structure)

        def fun(p):
            return ops.sum(ops.concatenate(keras.tree.flatten(p))) ** 2

        matrix, unravel = kg.flatten_hessian(kg.hessian(fun)(argument))
        n = sum(i + 1 for i in keras.tree.flatten(structure))
        close(matrix, np.full((n, n), 2.0))
        parts = unravel(np.arange(n))
        keras.tree.assert_same_structure(keras.tree.map_structure(lambda _: 0, parts), structure)
        close(ops.concatenate(keras.tree.flatten(parts)), np.arange(n))

    def test_one_tensor(self):
        matrix, unravel = kg.flatten_hessian(kg.hessian(lambda x: ops.sum(x) ** 2)(tensor(normal(2, 3))))
        close(matrix, np.full((6, 6), 2.0))
        close(unravel(ops.arange(6)), [[0, 1, 2], [3, 4, 5]])

    def test_a_newton_step_on_a_quadratic_reaches_its_minimum(self):
        a, b = normal(2, 3), normal(3)

        def fun(p):
            return ops.sum((p["a"] - tensor(a)) ** 2) + ops.sum((p["b"] - tensor(b)) ** 2) + p["a"][0, 0] * p["b"][0]

        p = {"a": tensor(normal(2, 3)), "b": tensor(normal(3))}
        gradient = kg.grad(fun)(p)
        matrix, unravel = kg.flatten_hessian(kg.hessian(fun)(p))
        flat = ops.concatenate([ops.reshape(g, (-1,)) for g in (gradient["a"], gradient["b"])])
        step = unravel(ops.solve(matrix, flat))
        there = kg.grad(fun)({name: p[name] - step[name] for name in p})
        close(there, {"a": np.zeros((2, 3)), "b": np.zeros(3)}, atol=1e-5)

    @pytest.mark.parametrize("vector", [np.ones(5), np.ones((6, 1)), np.ones((1, 6)), 3.0])
    def test_unravel_takes_a_vector_of_its_length(self, vector):
        _, unravel = kg.flatten_hessian(kg.hessian(lambda x: ops.sum(x) ** 2)(tensor(normal(2, 3))))
        with pytest.raises(ValueError, match=r"vector of `unravel` must have the shape of.*\(6,\).*Received"):
            unravel(vector)

    def test_unravel_takes_numbers(self):
        _, unravel = kg.flatten_hessian(kg.hessian(lambda x: ops.sum(x) ** 2)(tensor(normal(2, 3))))
        with pytest.raises(ValueError, match=r"unravel expects a vector of shape \(6,\)"):
            unravel("step")


class TestGaussNewton:
    def test_of_cross_entropy_it_is_the_fisher_matrix(self):
        w, x, v = normal(3, 4), normal(5, 3), normal(3, 4)
        labels = np.array([0, 1, 2, 3, 0])
        z = x @ w
        p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
        jv = x @ v
        expected = x.T @ (p * jv - p * (p * jv).sum(axis=1, keepdims=True)) / 5

        def loss(z):
            return ops.mean(keras.losses.sparse_categorical_crossentropy(labels, z, from_logits=True))

        (found,) = kg.ggnvp(lambda w: ops.matmul(x, w), loss, (tensor(w),), (tensor(v),))
        close(found, expected, rtol=1e-4, atol=1e-5)
        # The model is linear, so that it is the Hessian, too.
        (product,) = kg.hvp(lambda w: loss(ops.matmul(x, w)), (tensor(w),), (tensor(v),))
        close(product, expected, rtol=1e-4, atol=1e-5)

    def test_leaves_out_the_curvature_of_the_model(self):
        (found,) = kg.ggnvp(lambda x: x**3, lambda y: y**2 / 2, (2.0,), (1.0,))
        close(found, (3 * 2.0**2) ** 2)
        close(kg.hvp(lambda x: x**6 / 2, (2.0,), (1.0,))[0], 15 * 2.0**4)

    def test_nested_outputs_and_several_arguments(self):
        by_x, by_y = kg.ggnvp(
            lambda x, y: {"sum": x["a"] + y, "product": x["a"] * y},
            lambda out: (out["sum"] ** 2 + 3 * out["product"] ** 2) / 2,
            ({"a": 2.0}, 5.0),
            ({"a": 1.0}, None),
        )
        close(by_x, {"a": 1 + 3 * 25.0})
        close(by_y, 1 + 3 * 10.0)

    @with_every_compiler
    def test_compiled_by_others(self, compiler):
        product = compiler.compile(lambda x, v: kg.ggnvp(lambda x: x**3, lambda y: ops.sum(y**2), (x,), (v,))[0])
        close(product(tensor([2.0, 1.0]), tensor([1.0, 2.0])), [2 * 144.0, 2 * 9.0 * 2])


class TestProducts:
    def test_tangents_may_be_left_out(self):
        by_x, by_y = kg.hvp(lambda x, y: x**2 * y, (2.0, 3.0), (1.0, None))
        close([by_x, by_y], [6.0, 4.0])

    def test_unconnected_is_zero(self):
        by_x, by_y = kg.hvp(lambda x, y: x**2, (2.0, np.ones(2, "float32")), (1.0, None))
        close([by_x, by_y], [2.0, np.zeros(2)])

    def test_through_a_custom_gradient(self):
        @kg.custom_gradient
        def log1pexp(x):
            e = ops.exp(x)
            return ops.log(1 + e), lambda upstream: upstream * (1 - 1 / (1 + e))

        close(kg.hvp(log1pexp, (1.0,), (1.0,))[0], 0.19661193)
        close(kg.linearize(kg.grad(log1pexp), 1.0)[1](1.0), 0.19661193)
        close(kg.hessian(log1pexp)(1.0), 0.19661193)

    def test_of_a_field_that_is_no_gradient(self):
        """The rule (y, 2 x) has the Jacobian [[0, 1], [2, 0]]: the product is with it, not with its transpose."""

        @kg.custom_gradient
        def fun(p):
            field = ops.stack([p[1], 2 * p[0]])
            return ops.sum(p), lambda upstream: upstream * field

        p, v = tensor([2.0, 3.0]), tensor([1.0, 10.0])
        close(kg.grad(fun)(p), [3.0, 4.0])
        close(kg.hessian(fun)(p), [[0.0, 1.0], [2.0, 0.0]])
        close(kg.hvp(fun, (p,), (v,))[0], [10.0, 2.0])
        close(kg.linearize(kg.grad(fun), p)[1](v), [10.0, 2.0])
        close(kg.jit(lambda p, v: kg.hvp(kg.jit(fun), (p,), (v,))[0])(p, v), [10.0, 2.0])

    def test_linearized_structures(self):
        out, push = kg.linearize(lambda x, y: {"p": x["a"] * y, "s": [y, 2 * x["a"]]}, {"a": 2.0}, 3.0)
        close(out, {"p": 6.0, "s": [3.0, 4.0]})
        for dx, dy in ((1.0, 10.0), (0.0, 1.0)):
            close(push({"a": dx}, dy), {"p": 3 * dx + 2 * dy, "s": [dy, 2 * dx]})
        close(push({"a": 1.0}, None), {"p": 3.0, "s": [0.0, 2.0]})

    @pytest.mark.parametrize("argnums", [(0, 1), (1, 0), (0,)])
    def test_linearized_gradients_by_some_arguments(self, argnums):
        """f = x^2 y: only where all arguments are differentiated by, in order, is the Jacobian a Hessian."""
        _, push = kg.linearize(kg.grad(lambda x, y: x**2 * y, argnums), 2.0, 3.0)
        by = {0: 6.0 * 1.0 + 4.0 * 10.0, 1: 4.0 * 1.0}
        close(push(1.0, 10.0), tuple(by[i] for i in argnums))
        close(kg.linearize(kg.grad(lambda x: x**2 * 3.0, -1), 2.0)[1](1.0), 6.0)
        gradient, aux = kg.linearize(kg.grad(lambda x: (x**3, x), has_aux=True), 2.0)[1](1.0)
        close([gradient, aux], [12.0, 1.0])

    def test_linearized_is_itself_differentiable(self):
        x = tensor(3.0)
        with kg.GradientTape() as tape:
            tape.watch(x)
            pushed = kg.linearize(lambda x: x**3, x)[1](1.0)
        close(tape.gradient(pushed, x), 18.0)
        close(kg.grad(lambda x: kg.linearize(kg.grad(lambda x: x**4), x)[1](1.0))(2.0), 48.0)


class TestThirdOrder:
    def test_by_every_route(self):
        """f = x^5: f''' = 60 x^2."""
        f = lambda x: x**5  # noqa: E731
        ways = [
            kg.grad(kg.grad(kg.grad(f))),
            kg.grad(lambda x: kg.hessian(f)(x)),
            lambda x: kg.jvp(kg.hessian(f), (x,), (1.0,))[1],
            lambda x: kg.hvp(kg.grad(f), (x,), (1.0,))[0],
            kg.jacobian(kg.hessian(f)),
            kg.hessian(kg.grad(f)),
            lambda x: kg.grad(lambda x: kg.hvp(f, (x,), (1.0,))[0])(x),
            kg.jit(kg.grad(kg.jit(kg.hessian(f)))),
        ]
        for way in ways:
            close(way(tensor(2.0)), 240.0, rtol=1e-4)

    def test_tape_over_hessian(self):
        x = tensor([1.0, 2.0])
        with kg.GradientTape() as tape:
            tape.watch(x)
            trace = ops.trace(kg.hessian(lambda x: ops.sum(x**4))(x))
        close(tape.gradient(trace, x), [24.0, 48.0])

    def test_hessian_over_tape(self):
        def slope(x):
            with kg.GradientTape() as tape:
                tape.watch(x)
                y = x**5
            return tape.gradient(y, x)

        close(kg.hessian(slope)(tensor(2.0)), 240.0 * 1.0, rtol=1e-4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: kg.hessian(3), "hessian takes a function"),
        (
            lambda: kg.hessian(ops.sum, chunk_size=-1),
            "hessian expects a positive integer, or None, as `chunk_size`.*-1",
        ),
        (lambda: kg.hvp(ops.tanh, (np.ones(2, "float32"),), (None,)), "must return one scalar"),
        (lambda: kg.hvp(ops.sum, np.ones(2, "float32"), (None,)), "primals of `hvp` must be a tuple"),
        (lambda: kg.hvp(ops.sum, (np.ones(2, "float32"),), (np.ones(3, "float32"),)), "must have the shape"),
        (lambda: kg.ggnvp(ops.tanh, ops.tanh, (np.ones(2, "float32"),), (None,)), "under `ggnvp` must return one"),
        (lambda: kg.ggnvp(ops.tanh, 3, (1.0,), (1.0,)), "ggnvp takes a function"),
        (lambda: kg.linearize(ops.tanh, 1.0)[1](1.0, 2.0), "tangents must have the structure"),
        (lambda: kg.flatten_hessian([np.ones(2)]), "takes the blocks that `hessian` returns"),
        (lambda: kg.flatten_hessian([tensor(np.ones((2, 2))), tensor(np.ones((2, 2)))]), "have that structure again"),
        (lambda: kg.flatten_hessian(tensor(np.ones((2, 3)))), "whose diagonal blocks have the shape"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        call()
