"""Checks of derivatives by central differences, for the tests of layers and functions with gradients of their own."""

import typing

import keras
import numpy as np
from keras import ops

from keras_gradtools import nesting, validation
from keras_gradtools.backend.state import StateScope
from keras_gradtools.transforms.first_order import grad, jvp, require_tuple, vjp
from keras_gradtools.transforms.second_order import hvp
from keras_gradtools.transforms.taped_call import require_function

# The distance of 1 to the next number; the step that the search begins with, a power of two near the fifth root of
# that, where the error of the stencil (about h^4 f''''' / 30) meets the rounding (about eps f / h); and rtol.
_PRECISIONS = {
    "float64": (2.0**-52, 2.0**-9, 1e-6),
    "float32": (2.0**-23, 2.0**-4, 1e-3),
    "float16": (2.0**-10, 2.0**-1, 5e-2),
    "bfloat16": (2.0**-7, 2.0**-1, 1e-1),
}
_HALVINGS = 10
# How many times its standard deviation (a little less) the rounding may be off.
_SAFETY = 8
# Up to how many elements a gradient is checked whole, and how many of a larger one are drawn.
_WHOLE = 32
_DRAWN = 16


def check_jvp(fun, primals, tangents=None, *, rtol=None, atol=None, step=None, seed=0):
    r"""Checks the forward mode against central differences along one direction.

    $J v \approx (f(x - 2 h v) - 8 f(x - h v) + 8 f(x + h v) - f(x + 2 h v)) / 12 h$, each element of it.

    The function is evaluated in the precision of its arguments, and compared in double precision. What it assigns to
    Keras variables is dropped, so that a layer with a dropout or a moving mean can be checked in training mode.
    The step is halved until two estimates agree. A function with a kink between $x - 2 h v$ and $x + 2 h v$ still
    may fail: give it a point further off. Call the checks eagerly, not in compiled code.

    Args:
        fun: a function of `primals` that returns tensors, in any nesting.
        primals: a tuple of the arguments: real floating-point tensors, variables, arrays or Python floats, in any
            nesting.
        tangents: the direction $v$, a tuple in the structure and shapes of `primals`; None stands for zeros in it,
            and alone for a random direction.
        rtol: the tolerance relative to the derivative. By default 1e-3 in float32, 1e-6 in float64, 0.05 in float16,
            0.1 in bfloat16: by the coarsest of the dtypes of the arguments, of the outputs, and of
            `keras.config.floatx()`, since Keras may compute in that.
        atol: the tolerance added to that. By default what the rounding of `fun`, which is measured, can amount to.
        step: the step $h$; by default it is searched for.
        seed: of the random direction. Nothing else depends on it, and no other seed is touched.

    Raises:
        AssertionError: if the two do not agree; it names the worst element.
        ValueError: if an argument has no gradient, or `fun` gives other values when it is called again, or none that
            are finite.

    Cost:
        One `jvp`, and 15 evaluations of `fun`; up to 33 if it varies on a small scale.

    Example:

    >>> import keras_gradtools as kg
    >>> from keras_gradtools import testing
    >>> double = kg.custom_gradient(lambda x: (2 * x, lambda upstream: 2 * upstream))
    >>> testing.check_jvp(double, (3.0,))
    >>> wrong = kg.custom_gradient(lambda x: (2 * x, lambda upstream: 5 * upstream))
    >>> testing.check_jvp(wrong, (3.0,))
    Traceback (most recent call last):
    AssertionError: check_jvp: the derivative of order 1 (forward mode) is wrong...

    Source: Griewank & Walther, "Evaluating Derivatives" (2008), section 3.1; Fornberg, "Generation of finite
    difference formulas on arbitrarily spaced grids" (1988), table 1.
    """
    point = _Point(_Settings.checked("check_jvp", rtol, atol, step, seed), fun, primals)
    _check_forward(point, point.direction(tangents), "order 1 (forward mode)")


