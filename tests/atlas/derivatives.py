"""Every way to a derivative of a function at a point, each judged by differences of what was judged before it."""

import functools

import keras
import numpy as np
from keras import ops

import keras_gradtools as kg
from tests.atlas.reference import central, sampled, slope

CHECKS = (
    "tape",
    "jvp",
    "jacobian, reverse",
    "jacobian, forward",
    "batch_jacobian",
    "per_example_grad",
    "jit",
    "second by nesting",
    "hvp",
    "linearize",
    "third",
)


def _numpy(x):
    return np.asarray(ops.convert_to_numpy(x), "float64")


def _flat(x):
    leaves = keras.tree.flatten(x)
    return np.concatenate([np.zeros(0), *(_numpy(leaf).ravel() for leaf in leaves)])


def _dot(u, x):
    """The sum of all leaves, each times its weights."""
    leaves = [ops.convert_to_tensor(leaf) for leaf in keras.tree.flatten(x)]
    return sum((ops.sum(ops.cast(w, leaf.dtype) * leaf) for w, leaf in zip(u, leaves, strict=True)), start=0.0)


def _error(error):
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    # Keras wraps what a layer raises, and its first line says only where.
    lines = [line for line in lines if not line.startswith("Exception encountered when calling")] or [""]
    return f"error: {type(error).__name__}: {lines[0].strip()[:160]}"


class Point:
    """A function at a point, with a direction for each derivative."""

    def __init__(self, case, seed=0):
        self.random = np.random.default_rng(seed)
        self.fun = case.fun
        self.may_be_kink = not case.kind.startswith("generic")
        self.arrays = case.arrays
        self.v, self.w = ([self.random.normal(size=x.shape) for x in case.arrays] for _ in range(2))
        self.places = tuple(range(len(case.arrays)))
        outputs = keras.tree.flatten(self.fun(*self.tensors(self.arrays)))
        values = [_numpy(leaf) for leaf in outputs]
        # Keras computes some operations in single precision, whatever it is given.
        is_single = all(np.array_equal(y, y.astype("float32"), equal_nan=True) for y in values)
        self.rtol = 1e-4 if is_single else 1e-6
        self.is_finite = all(np.isfinite(value).all() for value in values)
        self.u = [self.random.normal(size=value.shape) for value in values]

    def tensors(self, arrays):
        return tuple(ops.convert_to_tensor(x) for x in arrays)

    def values(self, arrays):
        """The outputs as one vector."""
        return _flat(self.fun(*self.tensors(arrays)))

    def scalar(self, *xs):
        return _dot(self.u, self.fun(*xs))

    def gradient(self, xs):
        with kg.GradientTape() as tape:
            tape.watch(xs)
            y = self.scalar(*xs)
        return tape.gradient(y, xs, unconnected_gradients="zero")

    def slope_by(self, direction, xs):
        return _dot(direction, self.gradient(xs))

    def product(self, xs):
        """The gradient of the slope along v."""
        with kg.GradientTape() as tape:
            tape.watch(xs)
            slope_along = self.slope_by(self.v, xs)
        return tape.gradient(slope_along, xs, unconnected_gradients="zero")

    def third(self, xs):
        with kg.GradientTape() as tape:
            tape.watch(xs)
            curvature = _dot(self.w, self.product(xs))
        return tape.gradient(curvature, xs, unconnected_gradients="zero")


class Order:
    """The reference of one order: the slope of a function of the point along a direction.

    `fun(arrays)` is what was judged before it, and `below` its order. At an awkward point, which may be a kink, a
    second look is taken at points nearby where the slopes of both sides do not allow what was found. Where the function
    jumps, or the order below is infinite, nothing is known.
    """

    def __init__(self, point, fun, direction, below=None):
        self._point, self._fun, self._direction, self._below = point, fun, direction, below

    @functools.cached_property
    def is_smooth(self):
        return self.slope.is_smooth and (self._below is None or self._below.is_smooth)

    @functools.cached_property
    def has_no_meaning(self):
        below = self._below is not None and (self._below.has_no_meaning or self._below.slope.is_infinite)
        return below or self.slope.jumps and self._below is None

    @functools.cached_property
    def _size(self):
        return np.shape(self._fun(self._point.arrays))

    def _along(self, arrays):
        def along(t):
            try:
                found = self._fun([x + t * d for x, d in zip(arrays, self._direction, strict=True)])
            except (ValueError, RuntimeError):  # outside of the domain
                found = None
            # Where ties part, there may be more outputs.
            return found if np.shape(found) == self._size else np.full(self._size, np.nan)

        return along

    @functools.cached_property
    def slope(self):
        found = slope(self._along(self._point.arrays), self._point.may_be_kink)
        return found if self._below is None or self._below.is_smooth else found.with_zero()

    @functools.cached_property
    def nearby(self):
        random = np.random.default_rng(1)
        near = [[x + 1e-2 * random.normal(size=x.shape) for x in self._point.arrays] for _ in range(24)]
        found = sampled([central(self._along(arrays)) for arrays in near])
        return found if self._below is None or self._below.is_smooth else found.with_zero()

    def judge(self, actual, weights=None):
        verdict = self._judged(self.slope, actual, weights)
        if verdict.startswith(("wrong", "NaN")) and self._point.may_be_kink:
            if self._judged(self.nearby, actual, weights) == "right":
                return "right"
            return "unknown" if self.has_no_meaning else verdict
        return verdict

    def _judged(self, reference, actual, weights):
        return (reference if weights is None else reference.weighted(weights)).judge(actual, self._point.rtol)


