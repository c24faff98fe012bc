"""Reports of JAX."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.atlas.upstream import Report

VERSION = jax.__version__


def slope(fun, x, order=1):
    for _ in range(order):
        fun = jax.grad(fun)
    return fun(x)


def added(t):
    """`log(exp(2t) + exp(t))`, in a loop of one step."""
    return jax.lax.scan(lambda c, x: (jnp.logaddexp(c + t, x * t), None), t, jnp.ones(1))[0]


REPORTS = (
    Report("`jnp.i0(x)` at x = 0, second derivative", lambda: slope(jnp.i0, 0.0, 2), 0.5),
    Report("`jnp.logaddexp(2t, t)` in a `lax.scan`, at t = 0, second derivative", lambda: slope(added, 0.0, 2), 0.25),
    Report("`jnp.ldexp(x, 3)` at x = 0", lambda: slope(lambda x: jnp.ldexp(x, 3), 0.0), 8.0),
    Report("`jnp.sinc(x)` at x = 0.001", lambda: slope(jnp.sinc, 0.001), -(np.pi**2) / 3 * 0.001),
)
