"""What only JAX can get wrong: a tape made of a trace, identity, compiled sweeps, and no tracer left behind."""

import gc
import re
import weakref

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from tests.cases import close

if keras.config.backend() != "jax":
    pytest.skip("the traps of JAX", allow_module_level=True)

import jax
import jax.numpy as jnp
from jax._src import core

from keras_gradtools.backend.jax.compiled_sweeps import compiled_sweeps


@pytest.fixture(autouse=True)
def no_compiled_sweeps():
    compiled_sweeps.clear()


@pytest.fixture
def x():
    return jnp.asarray(3.0)


def slope(fun, x):
    with kg.GradientTape() as tape:
        tape.watch(x)
        y = fun(x)
    return tape.gradient(y, x)


def cube(x):
    return x**3


@jax.custom_jvp
def halved_slope(x):
    return x * x


halved_slope.defjvp(lambda primals, tangents: (halved_slope(*primals), primals[0] * tangents[0]))


@jax.custom_vjp
def doubled_slope(x):
    return x * x


doubled_slope.defvjp(lambda x: (x * x, x), lambda x, u: (4 * x * u,))


# At x = 3.
PRIMITIVES = {
    "scan": (lambda x: jax.lax.scan(lambda c, _: (c * x, None), x, None, length=3)[0], 108),
    "fori_loop": (lambda x: jax.lax.fori_loop(0, 3, lambda i, c: c * x, x), 108),
    "cond": (lambda x: jax.lax.cond(x > 0, lambda z: z * z, lambda z: z, x), 6),
    "remat": (jax.checkpoint(lambda x: jnp.sin(x) ** 2), np.sin(6)),
    "jit": (jax.jit(cube), 27),
    "custom_jvp": (halved_slope, 3),
    "custom_jvp of the library": (lambda x: jax.nn.logsumexp(jnp.stack([x, x])), 1),
    "custom_vjp": (doubled_slope, 12),
    "random": (lambda x: jnp.sum(jax.random.uniform(jax.random.key(0), (3,)) * 0 + x), 3),
    "linalg": (lambda x: jnp.linalg.det(jnp.eye(3) * x), 27),
    "grad": (jax.grad(cube), 18),
    "vmap": (lambda x: jnp.sum(jax.vmap(lambda z: z * x)(jnp.arange(3.0))), 3),
    "slice": (lambda x: jnp.sum((x * jnp.arange(4.0))[1:] ** 2), 84),
}


@pytest.mark.parametrize("name", PRIMITIVES)
def test_primitives(name, x):
    fun, expected = PRIMITIVES[name]
    for _ in range(3):  # op by op, compiled, and compiled before
        close(slope(fun, x), expected, rtol=1e-4)
    close(jax.jit(lambda x: slope(fun, x))(x), expected, rtol=1e-4)


@pytest.mark.parametrize("name", PRIMITIVES)
def test_second_derivatives_of_primitives(name, x):
    fun, _ = PRIMITIVES[name]
    expected = jax.grad(jax.grad(fun))(x)
    for _ in range(4):
        curvature = slope(lambda x: slope(fun, x), x)
        close(0.0 if curvature is None else curvature, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PRIMITIVES)
def test_jvp_of_primitives(name, x):
    fun, expected = PRIMITIVES[name]
    for _ in range(3):
        with kg.GradientTape() as tape:
            tape.watch(x)
            y = fun(x)
        close(tape.jvp(y, x, 2.0), 2 * expected, rtol=1e-4)


class TestUnderTransforms:
    def test_grad(self):
        close(jax.grad(lambda x: slope(cube, x))(3.0), 18)

    def test_vmap(self):
        close(jax.vmap(lambda x: slope(cube, x))(jnp.arange(3.0)), [0, 3, 12])

    def test_jit_of_vmap_of_grad(self):
        close(jax.jit(jax.vmap(jax.grad(lambda x: slope(cube, x))))(jnp.arange(3.0)), [0, 6, 12])

    def test_forward_mode(self):
        close(jax.jacfwd(lambda x: slope(cube, x))(3.0), 18)


