"""Custom derivatives of JAX's own: under `vmap`, with a closure, of high-level primitives."""

import functools

import keras
import numpy as np
import pytest

import keras_gradtools as kg
from tests.cases import close

if keras.config.backend() != "jax":
    pytest.skip("these are JAX's", allow_module_level=True)

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

hijax = pytest.importorskip("jax._src.hijax")


def scaled_jvp(a):
    @jax.custom_jvp
    def fun(x):
        return a * x

    fun.defjvp(lambda primals, tangents: (fun(*primals), a * tangents[0]))
    return fun


@jax.custom_jvp
def tenfold(x):
    """x ** 2, with the derivative 10 x by its rule. Inlined without it, it has 2 x."""
    return x * x


tenfold.defjvp(lambda primals, tangents: (tenfold(*primals), 10 * primals[0] * tangents[0]))


def scaled_vjp(a):
    @jax.custom_vjp
    def fun(x):
        return a * x

    fun.defvjp(lambda x: (a * x, None), lambda _, u: (a * u,))
    return fun


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def scaled(a, x):
    return a * x


scaled.defjvp(lambda a, primals, tangents: (scaled(a, *primals), a * tangents[0]))


@jax.custom_jvp
def affine(x, n, y):
    return x * n + y


def _affine_jvp(primals, tangents):
    """Seven times the derivative by y, so that nobody takes it for JAX's own."""
    dx, _, dy = tangents
    slope = jnp.zeros_like(primals[0])
    slope = slope if isinstance(dx, SymbolicZero) else slope + dx * primals[1]
    return affine(*primals), slope if isinstance(dy, SymbolicZero) else slope + 7 * dy


affine.defjvp(_affine_jvp, symbolic_zeros=True)


@jax.custom_jvp
def level(x):
    return 1.0


level.defjvp(lambda primals, tangents: (1.0, tangents[0]))

V = np.arange(6.0, dtype="float32")  # sums to 15


class TestUnderVmap:
    @pytest.mark.parametrize("make", [scaled_jvp, scaled_vjp, lambda a: functools.partial(scaled, a)])
    def test_a_closure_over_a_mapped_value(self, make):
        total = lambda x: jnp.sum(jax.vmap(lambda a: make(a)(x))(V))  # noqa: E731
        x = jnp.asarray(2.0)
        close(kg.grad(total)(x), 15.0)
        close(kg.jvp(total, (x,), (x,))[1], 30.0)
        close(kg.linearize(total, x)[1](x), 30.0)
        close(kg.hvp(lambda x: total(x) * x, (x,), (x,))[0], 60.0)
        close(jax.jit(kg.grad(total))(x), 15.0)
        close(jax.vmap(kg.grad(total))(jnp.ones(2)), [15.0, 15.0])
        close(jax.vmap(lambda a: kg.grad(make(a))(x))(V), V)

    def test_a_value_that_is_the_same_for_all(self):
        close(kg.grad(lambda x: jnp.mean(jax.vmap(level)(x)))(jnp.ones(4)), np.full(4, 0.25))
        close(kg.grad(lambda x: jnp.mean(jax.vmap(lambda _: level(x))(V)))(2.0), 1.0)
        close(kg.jacobian(jax.vmap(level))(jnp.ones(3)), np.eye(3))
        close(jax.vmap(kg.grad(level))(V), np.ones(6))

    def test_symbolic_zeros_and_integers(self):
        close(kg.grad(lambda x: jnp.sum(jax.vmap(lambda a: affine(x, jnp.int32(2), a))(V)))(2.0), 12.0)
        close(kg.grad(lambda x: jnp.sum(jax.vmap(lambda a: affine(a, 2, x))(V)))(2.0), 42.0)
        close(kg.grad(lambda x: jnp.sum(jax.vmap(lambda a, n: affine(a, n, a * x))(V, jnp.arange(6))))(2.0), 105.0)

    def test_nested(self):
        def total(x):
            return jnp.sum(jax.vmap(lambda a: jax.vmap(lambda b: scaled_jvp(a)(scaled_vjp(b)(x)))(V))(V))

        close(kg.grad(total)(2.0), 225.0)
        close(kg.grad(lambda x: jnp.sum(jax.vmap(jax.jit(lambda a: affine(a, 2, a * x)))(V)))(2.0), 105.0)