def check_vjp(fun, primals, *, rtol=None, atol=None, step=None, seed=0):
    r"""Checks the reverse mode against central differences, $\langle J^\top u, v \rangle = \langle u, J v \rangle$.

    This is checked for random $u$ and $v$, and then with unit vectors for $v$, so that a failure names the element
    of the argument: all of them for arguments of up to 32 elements together, else 16 random ones, and one that is
    searched for if the random $v$ shows a mistake.

    Args:
        fun: as for `check_jvp`.
        primals: as for `check_jvp`.
        rtol: as for `check_jvp`.
        atol: as for `check_jvp`.
        step: as for `check_jvp`.
        seed: as for `check_jvp`.

    Raises:
        AssertionError, ValueError: as `check_jvp`.

    Cost:
        One `vjp`, 15 evaluations of `fun`, and 6 for each element that is checked; up to 33 and 24 if it varies on a
        small scale.

    Example:

    >>> import keras_gradtools as kg
    >>> from keras import ops
    >>> from keras_gradtools import testing
    >>> wrong = kg.custom_gradient(lambda x: (2 * x, lambda upstream: upstream * ops.array([2.0, 5.0])))
    >>> try:
    ...     testing.check_vjp(lambda p: wrong(p["w"]), ({"w": ops.ones(2)},))
    ... except AssertionError as error:
    ...     print(str(error).splitlines()[1])
    Worst: argument 0['w'], element (1,)

    Source: Griewank & Walther, "Evaluating Derivatives" (2008), section 3.2.
    """
    point = _Point(_Settings.checked("check_vjp", rtol, atol, step, seed), fun, primals)
    _check_reverse(point, point.cotangent(), "order 1 (reverse mode)")


def check_gradients(fun, args, order=2, modes=("forward", "reverse"), *, rtol=None, atol=None, step=None, seed=0):
    r"""Checks the derivatives of a function up to an order, in both modes and in all their combinations.

    Order 1 is `check_jvp` and `check_vjp`. Order 2 applies these to $x \mapsto J(x) v$ and to
    $x \mapsto J(x)^\top u$, with $u$ and $v$ held fixed, and order 3 once more.

    Args:
        fun: as for `check_jvp`.
        args: as `primals` for `check_jvp`.
        order: the highest order, 1, 2 or 3.
        modes: which modes to check and to combine: `"forward"`, `"reverse"`.
        rtol: as for `check_jvp`.
        atol: as for `check_jvp`.
        step: as for `check_jvp`.
        seed: as for `check_jvp`.

    Raises:
        AssertionError: as `check_jvp`; it says which order failed, and in which modes.
        ValueError: as `check_jvp`, or for an unknown order or mode.

    Cost:
        With both modes, that of `check_jvp` and of `check_vjp` once, three times and seven times for order 1, 2 and
        3. An evaluation of order 2 is a `jvp` or `vjp`, and costs three to five evaluations of `fun`.

    Example:

    >>> from keras_gradtools import testing
    >>> testing.check_gradients(lambda x, y: x * x * x * y, (2.0, 3.0), order=3)

    Source: as for `check_jvp`; the recursion is that of `jax.test_util.check_grads`.
    """
    settings = _Settings.checked("check_gradients", rtol, atol, step, seed)
    if isinstance(order, bool) or order not in (1, 2, 3):
        raise ValueError(
            f"The order of `check_gradients` must be 1, 2 or 3. Received: order={order!r}. For a higher one, give it "
            "the derivative as a function."
        )
    if not isinstance(modes, (tuple, list)) or not modes or not all(m in ("forward", "reverse") for m in modes):
        raise ValueError(
            "The modes of `check_gradients` must be a tuple of 'forward', 'reverse', or both. Received: "
            f"modes={modes!r}. For one mode, write `('reverse',)`."
        )
    require_function("check_gradients", fun)
    _check_orders(settings, fun, args, order, tuple(modes), (), "output")


def check_hvp(fun, primals, tangents=None, *, rtol=None, atol=None, step=None, seed=0):
    r"""Checks the product with the Hessian against central differences of the gradient, and its symmetry.

    $H v \approx \partial \nabla f(x + t v) / \partial t$, each element of it, and
    $\langle u, H v \rangle = \langle v, H u \rangle$ for a random $u$.

    Args:
        fun: a function of `primals` that returns one scalar tensor.
        primals: as for `check_jvp`.
        tangents: as for `check_jvp`.
        rtol: as for `check_jvp`.
        atol: as for `check_jvp`.
        step: as for `check_jvp`.
        seed: as for `check_jvp`.

    Raises:
        AssertionError: as `check_jvp`, or if the Hessian is not symmetric.
        ValueError: as `check_jvp`, or if `fun` does not return a scalar.

    Cost:
        Two `hvp`, and 15 gradients; up to 33 if `fun` varies on a small scale.

    Example:

    >>> from keras_gradtools import testing
    >>> testing.check_hvp(lambda x, y: x * x * y, (2.0, 3.0))

    Source: Pearlmutter, "Fast exact multiplication by the Hessian" (1994), equation 1.
    """
    settings = _Settings.checked("check_hvp", rtol, atol, step, seed)
    require_function("check_hvp", fun)
    primals = require_tuple("check_hvp", "primals", primals)
    point = _Point(settings, grad(fun, argnums=tuple(range(len(primals)))), primals, _GRADIENT)
    v, u = point.direction(tangents), point.direction()
    hessian_v, hessian_u = (
        point.outputs.vector(hvp(fun, point.inputs.pack(point.start), point.inputs.pack(w))) for w in (v, u)
    )
    differences, noise = point.slope(v)
    point.require_close("order 2 (hvp)", hessian_v, differences, noise, point.outputs.name)
    left, right = u * hessian_v, v * hessian_u
    point.require_close(
        "order 2 (hvp, symmetry)",
        np.array([left.sum()]),
        np.array([right.sum()]),
        _SAFETY * point.epsilon * (np.abs(left).sum() + np.abs(right).sum()),
        lambda _: "<u, H v>, which is not <v, H u> for random u and v",
        np.linalg.norm(left),
        "the other way round",
    )