class TestIdentity:
    def test_an_integer_that_is_handed_back(self, x):
        @jax.custom_vjp
        def fun(x, i):
            return x * 2, i

        fun.defvjp(lambda x, i: ((x * 2, i), None), lambda _, u: (u[0] * 2, None))
        vector = jnp.asarray([1.0, 5.0])
        with kg.GradientTape() as tape:
            tape.watch(vector)
            y, j = fun(vector, jnp.argmax(vector))
            z = y[j]
        close(tape.gradient(z, vector), [0, 2])

    def test_an_operation_is_recorded_once(self):
        """JAX's linearization hands operations on with the tape's trace as the current one."""
        vector = jnp.asarray([1.5, 2.0])
        energy = lambda x: jnp.sum(slope(lambda x: jnp.sum(x[1:] ** 3), x) ** 2)  # noqa: E731
        close(slope(energy, vector), [0, 288])


class TestArraysThatFitTakesOver:
    def test_every_derivative_says_what_happened(self):
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, activation="tanh"), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        data = jnp.ones((4, 3))
        with kg.GradientTape(persistent=True) as tape:
            tape.watch(data)
            y = model(data)
        _, pullback = kg.vjp(lambda x: model(x), data)
        before = tape.gradient(y, data)
        model.fit(np.ones((4, 3)), np.ones((4, 1)), verbose=0)
        for derivative in (
            lambda: tape.gradient(y, data),
            lambda: tape.gradient(y, model.trainable_variables),
            lambda: tape.jvp(y, data, jnp.ones_like(data)),
            lambda: tape.jacobian(y, data),
            lambda: tape.batch_jacobian(y, data),
            lambda: pullback(jnp.ones((4, 1))),
        ):
            with pytest.raises(RuntimeError, match=r"array of shape \(.*deleted since.*record the block again"):
                derivative()
        assert np.isfinite(before).all()

    def test_another_error_stays_what_it_is(self, x):
        with kg.GradientTape() as tape:
            tape.watch(x)
            y = jax.lax.while_loop(lambda y: y < 9, lambda y: y * x, x)
        with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
            tape.gradient(y, x)


@pytest.mark.parametrize("options", [{"jit_compile": False}, {"run_eagerly": True}])
def test_numpy_arrays_in_an_uncompiled_step(options):
    class Watching(keras.Model):
        convert = False

        def call(self, x):
            given.append(x)
            x = ops.convert_to_tensor(x) if self.convert else x
            with kg.GradientTape() as tape:
                tape.watch(x)
                y = ops.sum(x**2, axis=1, keepdims=True)
            return y + 0 * ops.sum(tape.gradient(y, x))

    def evaluated():
        return model.evaluate(np.ones((2, 3), "float32"), np.ones((2, 1), "float32"), verbose=0)

    given = []
    model = Watching()
    model.compile("sgd", "mse", **options)
    try:
        assert evaluated() == 4.0
    except ValueError as error:
        # Some versions of Keras hand them.
        assert isinstance(given[-1], np.ndarray)
        assert re.search("`keras.ops.convert_to_tensor` before the block.*Keras hands NumPy arrays", str(error))
    model.convert = True
    assert evaluated() == 4.0


class TestNothingIsLeftBehind:
    def test_after_an_exception_inside_jit(self, x):
        @jax.jit
        def fails(x):
            with kg.GradientTape() as tape:
                tape.watch(x)
                raise KeyError("inside")

        with pytest.raises(KeyError):
            fails(x)
        assert core.trace_ctx.trace is core.eval_trace
        close(jax.jit(cube)(x), 27)

    def test_intermediate_values_are_freed_after_the_gradient(self, x):
        with kg.GradientTape() as tape:
            tape.watch(x)
            y = jnp.sin(x)
            z = y * y
        kept = weakref.ref(y)
        del y
        tape.gradient(z, x)
        gc.collect()
        assert kept() is None

    def test_no_tracer_in_the_state_of_a_model(self):
        model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(), keras.layers.Dropout(0.5)])
        data = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), "float32")
        slope(lambda x: ops.sum(model(x, training=True)), data)
        kg.jit(lambda x: slope(lambda x: ops.sum(model(x, training=True)), x))(data)
        for weight in model.variables:
            assert not isinstance(weight.value, jax.core.Tracer)
        assert np.isfinite(model.predict(np.asarray(data), verbose=0)).all()