class TestClosures:
    """A rule says nothing of what its function closes over."""

    @pytest.mark.parametrize("make", [scaled_jvp, scaled_vjp])
    def test_no_derivative_by_it(self, make):
        fun = lambda a: make(a)(2.0)  # noqa: E731
        for transform in (kg.grad, kg.jacobian, lambda f: lambda a: kg.jvp(f, (a,), (a,)), kg.hessian):
            with pytest.raises(ValueError, match="closes over cannot be taken.*Pass it as an argument"):
                transform(fun)(jnp.asarray(3.0))
        with pytest.raises(ValueError, match="closes over cannot be taken"):
            jax.jit(kg.grad(fun))(3.0)
        with pytest.raises(ValueError, match="closes over cannot be taken"):
            kg.grad(lambda a: jax.jit(lambda: make(a)(2.0))())(3.0)
        with pytest.raises(ValueError, match="closes over cannot be taken"):
            kg.grad(lambda a: make(a)(a))(3.0)
        with pytest.raises(ValueError, match="closes over cannot be taken"):
            # JAX runs the rule here, and not the function.
            jax.grad(lambda x: kg.grad(lambda a: make(a)(x))(3.0))(2.0)

    @pytest.mark.parametrize("make", [scaled_jvp, scaled_vjp])
    def test_a_constant_may_be_closed_over(self, make):
        close(kg.grad(lambda a: make(kg.stop_gradient(a))(a))(3.0), 3.0)
        close(kg.grad(lambda a: kg.grad(make(a))(2.0))(3.0), 1.0)
        close(kg.grad(lambda a: jax.jit(lambda: make(5.0)(a))())(3.0), 5.0)

    def test_a_number_as_the_value(self):
        close(kg.grad(level)(3.0), 1.0)
        close(kg.jvp(level, (3.0,), (2.0,))[1], 2.0)

    def test_an_array_of_the_closure_as_the_value(self):
        constant = jnp.asarray(4.0)

        @jax.custom_jvp
        def fun(x):
            return constant

        fun.defjvp(lambda primals, tangents: (constant, tangents[0]))
        close(kg.grad(lambda x: fun(x) * constant)(3.0), 4.0)


class Steep(hijax.VJPHiPrimitive):
    """The sine, with a derivative of 100."""

    def __init__(self, aval):
        self.in_avals = (aval,)
        self.out_aval = aval
        self.params = {}
        super().__init__()

    def expand(self, x):
        return jnp.sin(x)

    def vjp_fwd(self, *args):
        x = args[-1]  # after `nonzeros` from JAX 0.9 on
        return self(x), x

    def vjp_bwd_retval(self, x, u):
        return (100 * u,)

    def batch_dim_rule(self, axis_data, dims):
        return dims[0]


def steep(x):
    return Steep(jax.typeof(jnp.asarray(x)))(jnp.asarray(x))


@pytest.fixture(params=["VJPHiPrimitive", "jax_custom_vjp3"])
def hundred(request):
    if request.param == "VJPHiPrimitive":
        if not hasattr(hijax, "VmapOf"):
            pytest.skip("before JAX 0.9, these primitives have no translation for `jit`, and none under `vmap`")
        yield steep
        return
    if not hasattr(jax.config, "jax_custom_vjp3"):
        pytest.skip("this JAX has no such flag")
    before = jax.config.jax_custom_vjp3
    jax.config.update("jax_custom_vjp3", True)

    @jax.custom_vjp
    def fun(x):
        return jnp.sin(x)

    fun.defvjp(lambda x: (jnp.sin(x), None), lambda _, u: (100 * u,))
    yield fun
    jax.config.update("jax_custom_vjp3", before)