def _check_orders(settings, fun, args, order, modes, under, returns):
    point = _Point(settings, fun, args, returns)
    v, u = point.direction(), point.cotangent()
    tangents, cotangents = point.inputs.pack(v), point.outputs.pack(u)
    checks = {
        "forward": lambda what: _check_forward(point, v, what),
        "reverse": lambda what: _check_reverse(point, u, what),
    }
    derivatives = {
        "forward": (lambda *primals: jvp(fun, primals, tangents)[1], returns),
        "reverse": (lambda *primals: vjp(fun, *primals)[1](cotangents), _GRADIENT),
    }
    for mode in modes:
        chain = (f"{mode} mode", *under)
        checks[mode](f"order {len(chain)} ({' of '.join(chain)})")
        if len(chain) < order:
            derivative, kind = derivatives[mode]
            _check_orders(settings, derivative, args, order, modes, chain, kind)


def _check_forward(point, v, what):
    _, pushed = jvp(point.fun, point.inputs.pack(point.start), point.inputs.pack(v))
    point.require_close(what, point.outputs.vector(pushed), *point.slope(v), point.outputs.name)


def _check_reverse(point, u, what):
    _, pullback = vjp(point.fun, *point.inputs.pack(point.start))
    gradient = point.inputs.vector(pullback(point.outputs.pack(u)))

    def compared(v):
        slope, noise = point.slope(v)
        with np.errstate(all="ignore"):
            return gradient @ v, u @ slope, np.linalg.norm(u * noise), np.linalg.norm(u * slope)

    def require_close(vectors, name):
        ours, differences, noise, scale = np.transpose([compared(v) for v in vectors])
        point.require_close(what, ours, differences, noise, name, scale)

    def off(v):
        ours, differences, *_ = compared(v)
        return np.nan_to_num(abs(ours - differences), nan=np.inf)

    size, v, failure = gradient.size, point.direction(), None
    chosen = range(size) if size <= _WHOLE else sorted(point.settings.random.choice(size, _DRAWN, replace=False))
    try:
        require_close([v], lambda _: "the whole gradient, along a random direction")
    except AssertionError as error:
        failure = error
        if size > _WHOLE:
            chosen = [*chosen, _suspect(off, v)]
    # First, since it says more.
    require_close((np.eye(1, size, i)[0] for i in chosen), lambda k: point.inputs.name(chosen[k]))
    if failure:
        raise failure


def _suspect(off, v):
    """Halves the direction `v` again and again, keeping the half that is `off` by more, until one element is left."""
    first, last = 0, v.size
    while last - first > 1:
        middle = (first + last) // 2
        left, right = np.zeros_like(v), np.zeros_like(v)
        left[first:middle], right[middle:last] = v[first:middle], v[middle:last]
        first, last = (first, middle) if off(left) >= off(right) else (middle, last)
    return first


class _Settings(typing.NamedTuple):
    """What all checks are given; the random numbers go on from one order to the next."""

    check: str
    rtol: float | None
    atol: float | None
    step: float | None
    random: np.random.Generator

    @classmethod
    def checked(cls, check, rtol, atol, step, seed):
        for name, x in (("rtol", rtol), ("atol", atol), ("step", step)):
            if x is not None and not (validation.is_number(x) and 0 <= x < np.inf and (x or name != "step")):
                raise ValueError(
                    f"The {name} of `{check}` must be a {'positive' if name == 'step' else 'non-negative'} number, "
                    f"or None. Received: {name}={x!r}. None chooses it by the dtypes."
                )
        return cls(check, rtol, atol, step, np.random.default_rng(seed))


