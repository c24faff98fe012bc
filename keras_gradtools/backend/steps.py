"""Recorded operations as steps, through which forward passes carry several derivatives at once.

A backend makes a list of steps from what a tape has recorded. `keras_gradtools/transforms/taylor` holds the passes,
once for all backends. What a backend says about a step (its kind) only saves work: `GENERAL` is right for every
operation.
"""

from collections.abc import Sequence

# The operation is linear in its active inputs together, up to a constant.
LINEAR = "linear"
# One active input, of the shape of the single output. Each element of the output depends on one element of the input.
ELEMENTWISE = "elementwise"
# Two active inputs that are multiplied, element by element, with NumPy's broadcasting.
PRODUCT = "product"
# Two active inputs, and linear in each of them alone.
BILINEAR = "bilinear"
GENERAL = "general"


class Step:
    """One operation between the sources and the targets. Values have numbers, their slots.

    Attributes:
        kind: One of the constants of this file.
        function: For an elementwise operation, its name in `taylor.elementwise`, if it is there. Otherwise None.
        is_piecewise_linear: Whether the operation may have kinks, and all its second derivatives are zero elsewhere.
        inputs, outputs: The slots of the active inputs and outputs, through which derivatives pass.
        primals: The values of the active inputs.
        results: The values of the active outputs.
        slopes: The derivatives of an elementwise operation, from the first one, if they have been computed.
    """

    kind: str = GENERAL
    function: str | None = None
    is_piecewise_linear: bool = False
    inputs: tuple = ()
    outputs: tuple = ()
    primals: tuple = ()
    results: tuple = ()
    slopes: Sequence = ()

    def call(self, *active):
        """The active outputs, as a list, for other values of the active inputs. All other inputs are as recorded."""
        raise NotImplementedError

    def jvp(self, fun, primals, tangents):
        """The derivative of `fun(*primals) -> list`, made from `call`, along `tangents`. Can be differentiated."""
        raise NotImplementedError

    def slope(self, fun, x):
        """For an elementwise step, the derivative of `fun(x) -> [y]`, made from `call`. Can be differentiated."""
        raise NotImplementedError

    def push_stacks(self, stacks):
        """The derivatives along stacks of tangents, one stack for each active input."""
        raise NotImplementedError

    def second_derivatives(self, left, right):
        """The second derivatives along each direction of `left` and of `right`, two lists of stacks, as stacks."""
        raise NotImplementedError

    def push_linear(self, stacks):
        """For a linear step, the derivatives along stacks of tangents. None if there is no faster way than `jvp`."""
        return None

    def push_one(self, tangents):
        """As `push_linear`, for single tangents instead of stacks."""
        return None

    def push_uniform(self, stacks):
        """The derivatives along tangents that are equal for all examples, and have a batch axis of size 1.

        Returns None unless the derivatives, too, are equal for all examples, and the step is linear.
        """
        return None

    def sum_of_products(self, first, second):
        """For a bilinear step, `sum_d call(first_d, second_d)` of two stacks. None if there is no faster way."""
        return None


def of_sum(stacks, is_second, sign=1):
    """The derivatives of a sum, or of a difference with `sign` -1, from the stacks of its active terms.

    `is_second` says that the only stack belongs to the second term.
    """
    if len(stacks) == 2:
        return [stacks[0] + stacks[1] if sign > 0 else stacks[0] - stacks[1]]
    return [-stacks[0] if is_second and sign < 0 else stacks[0]]