class TestHighLevelPrimitives:
    def test_first_derivatives(self, hundred):
        x = jnp.asarray(3.0)
        for fun in (hundred, jax.jit(hundred)):
            for _ in range(3):
                close(kg.grad(fun)(x), 100.0)
            close(kg.value_and_grad(fun)(x), (np.sin(3.0), 100.0))
            close(kg.jvp(fun, (x,), (1.0,)), (np.sin(3.0), 100.0))
            close(kg.linearize(fun, x)[1](1.0), 100.0)
            close(jax.jit(kg.grad(fun))(x), 100.0)

    def test_in_other_transformations(self, hundred):
        v = jnp.arange(3.0)
        close(kg.grad(lambda x: jax.lax.scan(lambda c, _: (hundred(c), None), x, None, length=2)[0])(3.0), 1e4)
        close(kg.grad(lambda v: jnp.sum(jax.vmap(hundred)(v)))(v), np.full(3, 100.0))
        close(jax.vmap(kg.grad(hundred))(v), np.full(3, 100.0))

    def test_second_derivatives(self, hundred):
        """x sin(x) has 100 x + sin(x), and then 200."""
        x = jnp.asarray(3.0)
        close(kg.hessian(lambda x: x * hundred(x))(x), 200.0)
        close(kg.hvp(lambda x: x * hundred(x), (x,), (1.0,))[0], 200.0)
        close(jax.grad(kg.grad(lambda x: x * hundred(x)))(x), 200.0)

    def test_a_rule_that_changes_is_not_baked_in(self):
        factor = [1.0]

        class Changing(Steep):
            def vjp_bwd_retval(self, x, u):
                return (factor[0] * u,)

        for value in (1.0, 1.0, 1.0, 5.0):
            factor[0] = value
            close(kg.grad(lambda x: Changing(jax.typeof(x))(x))(jnp.asarray(3.0)), value)


def looped(x):
    return jax.lax.scan(lambda c, _: (tenfold(c), None), x, length=2)[0]


def mapped(x):
    return jnp.sum(jax.vmap(looped)(jnp.stack([x, x]))) / 2


def counted(x):
    return jax.lax.fori_loop(0, 2, lambda _, c: tenfold(c), x)


def checkpointed(x):
    return jax.lax.scan(jax.checkpoint(lambda c, _: (tenfold(c), None)), x, length=2)[0]


def nested(x):
    def once(c):
        return jax.lax.scan(lambda d, _: (tenfold(d), None), c, length=1)[0]

    return jax.lax.scan(lambda c, _: (once(c), None), x, length=2)[0]


@pytest.mark.parametrize("loop", [looped, mapped, counted, checkpointed, nested, jax.jit(looped)])
def test_the_rule_holds_in_a_loop_that_is_differentiated_twice(loop):
    # By the rule, the first derivative is 100 x f(x), the second 100 f(x) + 1000 x ** 2, the third 3000 x.
    x = jnp.asarray(2.0)
    close(kg.grad(loop)(x), 800.0)
    close(kg.grad(kg.grad(loop))(x), 4400.0)
    close(kg.hvp(loop, (x,), (1.0,))[0], 4400.0)
    close(kg.jit(kg.grad(kg.grad(kg.grad(loop))))(x), 6000.0)
    close(jax.grad(jax.grad(loop))(x), 4400.0)
    with kg.GradientTape() as outer:
        outer.watch(x)
        with kg.GradientTape() as inner:
            inner.watch(x)
            y = loop(x)
        slope = inner.gradient(y, x)
    close(outer.gradient(slope, x), 4400.0)


def test_what_a_loop_does_not_change_still_moves_out_of_it():
    """JAX computes `sin(a)` once, outside of the scan, where no rule is in it."""

    def fun(a):
        return jax.lax.scan(lambda c, _: (c * jnp.sin(a), None), a, length=3)[0]

    gradient = jax.make_jaxpr(jax.grad(fun))(2.0)
    assert [str(e.primitive) for e in gradient.eqns].count("cos") == 1
    close(jax.grad(fun)(2.0), np.sin(2.0) ** 3 + 3 * 2.0 * np.sin(2.0) ** 2 * np.cos(2.0))