class _Leaves:
    """The tensors of a nesting as one vector in double precision, and back."""

    def __init__(self, check, structure, kind):
        self._structure, self._kind = structure, kind
        self._paths = [path for path, _ in keras.tree.flatten_with_path(structure)]
        tensors = nesting.flatten(structure)
        for leaf, x in enumerate(tensors):
            validation.require_differentiable(x, f"The {self._place(leaf)} of the function under `{check}`")
        self._shapes = [tuple(x.shape) for x in tensors]
        self.dtypes = [validation.dtype_of(x) for x in tensors]
        self.sizes = [int(np.prod(shape)) for shape in self._shapes]

    def vector(self, structure):
        parts = [np.asarray(ops.convert_to_numpy(x), "float64").ravel() for x in nesting.flatten(structure)]
        return np.concatenate([np.zeros(0), *parts])

    def pack(self, vector):
        parts = self._split(vector)
        tensors = [
            ops.convert_to_tensor(part.reshape(shape), dtype=dtype)
            for part, shape, dtype in zip(parts, self._shapes, self.dtypes, strict=True)
        ]
        return nesting.pack_as(self._structure, tensors)

    def largest(self, vector):
        """For each element the largest absolute value in its tensor: what its rounding is relative to."""
        parts = [np.full(part.shape, part.max(initial=0)) for part in self._split(np.abs(vector))]
        return np.concatenate([np.zeros(0), *parts])

    def _split(self, vector):
        return np.split(vector, np.cumsum(self.sizes))[:-1]

    def name(self, i):
        leaf = int(np.searchsorted(np.cumsum(self.sizes), i, side="right"))
        index = np.unravel_index(i - sum(self.sizes[:leaf]), self._shapes[leaf])
        return f"{self._place(leaf)}, element {tuple(map(int, index))}"

    def _place(self, leaf):
        path, kind = self._paths[leaf], self._kind
        if kind != "output":
            kind, path = f"{kind} {path[0]}", path[1:]
        return f"{kind}{''.join(f'[{key!r}]' for key in path)}"


_GRADIENT = "gradient by argument"


