"""A warning where second derivatives are zero everywhere, because a function is piecewise linear."""

import functools
import warnings


def warn_of_kinks(name, steps):
    """Warns, once for each `name`, if there are kinks in `steps`, through which all second derivatives are zero.

    Nothing is said of a function that is linear, as far as its operations tell.
    """
    if any(step.is_piecewise_linear for step in steps):
        _warn(name)


@functools.cache
def _warn(name):
    warnings.warn(
        f"{name}: all second derivatives are zero, because the function is piecewise linear. It has kinks, as of ReLU, "
        "leaky ReLU, `abs`, `maximum` or `where`, and nothing that is curved. A loss on these zeros is constant, and "
        "trains nothing. Use a smooth activation, such as tanh, GELU, SiLU or softplus.",
        stacklevel=3,
    )
