"""Central differences of a function, computed from its values in double precision."""

import typing

import keras
import numpy as np
from keras import ops

from keras_gradtools import nesting, validation
from keras_gradtools.keras_state.scopes import StateScope
from keras_gradtools.tape import vectors
from keras_gradtools.transforms.first_order import require_tuple
from keras_gradtools.transforms.taped_call import require_function

# For each dtype, the machine epsilon, the first step of the search, and `rtol`. The step is a power of two near the
# fifth root of epsilon, where the truncation error (about h^4 f''''' / 30) equals the rounding error (about eps f / h).
_PRECISIONS = {
    "float64": (2.0**-52, 2.0**-9, 1e-6),
    "float32": (2.0**-23, 2.0**-4, 1e-3),
    "float16": (2.0**-10, 2.0**-1, 5e-2),
    "bfloat16": (2.0**-7, 2.0**-1, 1e-1),
}
_HALVINGS = 10
# The tolerance for rounding, in multiples of its measured size, which is a little less than its standard deviation.
SAFETY = 8
# The smallest typical size that is assumed for an argument of zeros.
_SMALLEST_FOR_ZEROS = 2.0**-7
# The name of the derivative with respect to the arguments in messages.
GRADIENT = "gradient by argument"


class Settings(typing.NamedTuple):
    """The options that all checks have, and the random generator that all orders of one check share."""

    check: str
    rtol: float | None
    atol: float | None
    step: float | None
    random: np.random.Generator

    @classmethod
    def of(cls, check, rtol, atol, step, seed):
        """The settings of the public function `check`. Raises `ValueError` for an invalid option."""
        rtol = validation.require_number(check, "rtol", rtol, least=0, may_be_none=True)
        atol = validation.require_number(check, "atol", atol, least=0, may_be_none=True)
        step = validation.require_number(check, "step", step, above=0, may_be_none=True)
        return cls(check, rtol, atol, step, np.random.default_rng(validation.require_seed(check, seed)))


class Leaves:
    """Converts the tensors of a nested structure that have a derivative to one vector in double precision, and back."""

    def __init__(self, check, structure, kind):
        self._structure, self._kind = structure, kind
        self._places = vectors.places(structure)
        self._paths = nesting.paths(structure)
        leaves = nesting.flatten(structure)
        has_some = any(self._places.are_taken)
        for leaf, x in enumerate(leaves):
            if not (has_some and validation.is_constant(x)):
                validation.require_differentiable(x, f"The {self._place(leaf)} of the function under `{check}`")
        tensors = self._taken(leaves)
        self._paths = self._taken(self._paths)
        self._shapes = [tuple(x.shape) for x in tensors]
        self.dtypes = [validation.dtype_of(x) for x in tensors]
        self.sizes = [int(np.prod(shape)) for shape in self._shapes]

    def vector(self, structure):
        return self.vector_of(self._taken(nesting.flatten(structure)))

    def vector_of(self, tensors):
        parts = [np.asarray(ops.convert_to_numpy(x), "float64").ravel() for x in tensors]
        return np.concatenate([np.zeros(0), *parts])

    def pack(self, vector):
        return vectors.replaced(self._structure, self._tensors(vector))

    def pack_direction(self, vector):
        """The same as `pack`, with None for leaves that have no derivative."""
        return self._places.pack(self._tensors(vector))

    def _tensors(self, vector):
        parts = self.split(vector)
        return [
            ops.convert_to_tensor(part.reshape(shape), dtype=dtype)
            for part, shape, dtype in zip(parts, self._shapes, self.dtypes, strict=True)
        ]

    def _taken(self, leaves):
        return [x for x, is_taken in zip(leaves, self._places.are_taken, strict=True) if is_taken]

    def largest(self, vector):
        """For each element the largest absolute value in its tensor, to which its rounding is relative."""
        parts = [np.full(part.shape, part.max(initial=0)) for part in self.split(np.abs(vector))]
        return np.concatenate([np.zeros(0), *parts])

    def typical(self, vector):
        """For each element the size of its tensor: a power of two near the root mean square.

        A tensor of zeros, such as a new bias, gets the smallest size of the others, limited to the range from
        `_SMALLEST_FOR_ZEROS` to 1.
        """
        parts = self.split(vector)
        roots = [np.sqrt(np.mean(np.square(part))) if part.size else 0.0 for part in parts]
        others = min((root for root in roots if root > 0), default=1.0)
        for_zeros = min(max(others, _SMALLEST_FOR_ZEROS), 1.0)
        sizes = [2.0 ** np.round(np.log2(root if 0 < root < np.inf else for_zeros)) for root in roots]
        return np.concatenate([np.zeros(0), *map(np.full, [part.shape for part in parts], sizes)])

    def split(self, vector):
        """The part of a vector, or of the rows of a matrix, that belongs to each tensor."""
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


