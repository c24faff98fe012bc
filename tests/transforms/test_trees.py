"""Transforms of functions of trees: of every kind of container, with None and other constants in them."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from tests.cases import close, tensor
from tests.containers import CONTAINERS, Pair

every_container = pytest.mark.parametrize("container", CONTAINERS, ids=lambda c: c.name)

X = np.array([1.0, 2.0])
V = np.array([3.0, -1.0])
H = np.diag(6 * X)


# Compiled, the containers enter and leave by one door, which `TestCompiledBoundary` tries with each of them.
# Inside, a transform sees what it sees eagerly: a few containers, of each protocol, will do.
WAYS = [(container, lambda f: f, "eager") for container in CONTAINERS]
WAYS += [(c, kg.jit, "jit") for c in CONTAINERS if c.name in ("dict", "tracked by a layer", "dataclass")]
every_way = pytest.mark.parametrize(
    ("c", "compiler"), [way[:2] for way in WAYS], ids=[f"{w[0].name}-{w[2]}" for w in WAYS]
)


class Cubes:
    """sum x^3 of the first entry of a container; it sees that it is handed one."""

    def __init__(self, container):
        self.container = container

    def __call__(self, p):
        a, b = self.container.parts(p)
        assert b is None
        return ops.sum(a**3)

    def elements(self, p):
        """x^3, in such a container as well."""
        a, b = self.container.parts(p)
        assert b is None
        return self.container.make(a**3, b)

    def found(self, p):
        a, b = self.container.parts(p)
        assert b is None
        return a


@every_way
class TestEveryContainer:
    """f(x) = sum x^3: gradient 3 x^2, Hessian diag(6 x)."""

    def test_grad(self, c, compiler):
        f = Cubes(c)
        close(f.found(compiler(kg.grad(f))(c.make(tensor(X), None))), 3 * X**2)

    def test_value_and_grad(self, c, compiler):
        f = Cubes(c)
        value, gradient = compiler(kg.value_and_grad(f))(c.make(tensor(X), None))
        close(value, (X**3).sum())
        close(f.found(gradient), 3 * X**2)

    def test_aux(self, c, compiler):
        f = Cubes(c)
        gradient, aux = compiler(kg.grad(lambda p: (f(p), f.elements(p)), has_aux=True))(c.make(tensor(X), None))
        close(f.found(gradient), 3 * X**2)
        close(f.found(aux), X**3)

    def test_vjp(self, c, compiler):
        f = Cubes(c)

        def pulled(p, u):
            out, pullback = kg.vjp(f.elements, p)
            return out, pullback(u)

        out, (gradient,) = compiler(pulled)(c.make(tensor(X), None), c.make(tensor(V), None))
        close(f.found(out), X**3)
        close(f.found(gradient), 3 * X**2 * V)

    def test_jvp(self, c, compiler):
        f = Cubes(c)
        pushed = compiler(lambda p, v: kg.jvp(f.elements, (p,), (v,)))
        out, along = pushed(c.make(tensor(X), None), c.make(tensor(V), None))
        close(f.found(out), X**3)
        close(f.found(along), 3 * X**2 * V)

    def test_linearize(self, c, compiler):
        f = Cubes(c)

        def pushed(p, v):
            out, pushforward = kg.linearize(f.elements, p)
            return out, pushforward(v), pushforward(None)

        out, along, nowhere = compiler(pushed)(c.make(tensor(X), None), c.make(tensor(V), None))
        close(f.found(out), X**3)
        close(f.found(along), 3 * X**2 * V)
        close(f.found(nowhere), 0 * X)

    @pytest.mark.parametrize(("mode", "chunk_size"), [("forward", None), ("reverse", 1)])
    def test_jacobian(self, c, compiler, mode, chunk_size):
        f = Cubes(c)
        found = compiler(kg.jacobian(f.elements, mode=mode, chunk_size=chunk_size))(c.make(tensor(X), None))
        close(f.found(f.found(found)), np.diag(3 * X**2))

    def test_batch_jacobian(self, c, compiler):
        f = Cubes(c)
        found = compiler(kg.batch_jacobian(f.elements))(c.make(tensor([X]), None))
        close(f.found(f.found(found)), [np.diag(3 * X**2)])

    def test_hessian(self, c, compiler):
        f = Cubes(c)
        blocks = compiler(kg.hessian(f))(c.make(tensor(X), None))
        close(f.found(f.found(blocks)), H)
        matrix, unravel = kg.flatten_hessian(blocks)
        close(matrix, H)
        close(f.found(unravel(V)), V)

    def test_hvp(self, c, compiler):
        f = Cubes(c)
        (product,) = compiler(lambda p, v: kg.hvp(f, (p,), (v,)))(c.make(tensor(X), None), c.make(tensor(V), None))
        close(f.found(product), H @ V)

    def test_ggnvp(self, c, compiler):
        f = Cubes(c)
        curved = compiler(lambda p, v: kg.ggnvp(f.elements, lambda y: ops.sum(f.found(y) ** 2), (p,), (v,)))
        (product,) = curved(c.make(tensor(X), None), c.make(tensor(V), None))
        close(f.found(product), 2 * (3 * X**2) ** 2 * V)

    def test_per_example_grad(self, c, compiler):
        f = Cubes(c)

        def loss(p, example):
            x, mask = c.parts(example)
            assert mask is None
            return f(p) * ops.sum(x)

        found = compiler(kg.per_example_grad(loss))(c.make(tensor(X), None), c.make(tensor([[1.0], [2.0]]), None))
        close(f.found(found), np.stack([3 * X**2, 6 * X**2]))

    def test_second_derivatives_by_nesting(self, c, compiler):
        f = Cubes(c)
        slope = kg.grad(lambda p: ops.sum(f.found(kg.grad(f)(p)) * tensor(V)))
        close(f.found(compiler(slope)(c.make(tensor(X), None))), H @ V)

    def test_a_tape(self, c, compiler):
        f = Cubes(c)

        def recorded(p, u):
            with kg.GradientTape(persistent=True) as tape:
                tape.watch(p)
                y = f.elements(p)
            jacobian = tape.jacobian(f.found(y), p)
            return tape.gradient(y, p), tape.gradient(y, p, u), tape.jvp(y, p, u), jacobian, tape.linearize(y, p)(u)

        found = compiler(recorded)(c.make(tensor(X), None), c.make(tensor(V), None))
        plain, pulled, pushed, jacobian, linear = map(f.found, found)
        close(plain, 3 * X**2)
        for each in (pulled, pushed, linear):
            close(each, 3 * X**2 * V)
        close(jacobian, np.diag(3 * X**2))

    def test_a_custom_gradient(self, c, compiler):
        f = Cubes(c)

        @kg.custom_gradient
        def reversed_cubes(p):
            x = f.found(p)

            def grad_fn(*upstream):
                u = upstream[0] if len(upstream) > 1 else f.found(upstream[0])
                assert len(upstream) == (2 if isinstance(f.elements(p), (tuple, list)) else 1)
                return c.make(-3 * x**2 * u, None)

            return f.elements(p), grad_fn

        slope = compiler(kg.grad(lambda p: ops.sum(f.found(reversed_cubes(p)) * tensor(V))))
        close(f.found(slope(c.make(tensor(X), None))), -3 * X**2 * V)


@every_container
class TestCompiledBoundary:
    """What a compiled function takes and returns."""

    def test_alone(self, container):
        f = Cubes(container)
        close(f.found(kg.jit(lambda p: f.elements(f.elements(p)))(container.make(tensor(X), None))), X**9)

    def test_around_a_transform(self, container):
        f = Cubes(container)
        close(f.found(kg.jit(kg.grad(f))(container.make(tensor(X), None))), 3 * X**2)


class TestOneProgramForEachStructure:
    def test_none_or_a_tensor(self):
        def f(p):
            return ops.sum(p["w"] ** 2) if p["b"] is None else ops.sum((p["w"] + p["b"]) ** 2)

        transformed = kg.hessian(f)
        compiled = kg.jit(kg.grad(f))
        for _ in range(2):
            close(transformed({"w": tensor(X), "b": None}), {"w": {"w": 2 * np.eye(2), "b": None}, "b": None})
            both = {"w": 2 * np.eye(2), "b": 2 * np.eye(2)}
            close(transformed({"w": tensor(X), "b": tensor(V)}), {"w": both, "b": both})
            close(compiled({"w": tensor(X), "b": None}), {"w": 2 * X, "b": None})
            close(compiled({"w": tensor(X), "b": tensor(V)}), {"w": 2 * (X + V), "b": 2 * (X + V)})

    def test_containers_of_the_same_entries(self):
        def f(p):
            return ops.sum(p.a**2) if isinstance(p, Pair) else ops.sum(p[0] ** 3)

        transformed, compiled = kg.jacobian(f), kg.jit(f)
        for _ in range(2):
            for x in ((tensor(X), None), [tensor(X), None]):
                close(transformed(x), type(x)((3 * X**2, None)))
                close(compiled(x), (X**3).sum())
            found = transformed(Pair(tensor(X), None))
            assert type(found) is Pair and found.b is None
            close(found.a, 2 * X)
            close(compiled(Pair(tensor(X), None)), (X**2).sum())


STEP = [
    pytest.param(lambda: 3, id="int"),
    pytest.param(lambda: tensor(3, "int32"), id="tensor"),
    pytest.param(lambda: np.array([3, 3], "int32"), id="array"),
    pytest.param(lambda: keras.Variable(3, dtype="int32", trainable=False), id="variable"),
    pytest.param(lambda: np.bool_(True), id="bool"),
    pytest.param(lambda: tensor([True, True], "bool"), id="mask"),
]


def eagerly_and_compiled(params, compiled):
    """Each of the parameters eagerly, and those of these names in a compiled function too."""
    ways = [pytest.param(*p.values, lambda f: f, id=f"{p.id}-eager") for p in params]
    return ways + [pytest.param(*p.values, kg.jit, id=f"{p.id}-jit") for p in params if p.id in compiled]


# A compiled function is given numbers of Python, tensors and variables each in its own way.
@pytest.mark.parametrize(("step", "compiler"), eagerly_and_compiled(STEP, ("int", "variable", "mask")))
class TestCountersAndMasks:
    """f(w) = s sum w^3 with s no float."""

    @staticmethod
    def fun(p):
        assert p["name"] == "adam" and p["none"] is None
        return ops.sum(p["w"] ** 3 * ops.cast(p["step"], "float32"))

    @staticmethod
    def argument(step):
        step = step()
        s = np.array(ops.convert_to_numpy(step) if hasattr(step, "shape") else step, "float64")
        return {"w": tensor(X), "step": step, "name": "adam", "none": None}, s

    @staticmethod
    def result(w):
        return {"w": w, "step": None, "name": None, "none": None}

    def test_grad(self, step, compiler):
        p, s = self.argument(step)
        close(compiler(kg.grad(self.fun))(p), self.result(3 * X**2 * s))

    def test_pullbacks_and_pushes(self, step, compiler):
        p, s = self.argument(step)
        v = self.result(tensor(V))

        def f(p):
            return {"y": p["w"] ** 3 * ops.cast(p["step"], "float32"), "step": ops.cast(p["step"], "int32") + 1}

        def all_of_them(p, v):
            out, pullback = kg.vjp(f, p)
            _, pushforward = kg.linearize(f, p)
            u = {"y": v["w"], "step": None}
            return out, pullback(u)[0], kg.jvp(f, (p,), (v,))[1], pushforward(v), pushforward(None)

        out, pulled, pushed, again, nowhere = compiler(all_of_them)(p, v)
        expected = 3 * X**2 * s * V
        close(out, {"y": X**3 * s, "step": s.astype("int32") + 1})
        close(pulled, self.result(expected))
        close(pushed, {"y": expected, "step": None})
        close(again, {"y": expected, "step": None})
        close(nowhere, {"y": 0 * X, "step": None})

    def test_second_derivatives(self, step, compiler):
        p, s = self.argument(step)
        hessian = H * s * np.ones(2)[:, None]
        blocks = compiler(kg.hessian(self.fun))(p)
        close(blocks, self.result(self.result(hessian)))
        matrix, unravel = kg.flatten_hessian(blocks)
        close(matrix, hessian)
        close(unravel(V), self.result(V))
        close(compiler(lambda p: kg.hvp(self.fun, (p,), (self.result(V),)))(p), (self.result(hessian @ V),))
        curved = compiler(lambda p: kg.ggnvp(lambda p: p["w"] ** 3, ops.sum, (p,), (None,)))(p)
        close(curved, (self.result(0 * X),))

    def test_jacobians(self, step, compiler):
        p, s = self.argument(step)

        def f(p):
            return {"y": p["w"] ** 3, "none": None, "step": ops.cast(p["step"], "int32")}

        expected = {"y": self.result(np.diag(3 * X**2)), "none": None, "step": None}
        for mode, chunk_size in (("forward", None), ("reverse", 1)):
            close(compiler(kg.jacobian(f, mode=mode, chunk_size=chunk_size))(p), expected)

    def test_per_example_grad(self, step, compiler):
        p, s = self.argument(step)

        def loss(p, x):
            return self.fun(p) * ops.sum(x)

        found = compiler(kg.per_example_grad(loss))(p, tensor([[1.0], [2.0]]))
        close(found, self.result(np.stack([3 * X**2 * s, 6 * X**2 * s])))


@pytest.mark.parametrize("step", STEP)
def test_counters_and_masks_are_carried_as_they_are(step):
    p, _ = TestCountersAndMasks.argument(step)
    seen = []

    def f(p):
        seen.append(p["step"])
        return ops.sum(p["w"])

    kg.grad(f)(p)
    # As floating-point arrays and variables are, those of integers are handed on as tensors.
    is_converted = isinstance(p["step"], (keras.Variable, np.ndarray))
    assert ops.is_tensor(seen[0]) and "int" in str(seen[0].dtype) if is_converted else seen[0] is p["step"]


@pytest.mark.parametrize("step", STEP)
def test_every_counter_and_mask_enters_a_compiled_function(step):
    p, s = TestCountersAndMasks.argument(step)
    close(kg.jit(kg.grad(TestCountersAndMasks.fun))(p), TestCountersAndMasks.result(3 * X**2 * s))


def test_integer_leaves_of_a_batch_jacobian():
    def f(p):
        x, category = p
        return x**2 * ops.cast(category, "float32")[:, None]

    found = kg.batch_jacobian(f)((tensor([X, V]), tensor([2, 3], "int32")))
    close(found, (np.stack([2 * np.diag(2 * X), 3 * np.diag(2 * V)]), None))


class TestConstants:
    """Zero derivatives, also where nothing depends on the argument at all."""

    CONSTANTS = [
        pytest.param(lambda: 3.0, id="float"),
        pytest.param(lambda: np.float32(3.0), id="numpy scalar"),
        pytest.param(lambda: np.array(3.0, "float32"), id="array"),
        pytest.param(lambda: tensor(3.0), id="tensor"),
        pytest.param(lambda: keras.Variable(3.0), id="variable"),
    ]

    WAYS = eagerly_and_compiled(CONSTANTS, ("float", "tensor", "variable"))

    @pytest.mark.parametrize(("constant", "compiler"), WAYS)
    def test_a_constant_function(self, constant, compiler):
        constant = constant()

        def f(x):
            return constant

        x = tensor(X)
        close(compiler(kg.grad(f))(x), 0 * X)
        close(compiler(kg.value_and_grad(f))(x), (3.0, 0 * X))
        close(compiler(kg.hessian(f))(x), np.zeros((2, 2)))
        close(compiler(lambda x: kg.hvp(f, (x,), (x,)))(x), (0 * X,))
        close(compiler(lambda x: kg.jvp(f, (x,), (x,)))(x), (3.0, 0.0))
        close(compiler(lambda x: kg.linearize(f, x)[1](x))(x), 0.0)
        close(compiler(lambda x: kg.vjp(f, x)[1](1.0))(x), (0 * X,))
        close(compiler(kg.jacobian(f))(x), 0 * X)
        close(compiler(kg.per_example_grad(lambda w, x: f(w)))(x, tensor([1.0, 2.0])), np.zeros((2, 2)))
        close(compiler(lambda x: kg.ggnvp(lambda x: x * x, f, (x,), (x,)))(x), (0 * X,))

    @pytest.mark.parametrize(("constant", "compiler"), WAYS)
    def test_one_output_among_several(self, constant, compiler):
        constant = constant()

        def f(x):
            return {"y": x**2, "c": constant}

        x, v = tensor(X), tensor(V)
        close(compiler(kg.jacobian(f))(x), {"y": np.diag(2 * X), "c": 0 * X})
        close(compiler(lambda x: kg.jvp(f, (x,), (v,)))(x), ({"y": X**2, "c": 3.0}, {"y": 2 * X * V, "c": 0.0}))
        close(compiler(lambda x: kg.vjp(f, x)[1]({"y": v, "c": 2.0}))(x), (2 * X * V,))
        close(compiler(lambda x: kg.linearize(f, x)[1](v))(x), {"y": 2 * X * V, "c": 0.0})

    def test_an_integer_is_no_such_constant(self):
        with pytest.raises(ValueError, match="What the function under `grad` returns must be .*Received"):
            kg.grad(lambda x: 3)(tensor(X))


@every_container
def test_stop_gradient(container):
    def f(p):
        a, b = container.parts(kg.stop_gradient(p))
        assert b == {"none": None, "step": 3, "name": "adam"}
        return ops.sum(container.parts(p)[0] * a)

    gradient, _ = container.parts(kg.grad(f)(container.make(tensor(X), {"none": None, "step": 3, "name": "adam"})))
    close(gradient, X)


class TestErrors:
    @pytest.mark.parametrize(
        ("x", "message"),
        [
            (lambda: None, r"Argument 0 under `grad` must be a tensor.*Received: None"),
            (lambda: [None, None], r"Argument 0 under `grad` must be a tensor.*Received: None"),
            (lambda: {"step": 3, "name": "adam"}, r"Argument 0 under `grad` must be .*Received: 'adam'"),
            (lambda: (tensor(3, "int32"), None), r"Argument 0 under `grad` must be real and floating.*dtype int32"),
            (lambda: (tensor(X), object()), r"Argument 0 under `grad` must be a tensor.*Received: <object"),
            (lambda: (tensor(X), {1.0, 2.0}), r"Argument 0 under `grad` must be a tensor.*Received: \{1\.0, 2\.0\}"),
            (lambda: (tensor(X), keras.layers.Dense(1)), r"Argument 0 under `grad` must be a tensor.*Received: <Dense"),
            (lambda: (tensor(X), tensor(1j, "complex64")), r"Argument 0 under `grad` must be real.*Complex"),
        ],
        ids=lambda x: "",
    )
    def test_nothing_to_differentiate_by(self, x, message):
        with pytest.raises(ValueError, match="(?s)" + message):
            kg.grad(lambda p: ops.ones(()))(x())

    def test_a_tangent_where_there_is_no_derivative(self):
        p = {"w": tensor(X), "step": tensor(3, "int32"), "none": None}

        def f(p):
            return ops.sum(p["w"])

        message = (
            r"Each entry of tangents must be None where its counterpart in `primals` has no derivative\. Received: "
        )
        for name, v in (("step", tensor(1.0)), ("none", tensor(1.0)), ("step", 1)):
            with pytest.raises(ValueError, match=message):
                kg.jvp(f, (p,), ({"w": None, "step": None, "none": None, name: v},))
        empty = np.zeros((), [("float0", "V")])  # as JAX has them
        close(kg.jvp(f, (p,), ({"w": tensor(V), "step": empty, "none": None},))[1], V.sum())

    def test_another_container(self):
        with pytest.raises(ValueError, match=r"tangents must have the structure.*\(Pair\('\*', '\*'\),\).*Received: "):
            kg.jvp(lambda p: p.a, (Pair(tensor(X), None),), ((tensor(X), None),))

    def test_results_without_a_derivative(self):
        with pytest.raises(ValueError, match=r"What the function under `jvp` returns must be.*Received: None"):
            kg.jvp(lambda x: [None, None], (tensor(X),), (None,))
        with pytest.raises(ValueError, match=r"What the function under `jvp` returns must be a tensor.*<object"):
            kg.jvp(lambda x: [x, object()], (tensor(X),), (None,))


def test_a_model_of_nested_inputs():
    inputs = {"a": keras.Input((2,)), "b": keras.Input((2,))}
    model = keras.Model(inputs, {"sum": keras.layers.Add()([inputs["a"], inputs["b"]]), "a": inputs["a"]})
    x = {"a": tensor([X]), "b": tensor([V])}
    eye = np.eye(2)[None]
    close(kg.batch_jacobian(model)(x), {"sum": {"a": eye, "b": eye}, "a": {"a": eye, "b": 0 * eye}})


class WithoutMask(keras.layers.Layer):
    """A layer that takes and returns None."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")

    def build(self, *_):
        self.dense.build((None, 2))

    def call(self, x, state=None):
        return self.dense(x), state


def test_a_functionalized_layer_that_returns_none():
    layer = WithoutMask()
    layer.build()
    fun, weights = kg.functionalize(layer)
    (kernel,) = weights
    found = kg.jacobian(lambda w: fun(w, tensor([X]), state=None))([kernel])
    assert type(found) is tuple and found[1] is None
    close(found[0][0], X.reshape(1, 1, 2, 1))