class TestCompiledSweeps:
    def test_compiles_once_from_the_second_time_on(self, x):
        for _ in range(5):
            slope(lambda x: jnp.sin(x) * x, x)
        assert [compiled is not None for compiled in compiled_sweeps.entries()] == [True]

    def test_other_values_and_shapes_are_seen(self):
        for n in (2, 2, 2, 3):
            for scale in (1.0, 4.0):
                v = jnp.full((n,), scale)
                factor = 2 * v
                close(slope(lambda x: jnp.sum(x * x * factor), v), 4 * scale**2 * np.ones(n))  # noqa: B023

    def test_constants_are_not_baked_in(self, x):
        for factor in (1.0, 2.0, 3.0, 4.0):
            close(slope(lambda x: x * x * jnp.float32(factor), x), 6 * factor)  # noqa: B023

    def test_loops_that_are_made_anew_are_found_again(self, x):
        for _ in range(4):
            slope(lambda x: jax.lax.scan(lambda c, _: (c * x, None), x, None, length=3)[0], x)
        assert len(compiled_sweeps.entries()) == 1

    def test_bounded(self, x, monkeypatch):
        monkeypatch.setattr(compiled_sweeps, "most", 3)
        for n in range(6):
            slope(lambda x: jnp.sum(jnp.broadcast_to(x * x, (n + 1,))), x)  # noqa: B023
        assert len(compiled_sweeps.entries()) == 3

    def test_holds_functions_weakly(self, x):
        def make():
            @jax.custom_jvp
            def fun(x):
                return x * x

            fun.defjvp(lambda primals, tangents: (fun(*primals), 2 * primals[0] * tangents[0]))
            return fun

        fun = make()
        for _ in range(3):
            close(slope(fun, x), 6)
        kept = weakref.ref(fun)
        del fun
        gc.collect()
        assert kept() is None


def test_the_arrays_of_a_distributed_model_stay_distributed():
    """An alias keeps the sharding of its array."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("batch",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    data = jax.device_put(jnp.arange(4.0), sharding)
    variable = keras.Variable(np.ones(4, "float32"))
    variable._value = jax.device_put(variable.value, sharding)
    with kg.GradientTape() as tape:
        tape.watch(data)
        y = jnp.sum(data * data * variable.value)
    by_data, by_variable = tape.gradient(y, [data, variable])
    close([by_data, by_variable], [2 * np.arange(4.0), np.arange(4.0) ** 2])
    assert by_variable.sharding.is_equivalent_to(sharding, 1)


@pytest.mark.parametrize("activation", [jax.nn.relu, jax.nn.relu6, lambda x: kg.clip_gradient_norm(x, 2.0)])
def test_custom_derivatives_of_the_libraries_are_compiled(activation, x):
    for _ in range(4):
        slope(lambda x: activation(x) * x, x)
    assert [compiled is not None for compiled in compiled_sweeps.entries()] == [True]


def test_custom_derivatives_that_read_changing_state_are_not_baked_in(x):
    v = keras.Variable(2.0)

    @jax.custom_jvp
    def identity(x):
        return x * 1

    identity.defjvp(lambda primals, tangents: (primals[0], tangents[0] * v.value))
    for value in (2.0, 2.0, 2.0, 5.0, 7.0):
        v.assign(value)
        close(slope(identity, x), value)


def test_nothing_of_ours_gets_into_a_program_without_a_tape():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Flatten(), keras.layers.Dense(2)])
    assert "tape_alias" not in str(jax.make_jaxpr(lambda x: model(x))(jnp.ones((4, 3))))
