"""What a function under `jax.jit` or in a loop closes over: to a tape, an input or an error, never a constant."""

import functools

import keras
import numpy as np
import pytest

import keras_gradtools as kg
from tests.cases import close

if keras.config.backend() != "jax":
    pytest.skip("programs are JAX's", allow_module_level=True)

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.ode import odeint

from keras_gradtools.backend.jax.compiled_sweeps import compiled_sweeps


class Cube:
    def __init__(self, a):
        self.a = a

    def times(self, y):
        return self.a**3 * y


def intermediate(a):
    square = a * a
    return jax.jit(lambda: square * a)()


def linear_solve(a):
    weights = jnp.stack([1 / a**3, 1 / a**3])
    return jax.scipy.sparse.linalg.cg(jax.jit(lambda v: weights * v), jnp.asarray([1.0, 0.0]))[0][0]


def converted(a):
    """As libraries do it: what `closure_convert` finds becomes an argument of a function with a rule of its own."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def apply(fun, y, *consts):
        return fun(y, *consts)

    def backward(fun, saved, u):
        return jax.vjp(fun, *saved)[1](u)

    apply.defvjp(lambda fun, *args: (fun(*args), args), backward)
    fun, consts = jax.closure_convert(jax.jit(lambda y: a**3 * y), 1.0)
    return apply(fun, 1.0, *consts)


# All of them a^3.
PROGRAMS = {
    "jit": lambda a: jax.jit(lambda: a**3)(),
    "jit, also by argument": lambda a: jax.jit(lambda b: a * b**2)(a),
    "jit of an intermediate value": intermediate,
    "jit of a partial": lambda a: jax.jit(functools.partial(lambda b, y: b**3 * y, a))(1.0),
    "jit of a bound method": lambda a: jax.jit(Cube(a).times)(1.0),
    "jit in jit": lambda a: jax.jit(lambda y: a * jax.jit(lambda z: a**2 * z)(y))(1.0),
    "scan": lambda a: lax.scan(lambda c, _: (c * a, None), 1.0, None, length=3)[0],
    "jit in scan": lambda a: lax.scan(jax.jit(lambda c, _: (c * a, None)), 1.0, None, length=3)[0],
    "jit in scan in jit": lambda a: jax.jit(
        lambda y: lax.scan(jax.jit(lambda c, t: (c * a * t, None)), y, jnp.ones(3))[0]
    )(1.0),
    "jit in fori_loop": lambda a: lax.fori_loop(0, 3, jax.jit(lambda _, c: c * a), 1.0),
    "jit in one branch": lambda a: lax.cond(a > 0, jax.jit(lambda y: a**3 * y), lambda y: y, 1.0),
    "jit in all branches": lambda a: lax.switch(1, [jax.jit(lambda: a), jax.jit(lambda: a**3)]),
    "cond in jit": lambda a: jax.jit(lambda y: lax.cond(y > 0, jax.jit(lambda: a**3), lambda: y))(1.0),
    "jit in remat": lambda a: jax.checkpoint(jax.jit(lambda y: a**3 * y))(1.0),
    "jit in vmap": lambda a: jnp.sum(jax.vmap(jax.jit(lambda v: a**3 * v))(jnp.asarray([0.5, 0.5]))),
    "grad of jit": lambda a: jax.grad(jax.jit(lambda y: a**3 * y))(1.0),
    "jit of a pullback": lambda a: jax.jit(jax.vjp(lambda y: a**3 * y, 1.0)[1])(1.0)[0],
    "linearize of jit": lambda a: jax.linearize(jax.jit(lambda y: a**3 * y), 1.0)[1](1.0),
    "linear_transpose of jit": lambda a: jax.linear_transpose(jax.jit(lambda y: a**3 * y), 1.0)(1.0)[0],
    "linear solve": linear_solve,
    "closure_convert": converted,
}


def hvp(fun):
    return lambda a: kg.hvp(fun, (a,), (jnp.ones_like(a),))[0]


def tape(fun):
    def slope(a):
        with kg.GradientTape() as tape:
            tape.watch(a)
            y = fun(a)
        return tape.gradient(y, a)

    return slope


TRANSFORMS = {
    "grad": kg.grad,
    "value_and_grad": lambda fun: lambda a: kg.value_and_grad(fun)(a)[1],
    "vjp": lambda fun: lambda a: kg.vjp(fun, a)[1](jnp.ones_like(a))[0],
    "jvp": lambda fun: lambda a: kg.jvp(fun, (a,), (jnp.ones_like(a),))[1],
    "linearize": lambda fun: lambda a: kg.linearize(fun, a)[1](jnp.ones_like(a)),
    "jacobian": kg.jacobian,
    "tape": tape,
}
SECOND = {"hessian": kg.hessian, "hvp": hvp, "nested tapes": lambda fun: tape(tape(fun))}


@pytest.fixture
def a():
    return jnp.asarray(2.0)


@pytest.mark.parametrize("name", PROGRAMS)
def test_all_transforms_see_what_a_program_closes_over(name, a):
    for transform in TRANSFORMS.values():
        close(transform(PROGRAMS[name])(a), 12.0, rtol=1e-4)


@pytest.mark.parametrize("name", PROGRAMS)
def test_second_derivatives_see_it_too(name, a):
    for transform in SECOND.values():
        close(transform(PROGRAMS[name])(a), 12.0, rtol=1e-4)


@pytest.mark.parametrize("name", ["jit in scan in jit", "jit in all branches", "linear solve", "closure_convert"])
def test_around_and_inside_other_transformations(name, a):
    fun = PROGRAMS[name]
    close(jax.jit(kg.grad(fun))(a), 12.0, rtol=1e-4)
    close(kg.grad(jax.jit(fun))(a), 12.0, rtol=1e-4)
    close(jax.vmap(kg.grad(fun))(jnp.asarray([2.0, 1.0])), [12.0, 3.0], rtol=1e-4)
    close(jax.grad(kg.grad(fun))(a), 12.0, rtol=1e-4)
    close(kg.grad(jax.grad(fun))(a), 12.0, rtol=1e-4)


def test_a_loop_without_a_reverse_mode(a):
    power = lambda a: lax.while_loop(  # noqa: E731
        jax.jit(lambda s: (s[0] < 3) & (a > 0)), jax.jit(lambda s: (s[0] + 1, s[1] * a)), (0, 1.0)
    )[1]
    close(kg.jvp(power, (a,), (1.0,))[1], 12.0)
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        kg.grad(power)(a)


@pytest.mark.parametrize("fun", [lambda a: lambda y, t: -a * y, lambda a: jax.jit(lambda y, t: -a * y)])
def test_differential_equations(fun):
    """y' = -a y from 1: exp(-a) at 1."""
    end = lambda a: odeint(fun(a), 1.0, jnp.linspace(0.0, 1.0, 3))[-1]  # noqa: E731
    close(kg.grad(end)(3.0), -np.exp(-3.0), rtol=1e-4)
    close(kg.vjp(end, 3.0)[1](1.0)[0], -np.exp(-3.0), rtol=1e-4)
    close(jax.vmap(kg.grad(end))(jnp.asarray([3.0, 1.0])), [-np.exp(-3.0), -np.exp(-1.0)], rtol=1e-4)