class Point:
    """The values of a function at a point and near it, in double precision."""

    def __init__(self, settings, fun, primals, returns="output"):
        check = settings.check
        require_function(check, fun)
        primals = nesting.map_structure(_tensor, require_tuple(check, "primals", primals))
        self.fun, self.settings = fun, settings
        self.inputs = Leaves(check, primals, "argument")
        self.start = self.inputs.vector(primals)
        # Steps are relative to these sizes, because a function of small numbers varies on a small scale.
        self._sizes = self.inputs.typical(self.start)
        returned = self._call(self.start)
        self.outputs = Leaves(check, returned, returns)
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
                f"{value[i]:g} and {again[i]:g} at {self.outputs.name(i)}. Choose another point, or draw random "
                "numbers from a `keras.random.SeedGenerator`, whose state the checks keep fixed."
            )
        self._noise = np.maximum(self._noise, self._measured_noise())

    def at(self, vector):
        return self.outputs.vector(self._call(vector))

    def _call(self, vector):
        scope = StateScope()
        with scope, scope:
            return self.fun(*self.inputs.pack(vector))

    def _measured_noise(self):
        # The fourth differences of seven neighboring values of a smooth function are its rounding errors times sqrt(70)
        # (Hamming, "Introduction to Applied Numerical Analysis", section 6.4). The dtype alone does not determine the
        # rounding: a sum over a normalized batch is zero, but its terms are not.
        h = self._first_step / 256
        # With float64 arguments, Keras may still compute in a lower precision. There, a direction of few bits could be
        # exact and show no rounding errors, so the direction is not rounded. With coarser dtypes it must be rounded,
        # because otherwise x + h v itself would have rounding errors.
        fine = set(self.inputs.dtypes) == {"float64"}
        v = self._sizes * self.settings.random.normal(size=self.start.size) if fine else self.direction()
        h *= self._unit(v)
        with np.errstate(all="ignore"):
            fourth = np.diff([self.at(self.start + k * h * v) for k in range(-3, 4)], n=4, axis=0)
        return self.outputs.largest(np.nan_to_num(np.abs(fourth).max(axis=0), nan=0, posinf=0)) / 70**0.5

    def direction(self, given=None):
        """A direction of the arguments, as a vector."""
        if given is None:
            return self._sizes * self._draw(self.start.size)
        given = require_tuple(self.settings.check, "tangents", given)
        return self.inputs.vector_of(
            vectors.like(given, self.inputs.pack(self.start), "the tangents", "`primals`", vectors.zeros)
        )

    def _unit(self, v):
        """The largest power of two for which the multiple of `v` moves no argument by more than its size."""
        moved = [part[part != 0] for part in self.inputs.split(v)]
        lengths = [np.sqrt(np.mean(np.square(part))) if part.size else 0.0 for part in moved]
        sizes = [part[0] if part.size else 0.0 for part in self.inputs.split(self._sizes)]
        units = [size / length for size, length in zip(sizes, lengths, strict=True) if length > 0 and size > 0]
        return 2.0 ** np.floor(np.log2(min(units))) if units else 1.0

    def cotangent(self):
        return self._draw(sum(self.outputs.sizes))

    def _draw(self, size):
        # Few bits, so that x + h v is usually exact, and no element so small that it would check nothing.
        v = np.round(8 * self.settings.random.normal(size=size)) / 8
        return np.where(v == 0, 0.125, v)

    def slope(self, v):
        """The derivative along `v`, and the tolerance for its rounding error.

        The step is halved until two estimates agree. Each element takes the estimate that agrees best with the one
        before.
        """
        h = self.settings.step or self._first_step * self._unit(v)
        far, _ = self._across(2 * h * v)
        estimates = []
        with np.errstate(all="ignore"):
            for _ in range(1 if self.settings.step else 1 + _HALVINGS):
                near, largest = self._across(h * v)
                slope, noise = (8 * near - far) / (12 * h), np.maximum(self._noise, self.epsilon * largest) / h
                change = np.abs(slope - estimates[-1][0]) if estimates else np.full(slope.shape, np.inf)
                estimates.append((slope, noise, np.nan_to_num(change + noise, nan=np.inf)))
                if (change <= self._rtol / 4 * np.abs(slope) + 2 * noise).all():
                    break
                far, h = near, h / 2
        slopes, noises, doubts = np.array(estimates).transpose(1, 0, 2)
        # On a tie, the smallest step is taken.
        best = len(doubts) - 1 - np.argmin(doubts[::-1], axis=0)
        every = np.arange(slopes.shape[1])
        return slopes[best, every], SAFETY * noises[best, every]

    def _across(self, offset):
        after, before = self.at(self.start + offset), self.at(self.start - offset)
        return after - before, self.outputs.largest(np.maximum(np.abs(after), np.abs(before)))

    def require_close(self, what, ours, theirs, noise, name, scale=0.0, source="central differences"):
        """Raises `AssertionError`, naming the worst element, unless all are equal within the tolerance."""
        error, tolerance = self._error(ours, theirs, noise, scale)
        wrong = ~(error <= tolerance)
        if not wrong.any():
            return
        with np.errstate(all="ignore"):
            excess = np.where(wrong, np.nan_to_num(error / np.maximum(tolerance, 1e-300), nan=np.inf), -1)
        i = int(np.argmax(excess))
        raise AssertionError(
            f"{self.settings.check}: the derivative of {what} is wrong, or the value it is compared with.\n"
            f"Worst: {name(i)}\n"
            f"  keras_gradtools:     {ours[i]:.9g}\n"
            f"  {f'{source}:':<20} {theirs[i]:.9g}\n"
            f"  difference:          {error[i]:.3g}, tolerance {tolerance[i]:.3g} "
            f"({wrong.sum()} of {wrong.size} compared are wrong)\n"
            "Possible causes are a wrong custom gradient, a `stop_gradient`, a `round`, or a kink or pole near the "
            f"point. Pass `step` if the function varies on a scale below {self._first_step:g} times the size of its "
            "arguments, and `rtol` or `atol` if it is less precise than its dtypes."
        )

    def _error(self, ours, theirs, noise, scale):
        with np.errstate(all="ignore"):
            largest = np.maximum(np.maximum(np.abs(ours), np.abs(theirs)), scale)
            allowed = noise if self.settings.atol is None else self.settings.atol
            return np.abs(ours - theirs), self._rtol * largest + allowed


def _tensor(x):
    if validation.is_constant(x):
        return x
    try:
        return ops.convert_to_tensor(x, dtype=keras.config.floatx() if isinstance(x, float) else None)
    except (ValueError, TypeError, RuntimeError):
        # `Leaves` raises an error that names its place.
        return x
