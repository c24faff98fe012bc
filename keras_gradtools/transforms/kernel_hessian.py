"""The exact Hessian with respect to the kernel of one Dense layer, from the curvature at the layer's outputs."""

import functools
import math
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_gradtools import backend, validation
from keras_gradtools.annotations import Arguments, Tensor
from keras_gradtools.blocks import Block
from keras_gradtools.example_norms import for_each
from keras_gradtools.keras_state.scopes import StateScope
from keras_gradtools.tape.gradient_tape import GradientTape
from keras_gradtools.transforms import compiled
from keras_gradtools.transforms.closures import Identity
from keras_gradtools.transforms.taped_call import require_function, require_scalar

# While a layer's calls are recorded, its methods are replaced, so only one thread at a time may do this.
_one_at_a_time = threading.RLock()
# The most blocks into which the sum over the examples is divided. Each is one matrix product.
_MOST_BLOCKS = 32


def kernel_hessian(fun: Callable[Arguments, Any], layer: keras.layers.Dense) -> Callable[Arguments, Tensor]:
    r"""Turns a scalar function into its Hessian with respect to the kernel of one `Dense` layer that it calls.

    With $a_b$ the layer's input for example $b$, $z_b = W^\top a_b + c$ its pre-activation, and
    $H_b = \partial^2 f / \partial z_b^2$,

    $$\frac{\partial^2 f}{\partial W_{i o} \, \partial W_{j p}} = \sum_b a_{b i} \, a_{b j} \, H_{b, o p}.$$

    The sum is exact for any model around the layer if the examples are independent and $f$ depends on the kernel only
    through $z$. Both conditions are checked. It is compiled and cached as for `jacobian`.

    Args:
        fun: A function that returns one scalar tensor, such as `lambda x, y: loss(y, model(x))`.
        layer: A built `keras.layers.Dense` that `fun` calls at least once, on inputs of shape `(batch, ..., in)`.

    Returns:
        A function with the arguments of `fun` that returns the Hessian, of shape `(in, out, in, out)` and the dtype of
        the kernel.

    Raises:
        ValueError: If `layer` is not a built Dense layer, or has LoRA or a quantized kernel. When called, if `fun` does
            not return a scalar or does not call the layer, if one call of the layer feeds another, if the examples
            are not independent (BatchNormalization in training mode), or if `fun` depends on the kernel in another way
            (a regularizer, for example: leave it out and add its Hessian). Inside another compilation the last two
            errors cannot be raised, and the result is NaN.

    Cost:
        `out` vectorized gradients of the part of the model after the layer, and one matrix product with
        `batch * (in * out) ** 2` multiplications. `hessian` needs `in * out` products of two gradients each.

    Example:

    >>> import keras
    >>> import keras_gradtools as kg
    >>> from keras import ops
    >>> layer = keras.layers.Dense(1, kernel_initializer="ones")
    >>> model = keras.Sequential([keras.Input((2,)), layer])
    >>> h = kg.kernel_hessian(lambda x: ops.sum(model(x) ** 3) / 6, layer)(ops.convert_to_tensor([[1.0, 2.0]]))
    >>> [[float(d) for d in row] for row in h[:, 0, :, 0]]  # (1 + 2) a a'
    [[3.0, 6.0], [6.0, 12.0]]

    Source: Martens & Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature" (2015),
    section 2, before the expectation is split.
    """
    require_function("kernel_hessian", fun)
    _require_layer(layer)

    @functools.wraps(fun, updated=())
    def hessian(*args, **kwargs):
        body = functools.partial(_evaluate, layer)
        options = ("kernel_hessian", Identity(layer))
        return _require_exact(layer, *compiled.run("kernel_hessian", fun, body, options, args, kwargs)[0])

    return hessian