def examine(case, seed=0):
    """What came of each check: "right", "unknown", "NaN", "error: ..." or "wrong: ..."."""
    try:
        point = Point(case, seed)
    except Exception as error:
        return {"value": _error(error)}
    if not point.is_finite:
        return {"value": "not finite"}
    if not point.u:
        return {"value": "no output"}
    xs, v = point.tensors(point.arrays), point.tensors(point.v)
    weights = np.concatenate([np.zeros(0), *(u.ravel() for u in point.u)])
    first = Order(point, point.values, point.v)
    found = {}

    def check(name, compute, order, weights=None):
        try:
            found[name] = order.judge(compute(), weights)
        except Exception as error:
            found[name] = _error(error)

    def along_v(gradients):
        return sum(float(np.sum(_flat(g) * d.ravel())) for g, d in zip(gradients, point.v, strict=True))

    check("tape", lambda: along_v(point.gradient(xs)), first, weights)
    check("jvp", lambda: _flat(kg.jvp(point.fun, xs, v)[1]), first)
    for mode in ("reverse", "forward"):
        jacobian = kg.jacobian(point.fun, argnums=point.places, mode=mode)
        check(f"jacobian, {mode}", lambda jacobian=jacobian: _rows(jacobian(*xs), point), first)
    check("batch_jacobian", lambda: _batch(point), first)
    check("per_example_grad", lambda: _per_example(point), first, weights)
    check("jit", lambda: along_v(kg.jit(lambda *xs: point.gradient(xs))(*xs)), first, weights)

    # Each order is compared with the slope of the one below it, which was judged before.
    second = Order(point, lambda arrays: _flat(point.gradient(point.tensors(arrays))), point.v, first)
    check("second by nesting", lambda: _flat(point.product(xs)), second)
    check("hvp", lambda: _flat(kg.hvp(point.scalar, xs, v)), second)
    gradient = kg.grad(point.scalar, argnums=point.places)
    check("linearize", lambda: _flat(kg.linearize(gradient, *xs)[1](*v)), second)
    if found["second by nesting"].startswith("error"):
        found["third"] = found["second by nesting"]
        return found
    third = Order(point, lambda arrays: _flat(point.product(point.tensors(arrays))), point.w, second)
    check("third", lambda: _flat(point.third(xs)), third)
    return found


def _rows(jacobian, point):
    """A Jacobian of shape `output + input`, times v."""
    by_output = jacobian if isinstance(jacobian, (tuple, list)) else (jacobian,)
    outputs = keras.tree.flatten(point.fun(*point.tensors(point.arrays)))
    blocks = [_numpy(leaf) for leaf in keras.tree.flatten(by_output)]
    # The blocks of one output stand side by side, one for each argument.
    count = len(point.arrays)
    rows = []
    for i, output in enumerate(outputs):
        of_output = blocks[i * count : (i + 1) * count]
        size = int(np.prod(output.shape))
        rows.append(
            sum(b.reshape(size, v.size) @ v.ravel() for b, v in zip(of_output, point.v, strict=True))
            if count
            else np.zeros(size)
        )
    return np.concatenate([np.zeros(0), *rows])


def _one(point):
    """The function of one vector."""
    sizes = [x.size for x in point.arrays]
    ends = np.cumsum(sizes)

    def fun(vector):
        parts = [
            ops.reshape(vector[int(end - size) : int(end)], x.shape)
            for x, size, end in zip(point.arrays, sizes, ends, strict=True)
        ]
        leaves = keras.tree.flatten(point.fun(*parts))
        return ops.concatenate([ops.reshape(leaf, (-1,)) for leaf in leaves])

    return fun, np.concatenate([x.ravel() for x in point.arrays]), np.concatenate([v.ravel() for v in point.v])


def _batch(point):
    """Of two examples, each computed by itself; the second one counts, the first one is the same point."""
    fun, x, v = _one(point)
    batched = kg.batch_jacobian(lambda xs: ops.stack([fun(xs[0]), fun(xs[1])]))
    found = _numpy(batched(ops.convert_to_tensor(np.stack([x, x]))))
    if not np.allclose(found[0], found[1], equal_nan=True):
        raise AssertionError("the two examples differ")
    return found[1] @ v


def _per_example(point):
    fun, x, v = _one(point)
    u = np.concatenate([u.ravel() for u in point.u])

    def loss(w, examples):
        return ops.sum(ops.cast(u, w.dtype) * fun(w + examples[0]))

    found = kg.per_example_grad(loss)(ops.convert_to_tensor(0.5 * x), ops.convert_to_tensor(np.stack([x, 0.5 * x])))
    return float(_numpy(found)[1] @ v)
