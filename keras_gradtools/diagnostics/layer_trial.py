"""Tries out one layer as it was called: does its second derivative exist, and does it match its gradient?"""

import contextlib
import dataclasses

import keras
import numpy as np
from keras import ops

from keras_gradtools import backend, nesting, validation
from keras_gradtools.diagnostics.layer_verdict import failed, verdict_on
from keras_gradtools.diagnostics.second_derivative_check import SlopeSearch
from keras_gradtools.example_norms import at_least_single
from keras_gradtools.finite_differences import Leaves
from keras_gradtools.keras_state import layer_calls
from keras_gradtools.keras_state.layer_state import get_keras_mask, set_keras_mask
from keras_gradtools.keras_state.scopes import StateScope
from keras_gradtools.tape import vectors
from keras_gradtools.transforms.first_order import grad
from keras_gradtools.transforms.functional import functionalize
from keras_gradtools.transforms.second_order import hvp
from keras_gradtools.transforms.taped_call import TapedCall
from keras_gradtools.transforms.taylor.kinks import is_piecewise_linear

# Number of random directions to try before the verdict is "unclear". Two wrong ones make it "wrong".
_DIRECTIONS = 3
# After an unclear direction, the point is moved by this fraction of the size of the arguments.
_ASIDE = 0.25
_COARSE = ("float16", "bfloat16")
# Elements from this size on, in a tensor that also has ordinary ones, stand for infinity.
_LARGE = 1e4
# How far from the point kinks are looked for, as fractions of the size of the arguments, and by which fraction the
# gradient then changes.
_FAR = (1.0, 10.0, 100.0)
_BENT = 1e-3
_UNCLEAR = (
    "The differences of its gradient do not converge. It may have kinks, branch on its values, draw random numbers, or "
    "round too coarsely"
)


def tried(call, training, random):
    """The `LayerVerdict` on the layer of a `LayerCall`."""
    layer, computation = call.layer, _Computation(call, training, random)
    primals = computation.primals
    if not computation.has_outputs or not nesting.flatten(primals):
        return verdict_on(layer, "constant")
    try:
        gradient = computation.gradient(*primals)
    except Exception as error:
        return failed(layer, "no", error)
    leaves = Leaves("layer_derivatives", primals, "argument")
    if not leaves.vector(gradient).any():
        return verdict_on(layer, "constant")
    # In half precision, only check that the product exists. Compare it in single precision, because half precision
    # would round errors away.
    is_coarse = any(dtype in _COARSE for dtype in (*leaves.dtypes, layer.compute_dtype))
    try:
        if is_coarse:
            computation.product(primals, primals)
        with layer_calls.in_single_precision() if is_coarse else contextlib.nullcontext():
            verdict, off = _compared(layer, computation, nesting.map_structure(at_least_single, primals), random)
    except _HasNone as error:
        return failed(layer, "once", error.__cause__)
    if verdict == "wrong":
        how = f"off by {off:.2g} times its length" if np.isfinite(off) else "not finite"
        return verdict_on(layer, "wrong", f"It is {how}.")
    by_inputs, by_all = computation.are_zero()
    # A `where` with a given condition, such as the mask of dropout, is linear. Only other points tell it from a kink.
    by_inputs = by_inputs and _bends(computation, leaves, gradient, random)
    if by_all and by_inputs:
        found = verdict_on(layer, "zero")
    else:
        found = verdict_on(layer, verdict, f"{_UNCLEAR}." if verdict == "unclear" else "")
    return dataclasses.replace(found, zero_by_inputs=by_inputs)


def _bends(computation, leaves, gradient, random):
    """Whether the gradient with respect to the inputs differs at other points."""
    start, count = leaves.vector(computation.primals), leaves.vector_of(computation.primals[0]).size
    here = leaves.vector(gradient)[:count]
    for scale in _FAR:
        offset = scale * leaves.typical(start) * random.standard_normal(start.size)
        offset[count:] = 0.0
        there = leaves.vector(computation.gradient(*leaves.pack(start + offset)))[:count]
        if np.linalg.norm(there - here) > _BENT * np.linalg.norm(here):
            return True
    return False


def _compared(layer, computation, primals, random):
    # Along inputs and weights together, their mixed derivatives may hide an error with respect to the inputs alone.
    verdict, off = _along(computation, primals, False, random)
    if verdict == "yes" and all(primals) and not layer_calls.is_keras_own(layer):
        return _along(computation, primals, True, random)
    return verdict, off