class _Point:
    """A function at a point, seen from outside: what it returns there and nearby, in double precision."""

    def __init__(self, settings, fun, primals, returns="output"):
        check = settings.check
        require_function(check, fun)
        primals = keras.tree.map_structure(_tensor, require_tuple(check, "primals", primals))
        self.fun, self.settings = fun, settings
        self.inputs = _Leaves(check, primals, "argument")
        self.start = self.inputs.vector(primals)
        returned = self._call(self.start)
        self.outputs = _Leaves(check, returned, returns)
        value, again = self.outputs.vector(returned), self.at(self.start)
        if not value.size or not self.start.size:
            raise ValueError(
                f"`{check}` must have something to compare. Received: {self.start.size} elements in the arguments and "
                f"{value.size} in what the function returns. Give it tensors that are not empty."
            )
        dtypes = [*self.inputs.dtypes, *self.outputs.dtypes, keras.config.floatx()]
        self.epsilon, self._first_step, rtol = max(_PRECISIONS.get(d, _PRECISIONS["bfloat16"]) for d in dtypes)
        self._rtol = rtol if settings.rtol is None else settings.rtol
        self._noise = self.epsilon * self.outputs.largest(value)
        if not np.isfinite(value).all() or (np.abs(value - again) > rtol * np.abs(value) + self._noise).any():
            i = int(np.argmax(np.nan_to_num(np.abs(value - again), nan=np.inf)))
            raise ValueError(
                f"The function under `{check}` must give the same finite values when it is called again. Received: "
                f"{value[i]:g} and {again[i]:g} at {self.outputs.name(i)}. Move the point, or draw its random numbers "
                "from a `keras.random.SeedGenerator`, which the checks hold still."
            )
        self._noise = np.maximum(self._noise, self._measured_noise())

    def at(self, vector):
        return self.outputs.vector(self._call(vector))

    def _call(self, vector):
        with StateScope():
            return self.fun(*self.inputs.pack(vector))

    def _measured_noise(self):
        # The fourth difference of seven neighbours leaves of a smooth function the rounding, sqrt(70) times as large
        # (Hamming, "Introduction to Applied Numerical Analysis", section 6.4). The dtype alone tells too little: a
        # sum over a normalized batch is zero, and its terms are not.
        h = min(self._first_step, self.settings.step or np.inf) / 256
        # Keras may compute in a lower precision than float64, whose rounding steps of few bits can miss. In the
        # coarser dtypes other steps would be rounded themselves.
        fine = set(self.inputs.dtypes) == {"float64"}
        v = self.settings.random.normal(size=self.start.size) if fine else self.direction()
        with np.errstate(all="ignore"):
            fourth = np.diff([self.at(self.start + k * h * v) for k in range(-3, 4)], n=4, axis=0)
        return self.outputs.largest(np.nan_to_num(np.abs(fourth).max(axis=0), nan=0, posinf=0)) / 70**0.5

    def direction(self, given=None):
        """A direction of the arguments, as a vector."""
        if given is None:
            return self._draw(self.start.size)
        given = require_tuple(self.settings.check, "tangents", given)
        expected = self.inputs.pack(self.start)
        validation.require_same_structure(given, expected, "The tangents", "`primals`")
        tensors = []
        for x, primal in zip(nesting.flatten(given), nesting.flatten(expected), strict=True):
            x = ops.zeros_like(primal) if x is None else _tensor(x)
            validation.require_shape(x, primal.shape, "Each of the tangents", "its primal")
            tensors.append(x)
        return self.inputs.vector(tensors)

    def cotangent(self):
        return self._draw(sum(self.outputs.sizes))

    def _draw(self, size):
        # Few bits, so that x + h v is exact in most cases; and no element so small that it checks nothing.
        v = np.round(8 * self.settings.random.normal(size=size)) / 8
        return np.where(v == 0, 0.125, v)

    def slope(self, v):
        """The derivative along `v`, each element with the step at which two estimates agree best, and its rounding."""
        h = self.settings.step or self._first_step
        far, _ = self._across(2 * h * v)
        estimates = []
        with np.errstate(all="ignore"):
            for _ in range(1 if self.settings.step else 1 + _HALVINGS):
                near, largest = self._across(h * v)
                slope, noise = (8 * near - far) / (12 * h), np.maximum(self._noise, self.epsilon * largest) / h
                spread = np.abs(slope - estimates[-1][0]) if estimates else np.full(slope.shape, np.inf)
                estimates.append((slope, noise, np.nan_to_num(spread + noise, nan=np.inf)))
                if (spread <= self._rtol / 4 * np.abs(slope) + 2 * noise).all():
                    break
                far, h = near, h / 2
        slopes, noises, doubts = np.array(estimates).transpose(1, 0, 2)
        # The last of them where none is sure.
        best = len(doubts) - 1 - np.argmin(doubts[::-1], axis=0)
        every = np.arange(slopes.shape[1])
        return slopes[best, every], _SAFETY * noises[best, every]

    def _across(self, offset):
        after, before = self.at(self.start + offset), self.at(self.start - offset)
        return after - before, self.outputs.largest(np.maximum(np.abs(after), np.abs(before)))

    def require_close(self, what, ours, theirs, noise, name, scale=0.0, source="central differences"):
        """Raises `AssertionError` about the worst element, unless all are equal within the tolerance."""
        error, tolerance = self._error(ours, theirs, noise, scale)
        wrong = ~(error <= tolerance)
        if not wrong.any():
            return
        with np.errstate(all="ignore"):
            excess = np.where(wrong, np.nan_to_num(error / np.maximum(tolerance, 1e-300), nan=np.inf), -1)
        i = int(np.argmax(excess))
        raise AssertionError(
            f"{self.settings.check}: the derivative of {what} is wrong, or what it is compared with is.\n"
            f"Worst: {name(i)}\n"
            f"  keras_gradtools:     {ours[i]:.9g}\n"
            f"  {f'{source}:':<20} {theirs[i]:.9g}\n"
            f"  difference:          {error[i]:.3g}, tolerance {tolerance[i]:.3g} "
            f"({wrong.sum()} of {wrong.size} compared are wrong)\n"
            "Correct the custom gradient on the way to this element, if there is one, or look for a `stop_gradient`, "
            "a `round`, or a kink or a pole near the point. Pass `step` if the function varies on a scale below "
            f"{self._first_step:g}, and `rtol` or `atol` if it is less precise than its dtypes."
        )

    def _error(self, ours, theirs, noise, scale):
        with np.errstate(all="ignore"):
            largest = np.maximum(np.maximum(np.abs(ours), np.abs(theirs)), scale)
            allowed = noise if self.settings.atol is None else self.settings.atol
            return np.abs(ours - theirs), self._rtol * largest + allowed


def _tensor(x):
    try:
        return ops.convert_to_tensor(x, dtype=keras.config.floatx() if isinstance(x, float) else None)
    except (ValueError, TypeError, RuntimeError):
        # Refused, with its place in the nesting, by whoever asks for a tensor.
        return x