def test_a_program_that_was_traced_before_the_tape(a):
    """Its constant is the very array that is watched; a function is called with another."""
    hidden = jax.jit(lambda: a**3)
    hidden()
    for _ in range(2):
        close(tape(lambda _: hidden())(a), 12.0)
    close(kg.grad(lambda b: hidden() * b)(a), 8.0)


def test_a_program_that_jax_does_not_trace_again():
    """It goes on with the array that it met; a derivative by another has nothing to do with it."""
    holder = [jnp.asarray(2.0)]
    hidden = jax.jit(lambda: holder[0] ** 3)
    close(tape(lambda _: hidden())(holder[0]), 12.0)
    holder[0] = jnp.asarray(5.0)
    close(hidden(), 8.0)
    with kg.GradientTape() as recording:
        recording.watch(holder[0])
        y = hidden()
    assert recording.gradient(y, holder[0]) is None


def test_two_tapes_that_follow_different_arrays_of_one_program(a):
    b = jnp.asarray(5.0)
    product = jax.jit(lambda: a * b**2)
    with kg.GradientTape() as first, kg.GradientTape() as second:
        first.watch(a)
        second.watch(b)
        y = product()
    assert first._tape.operations == second._tape.operations
    close(first.gradient(y, a), 25.0)
    close(second.gradient(y, b), 20.0)


def test_programs_with_other_constants_are_not_taken_for_one_another(a):
    """Their texts are the same, which does not show the constants of the programs inside."""
    compiled_sweeps.clear()
    for factor in (1.0, 2.0, 3.0):
        constant = jnp.asarray([factor, factor])
        scaled = jax.checkpoint(jax.jit(lambda x: jnp.sum(constant * x)))  # noqa: B023
        for _ in range(3):
            close(kg.grad(lambda x: scaled(x) * x)(a), 4 * 2 * factor)  # noqa: B023


def test_variables_of_a_program_that_jax_does_not_trace_again():
    v = keras.Variable(2.0)
    hidden = jax.jit(lambda: v.value**3)
    for _ in range(3):
        with kg.GradientTape() as recording:
            y = hidden()
        close(recording.gradient(y, v), 12.0)


def test_roots():
    """y^3 = a: a third of a^(-2/3)."""

    def newton(f, start):
        return lax.fori_loop(0, 20, lambda _, y: y - f(y) / jax.grad(f)(y), start)

    for f in (lambda a: lambda y: y**3 - a, lambda a: jax.jit(lambda y: y**3 - a)):
        root = lambda a: lax.custom_root(f(a), 1.0, newton, lambda g, y: y / g(1.0))  # noqa: B023, E731
        close(kg.grad(root)(8.0), 1 / 12, rtol=1e-4)


def test_an_unknown_primitive_is_an_error_where_it_matters(a):
    """Nobody here knows how to make an input of a constant inside `shard_map`."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("d",))
    spec = jax.sharding.PartitionSpec()
    inner = jax.shard_map(jax.jit(lambda y: a**3 * y), mesh=mesh, in_specs=spec, out_specs=spec)
    fun = jax.jit(inner)
    with kg.GradientTape(persistent=True) as recording:
        recording.watch(a)
        b = jnp.asarray(1.0)
        recording.watch(b)
        y = fun(b)
    close(recording.gradient(y, b), 8.0)
    with pytest.raises(ValueError, match="closes over"):
        recording.gradient(y, a)


@pytest.mark.skipif(not hasattr(jax, "new_ref"), reason="this JAX has no Refs")
def test_a_value_that_is_written_into_a_ref_is_an_error(a):
    def fun(a):
        ref = jax.new_ref(jnp.zeros(()))
        ref[...] = a * a
        return ref[...] * a

    with pytest.raises(NotImplementedError, match="cannot follow a value into a `jax.Ref`"):
        kg.grad(fun)(a)
    with pytest.raises(NotImplementedError, match="cannot follow a value into a `jax.Ref`"):
        kg.grad(lambda a: jax.new_ref(a * a)[...])(a)
    close(kg.grad(jax.jit(fun))(a), 12.0)