def _evaluate(layer, fun, *args, **kwargs):
    outer = GradientTape(persistent=True, watch_accessed_variables=False)
    inner = GradientTape(persistent=True, watch_accessed_variables=False)
    scope = StateScope()
    with scope, scope, outer:
        # For the product with the full Hessian, to be compared with the one through `calls`.
        outer.watch(layer.kernel)
        block = _CallsOf(layer, (outer, inner))
        with _one_at_a_time, inner, block, block:
            inner.watch(layer.kernel)
            value = fun(*args, **kwargs)
        require_scalar("kernel_hessian", value)
        calls = block.calls
        if not calls:
            raise ValueError(
                "kernel_hessian takes a layer that the function calls. Received: "
                f"{layer.name!r}, which it does not call."
            )
        if any(inner.gradient(call.input, layer.kernel) is not None for call in calls):
            raise ValueError(
                "kernel_hessian takes a layer whose input does not depend on its own kernel. Received: "
                f"{layer.name!r}, where the output of one call is the input of another. Use `hessian`."
            )
        outputs = [call.output for call in calls]
        gradients = inner.gradient(value, outputs, unconnected_gradients="zero")
        by_kernel = inner.gradient(value, layer.kernel, unconnected_gradients="zero")

    dtype = by_kernel.dtype
    inputs = ops.concatenate([_by_position(call.input, dtype) for call in calls], axis=1)
    if inputs.shape[0] == 0:
        return (ops.zeros((*by_kernel.shape, *by_kernel.shape), dtype=dtype), ops.zeros(()), ops.zeros(())), None
    blocks = [
        [outer.batch_jacobian(g, z, unconnected_gradients="zero", mode=backend.HESSIAN_MODE) for z in outputs]
        for g in gradients
    ]
    curvature = _joined(blocks, gradients, outputs, dtype)
    hessian = _contracted(inputs, curvature)
    direction = ops.convert_to_tensor(np.random.default_rng(0).normal(size=tuple(by_kernel.shape)), dtype=dtype)
    product = outer.gradient(by_kernel, layer.kernel, direction, unconnected_gradients="zero")
    elsewhere = _relative(ops.einsum("iojp,io->jp", hessian, direction), product)
    return (hessian, elsewhere, _mixing(outer, gradients, outputs, curvature)), None


class _Call(NamedTuple):
    input: object
    output: object


class _CallsOf(Block):
    """Records the inputs and pre-activations of the layer's calls in the block, on this thread.

    The `tapes` watch the pre-activations.
    """

    def __init__(self, layer, tapes):
        self._layer, self._tapes, self._thread = layer, tapes, threading.get_ident()
        self.calls: list = []
        self._inputs: list = []
        self._before: dict | None = None

    def begin(self):
        # Not in `__init__`: at that time, another thread may have replaced these methods.
        self._call, self._activation = self._layer.call, self._layer.activation
        # Bypasses `Layer.__setattr__`, which would track these as a change of the layer.
        own = vars(self._layer)
        self._before = {name: own[name] for name in ("call", "activation") if name in own}
        own.update(call=self._call_and_note, activation=self._activate_and_note)

    def end(self):
        if self._before is not None:
            for name in ("call", "activation"):
                vars(self._layer).pop(name, None)
            vars(self._layer).update(self._before)

    def _call_and_note(self, x, *args, **kwargs):
        if threading.get_ident() == self._thread:
            self._inputs.append(x)
        return self._call(x, *args, **kwargs)

    def _activate_and_note(self, z):
        if threading.get_ident() == self._thread:
            z = backend.alias(z)
            for tape in self._tapes:
                tape.watch(z)
            self.calls.append(_Call(self._inputs.pop(), z))
        return self._activation(z)


def _by_position(x, dtype):
    """Reshapes to `(batch, positions, features)`, where the positions are the middle axes."""
    shape = ops.shape(x)
    return ops.cast(ops.reshape(x, (shape[0], math.prod(x.shape[1:-1]), shape[-1])), dtype)


def _joined(blocks, gradients, outputs, dtype):
    """The Hessian of each example over all positions of all calls, `(batch, position, out, position, out)`."""
    rows = []
    for row, g in zip(blocks, gradients, strict=True):
        columns = []
        for block, z in zip(row, outputs, strict=True):
            size, out = ops.shape(g)[0], g.shape[-1]
            shape = (size, math.prod(g.shape[1:-1]), out, math.prod(z.shape[1:-1]), out)
            columns.append(ops.cast(ops.reshape(block, shape), dtype))
        rows.append(ops.concatenate(columns, axis=3))
    return ops.concatenate(rows, axis=1)