def _along(computation, primals, only_inputs, random):
    """The verdict of `SlopeSearch` along random directions, and the largest error of a wrong product."""
    leaves = Leaves("layer_derivatives", primals, "argument")
    start, off = leaves.vector(primals), []
    parts = leaves.split(start)
    large = _joined(map(_stands_for_infinity, parts))
    fixed = large | _joined([_masks(part) & (i < len(primals[0])) for i, part in enumerate(parts)])
    sizes, dtype = leaves.typical(np.where(large, 0.0, start)), computation.coarsest(primals)
    sizes = np.where(fixed, 0.0, sizes)
    moved = sizes
    if only_inputs:
        moved = np.where(np.arange(start.size) < leaves.vector_of(nesting.flatten(primals[0])).size, sizes, 0.0)
    for _ in range(_DIRECTIONS):

        def gradient_at(offset, start=start):
            return leaves.vector(computation.gradient(*leaves.pack(start + offset)))

        v = moved * random.standard_normal(start.size)
        product = leaves.vector(computation.product(leaves.pack(start), leaves.pack(v)))
        verdict, share = SlopeSearch(gradient_at, leaves, dtype).verdict(v, product)
        if verdict == "yes":
            # What is wrong along one direction and right along another may be rounding.
            return ("unclear" if off else "yes"), 0.0
        off += [share] if verdict == "wrong" else []
        if len(off) == 2:
            return "wrong", max(off)
        if verdict == "unclear":
            # Equal numbers, such as many zeros, may lie on a kink. Try again at a point beside it.
            start = start + _ASIDE * sizes * random.standard_normal(start.size)
    return "unclear", 0.0


def _stands_for_infinity(part):
    """Which elements mask something, such as -1e9 in an attention bias.

    A step of their size would swamp the values that they are added to.
    """
    size = np.abs(part)
    return (size >= _LARGE) & (size.min(initial=np.inf) < 1)


def _masks(part):
    """Which elements are the zeros of a floating-point 0/1 mask. Layers may test them for zero, which is a jump."""
    is_mask = np.isin(part, (0.0, 1.0)).all() and part.any()
    return (part == 0) & bool(is_mask)


def _joined(parts):
    return np.concatenate([np.zeros(0, bool), *parts])


class _HasNone(Exception):
    """There is no second derivative. Its cause is the original error."""


class _Computation:
    """The product of a layer's outputs with random cotangents, as a function of its inputs and its weights."""

    def __init__(self, call, training, random):
        self._fun, weights = functionalize(call.layer)
        self._training = training
        self._given = (call.args, {key: value for key, value in call.kwargs.items() if key != "training"})
        self._leaves = nesting.flatten(self._given)
        self._places = [i for i, leaf in enumerate(self._leaves) if is_float_tensor(leaf)]
        self._masks = [get_keras_mask(self._leaves[i]) for i in self._places]
        self.primals = ([ops.stop_gradient(self._leaves[i]) for i in self._places], weights)
        self._cotangents = [random.standard_normal(y.shape) for y in call.outputs]
        self._random_state = backend.random_state()
        self.has_outputs = any(_is_floating(validation.dtype_of(y)) for y in call.outputs)

    def gradient(self, *primals):
        with self._held_still():
            return grad(self._scalar, argnums=(0, 1))(*primals)

    def product(self, primals, tangents):
        try:
            with self._held_still():
                return hvp(self._scalar, primals, tangents)
        except Exception as error:
            raise _HasNone from error

    def are_zero(self):
        """Whether kinks make all second derivatives zero: with respect to the inputs, and to inputs and weights.

        This is read from the operations, which not every framework shows outside a compiled function.
        """
        by_inputs = by_all = False

        def judged(*primals):
            nonlocal by_inputs, by_all
            operations = backend.operations()
            call = TapedCall("layer_derivatives", self._scalar, primals, argnums=(0, 1), operations=operations)
            inputs = vectors.differentiable(call.sources[0])
            by_inputs = bool(inputs) and is_piecewise_linear(call, operations, inputs)
            by_all = is_piecewise_linear(call, operations, call.flat_sources)
            return call.value

        with self._held_still():
            try:
                backend.jit(judged)(*self.primals)
            except Exception:
                # What cannot be compiled is not said to be zero.
                return False, False
        return by_inputs, by_all

    def coarsest(self, primals):
        """The coarsest dtype among the inputs, weights and outputs."""
        with self._held_still():
            outputs = self._called(*primals)
        dtypes = {validation.dtype_of(x) for x in (*nesting.flatten(primals), *outputs)}
        return next(d for d in ("bfloat16", "float16", "float32", "float64") if d in dtypes)

    @contextlib.contextmanager
    def _held_still(self):
        with StateScope(), backend.with_random_state(self._random_state):
            yield

    def _called(self, values, weights):
        replaced = list(self._leaves)
        for place, value, mask in zip(self._places, values, self._masks, strict=True):
            if mask is not None:
                set_keras_mask(value, mask)
            replaced[place] = value
        args, kwargs = nesting.pack_as(self._given, replaced)
        outputs = self._fun(weights, *args, training=self._training, **kwargs)
        return [y for y in nesting.flatten(outputs) if y is not None]

    def _scalar(self, values, weights):
        products = []
        for y, c in zip(self._called(values, weights), self._cotangents, strict=True):
            if is_float_tensor(y):
                y = at_least_single(y)
                products.append(ops.sum(y * ops.convert_to_tensor(c, dtype=y.dtype)))
        return sum(products)


def is_float_tensor(x):
    """Whether `x` is a floating-point tensor."""
    return ops.is_tensor(x) and _is_floating(validation.dtype_of(x))


def _is_floating(dtype):
    return keras.backend.is_float_dtype(dtype)