def _contracted(inputs, curvature):
    """Sums `a a' H` over the examples, as matrix products over blocks of examples, which limits the memory."""
    size, positions, features = inputs.shape
    out = curvature.shape[-1]
    if positions != 1:
        return ops.einsum("bpi,bqj,bpoqr->iojr", inputs, inputs, curvature)
    a, h = inputs[:, 0], ops.reshape(curvature, (-1, out * out))
    blocks = 1 if size is None else min(max(1, size // max(out * out, 64)), _MOST_BLOCKS)
    step = size if size is None else -(-size // blocks)
    total = 0.0
    for start in range(0, size or 1, step or 1):
        some_a, some_h = a[start : start + step] if step else a, h[start : start + step] if step else h
        pairs = ops.reshape(some_a[:, :, None] * some_a[:, None, :], (-1, features * features))
        total = total + ops.matmul(ops.transpose(pairs), some_h)
    return ops.transpose(ops.reshape(total, (features, features, out, out)), (0, 2, 1, 3))


def _mixing(tape, gradients, outputs, curvature):
    """How much an example's gradient depends on the layer's outputs for other examples, relative to its own.

    With a factor s_b for each example and one vector c for all, the Hessian-vector product with s_b c is s_b H_b c if
    the examples are independent.
    """
    size = ops.shape(outputs[0])[0]
    factors = ops.cos(1.0 + ops.square(ops.cast(ops.arange(size), "float32")))

    def vector(z, salt):
        elements = np.random.default_rng(salt).normal(size=tuple(z.shape[1:]))
        return ops.convert_to_tensor(elements, dtype=z.dtype)

    vectors = [vector(z, salt) for salt, z in enumerate(outputs)]
    cotangents = [for_each(ops.cast(factors, z.dtype), z) * v[None] for z, v in zip(outputs, vectors, strict=True)]
    products = tape.gradient(gradients, outputs, cotangents, unconnected_gradients="zero")
    products = ops.concatenate([_by_position(p, curvature.dtype) for p in products], axis=1)
    joined = ops.concatenate([_by_position(v[None], curvature.dtype) for v in vectors], axis=1)[0]
    own = ops.einsum("po,bpoqr->bqr", joined, curvature) * ops.cast(factors, curvature.dtype)[:, None, None]
    return _relative(own, products)


def _relative(a, b):
    """The largest difference, relative to the largest value."""
    largest = ops.maximum(ops.max(ops.abs(a)), ops.max(ops.abs(b)))
    return ops.max(ops.abs(a - b)) / ops.maximum(largest, keras.config.epsilon() ** 2)


def _require_exact(layer, hessian, elsewhere, mixing):
    """Returns `hessian`. If it is not that of `fun`, raises `ValueError`, or returns NaN inside a compilation."""
    # The largest difference that rounding in the layer's precision can explain.
    tolerance = 1e-3 if layer.compute_dtype in ("float32", "float64") else 5e-2
    # Examples that mix make both numbers large, so `mixing` is checked first.
    known = _number(elsewhere), _number(mixing)
    if None in known:
        wrong = ops.logical_or(elsewhere > tolerance, mixing > tolerance)
        return ops.where(wrong, ops.full_like(hessian, math.nan), hessian)
    if known[1] > tolerance:
        raise ValueError(
            "kernel_hessian takes a function of independent examples. Received: one in which an example's gradient at "
            f"{layer.name!r} depends on the others ({known[1]:.1e}, relative to its own). Call BatchNormalization in "
            "inference mode, or use `hessian`."
        )
    if known[0] > tolerance:
        raise ValueError(
            f"kernel_hessian takes a function that depends on the kernel of {layer.name!r} through the layer's calls "
            f"alone. Received: one whose curvature differs by {known[0]:.1e} (relative) from that through the calls. "
            "Leave out the regularizer, and anything else that reads the kernel, and add its Hessian, or use `hessian`."
        )
    return hessian


def _number(x):
    if backend.is_recording_values():
        return None
    try:
        return float(ops.convert_to_numpy(x))
    except Exception:
        # Inside a compilation there is no number yet, and each framework raises its own error.
        return None


def _require_layer(layer):
    if not isinstance(layer, keras.layers.Dense):
        raise ValueError(f"kernel_hessian takes a keras.layers.Dense. Received: {validation.describe(layer)}.")
    if not layer.built:
        raise ValueError(f"kernel_hessian takes a built layer. Received: {layer.name!r}, which was never called.")
    if layer.lora_enabled or layer.quantization_mode is not None:
        raise ValueError(
            "kernel_hessian takes a layer whose kernel is one variable. Received: "
            f"{layer.name!r}, which has {'LoRA' if layer.lora_enabled else 'a quantized kernel'}."
        )
