"""The singular values of each example's Jacobian, or only its norms, and the quantities derived from them."""

import dataclasses
import functools
import math
from typing import Any, Literal

import keras
import numpy as np
from keras import ops

from keras_gradtools import chosen_inputs, nesting, validation
from keras_gradtools.annotations import Function, InputNames, Nested
from keras_gradtools.display.descriptions import short
from keras_gradtools.display.html import Table
from keras_gradtools.display.results import displayed
from keras_gradtools.example_norms import normalized, numbers, scaled, split, squares
from keras_gradtools.transforms import compiled
from keras_gradtools.transforms.jacobians import batch_jacobian
from keras_gradtools.transforms.taped_call import TapedCall

NAME = "jacobian_spectrum"
ITERATIONS = 30
METHODS = ("auto", "explicit", "implicit")
# Limits of the explicit method: elements of a batch's Jacobians, and singular values of one example.
_MOST_NUMBERS, _MOST_VALUES = 1 << 22, 128


@displayed
@dataclasses.dataclass(frozen=True)
class JacobianSpectrum:
    r"""Norms and singular values of the Jacobian $J_b = \partial f(x_b) / \partial x_b$ of each example.

    The singular values are $\sigma_1 \ge \dots \ge \sigma_r$, where $r$ is the smaller of the sizes of an example's
    input and output. Quantities that need all of them are None if the Jacobian was not formed.

    Attributes:
        spectral_norm: $\sigma_1$, of shape `(batch,)`.
        frobenius_norm: $(\sum_i \sigma_i^2)^{1/2}$, of shape `(batch,)`. If the Jacobian was not formed, its square is
            an unbiased estimate from products along random orthonormal directions.
        singular_values: All $\sigma_i$ in descending order, of shape `(batch, r)`, or None.
    """

    spectral_norm: Any
    frobenius_norm: Any
    singular_values: Any

    @property
    def condition_number(self) -> np.ndarray | None:
        r"""$\sigma_1 / \sigma_r$, of shape `(batch,)`; infinite where $\sigma_r$ is zero up to rounding."""
        if self.singular_values is None:
            return None
        first, last = self.singular_values[:, 0], self.singular_values[:, -1]
        is_regular = last > self._rounding * first
        return np.where(is_regular, first / np.where(is_regular, last, 1.0), np.inf)

    @property
    def effective_rank(self) -> np.ndarray | None:
        r"""$\exp(-\sum_i p_i \log p_i)$, $p_i = \sigma_i / \sum_j \sigma_j$, of shape `(batch,)`; 0 if all are zero."""
        if self.singular_values is None:
            return None
        total = self.singular_values.sum(axis=1, keepdims=True)
        p = self.singular_values / np.where(total > 0, total, 1.0)
        entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=1)
        return np.where(total[:, 0] > 0, np.exp(entropy), 0.0)

    @property
    def dynamical_isometry(self) -> np.ndarray | None:
        r"""The distance to an isometry, $(\frac1r \sum_i (\sigma_i - 1)^2)^{1/2}$, of shape `(batch,)`."""
        if self.singular_values is None:
            return None
        return np.sqrt(((self.singular_values - 1) ** 2).mean(axis=1))

    def _parts(self):
        rows = [
            (name.replace("_", " "), *map(short, (values.min(), np.median(values), values.max())))
            for name in ("spectral_norm", "frobenius_norm", "condition_number", "effective_rank", "dynamical_isometry")
            if (values := getattr(self, name)) is not None
        ]
        return [f"{len(self.spectral_norm)} examples", Table(rows, ("of an example", "least", "median", "largest"))]

    @property
    def _rounding(self):
        return np.finfo("float32").eps * self.singular_values.shape[1]


def jacobian_spectrum(
    model: Function,
    x: Nested,
    training: bool = False,
    method: Literal["auto", "explicit", "implicit"] = "auto",
    *,
    iterations: int = ITERATIONS,
    seed: int = 0,
    inputs: InputNames = None,
) -> JacobianSpectrum:
    r"""Computes the singular values of each example's Jacobian, or only its norms if the Jacobian is large.

    `"explicit"` forms the Jacobians with `kg.batch_jacobian` and decomposes them with NumPy. `"implicit"` computes the
    largest singular value by `iterations` steps of Golub-Kahan bidiagonalization, which are at least as accurate as the
    same number of power iterations. It estimates the Frobenius norm from `iterations` random orthonormal directions.
    The examples are processed together, and only a few vectors of the size of the data are stored.

    Args:
        model: A Keras model, or a function of `x`. The examples must be independent, which
            `kg.diagnostics.batch_independence` tests.
        x: Tensors of shape `(batch, ...)`, in any nested structure.
        training: Whether a model is called in training mode.
        method: `"explicit"`, `"implicit"`, or `"auto"`: explicit if the Jacobians of all examples together have at most
            about four million elements and each has at most 128 singular values.
        iterations: Number of iterations of the implicit method. It is exact if an example has no more than
            `iterations` inputs or outputs.
        seed: An integer that seeds the random vectors of the implicit method.
        inputs: The names, keys or positions of the inputs to differentiate with respect to. By default, all
            floating-point inputs. The others are held constant.

    Returns:
        A `JacobianSpectrum`.

    Raises:
        ValueError: If an option, an input or an output is not valid, or if a Jacobian is not finite.

    Cost:
        Explicit: the cost of `kg.batch_jacobian`. Implicit: three products with $J$ or $J^\top$ in each iteration,
        about six gradients. On TensorFlow and JAX, both are compiled once, and the programs are cached on the model.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> import keras_gradtools as kg
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, use_bias=False)])
    >>> model.set_weights([np.array([[3.0, 0.0], [0.0, 0.5]])])
    >>> spectrum = kg.diagnostics.jacobian_spectrum(model, np.ones((1, 2), "float32"))
    >>> spectrum.singular_values.tolist(), spectrum.condition_number.tolist()
    ([[3.0, 0.5]], [6.0])

    Source: Golub & Kahan, "Calculating the singular values and pseudo-inverse of a matrix" (1965); Roy & Vetterli, "The
    effective rank" (2007); Pennington, Schoenholz & Ganguli, "Resurrecting the sigmoid in deep learning through
    dynamical isometry" (arXiv:1711.04735, 2017).
    """
    validation.require_choice(NAME, "method", method, METHODS)
    iterations = validation.require_count(NAME, "iterations", iterations)
    validation.require_seed(NAME, seed)
    validation.require_callable_model(NAME, model)
    training = validation.require_flag(NAME, "training", training)
    kwargs = {"training": training} if isinstance(model, keras.Layer) else {}
    x = require_float_examples(NAME, x)
    chosen = require_inputs(NAME, model, x, chosen_inputs.require_names(NAME, inputs))
    if method == "auto":
        method = chosen_method(model, x, chosen, kwargs)
    spectrum = spectrum_of(model, x, chosen, kwargs, method, iterations, seed)
    if not np.isfinite(spectrum.spectral_norm).all():
        raise ValueError(
            f"{NAME} expects examples at which the Jacobian is finite. Received: NaN or infinity in the Jacobian of "
            f"{int((~np.isfinite(spectrum.spectral_norm)).sum())} of {len(spectrum.spectral_norm)} examples."
        )
    return spectrum


def require_float_examples(name, x):
    """Returns `x` as tensors, and raises `ValueError` unless they are examples with floating-point values."""
    tensors = chosen_inputs.as_tensors(x, f"{name} expects tensors or arrays as `x`")
    chosen = chosen_inputs.choose(name, None, tensors, None)
    if all(len(part.shape) < 2 for part in chosen.parts(tensors)):
        chosen_inputs.require_batch_size(name, chosen, tensors, rank=2)
    return tensors


def require_inputs(name, model, x, names):
    """Returns the `ChosenInputs` for some names and examples as tensors; raises `ValueError` if they do not fit."""
    chosen = chosen_inputs.choose(name, model, x, names)
    chosen_inputs.require_batch_size(name, chosen, x, rank=2)
    return chosen


def outputs_of(name, model, x, chosen, kwargs):
    """The outputs of a model, flattened to a list."""
    body = functools.partial(_outputs, chosen)
    return compiled.run(name, model, body, ("outputs", chosen), (x,), kwargs)[0]


def chosen_method(model, x, chosen, kwargs):
    """The method that `"auto"` stands for."""
    outputs = outputs_of(NAME, model, x, chosen, kwargs)
    n, m = (sum(math.prod(a.shape[1:]) for a in tensors) for tensors in (chosen.parts(x), outputs))
    is_small = outputs[0].shape[0] * n * m <= _MOST_NUMBERS and min(n, m) <= _MOST_VALUES
    return "explicit" if is_small else "implicit"


def spectrum_of(model, x, chosen, kwargs, method, iterations=ITERATIONS, seed=0):
    """The `JacobianSpectrum` by the given method. It is NaN where the Jacobian of an example is not finite."""
    if method == "explicit":
        return _explicit(model, x, chosen, kwargs)
    return _implicit(model, x, chosen, kwargs, iterations, seed)


def _explicit(model, x, chosen, kwargs):
    blocks = batch_jacobian(model, inputs=chosen.positions)(x, **kwargs)
    parts = chosen.parts(x)
    count, structure = parts[0].shape[0], len(parts)
    # One block row for each output, with one block for each input.
    flat = [numbers(block) for block in nesting.flatten(blocks) if block is not None]
    inputs = [math.prod(a.shape[1:]) for a in parts] * (len(flat) // structure)
    flat = [block.reshape(count, -1, n) for block, n in zip(flat, inputs, strict=True)]
    rows = [np.concatenate(flat[i : i + structure], axis=2) for i in range(0, len(flat), structure)]
    jacobian = np.concatenate(rows, axis=1)
    is_finite = np.isfinite(jacobian).all(axis=(1, 2))
    values = np.full((count, min(jacobian.shape[1:])), np.nan)
    values[is_finite] = np.linalg.svd(jacobian[is_finite], compute_uv=False)
    return JacobianSpectrum(values[:, 0], np.sqrt((values**2).sum(axis=1)), values)


def _implicit(model, x, chosen, kwargs, iterations, seed):
    random = np.random.default_rng(seed)
    inputs = chosen.parts(x)
    outputs = outputs_of(NAME, model, x, chosen, kwargs)
    count = inputs[0].shape[0]
    n, m = (sum(math.prod(a.shape[1:]) for a in tensors) for tensors in (inputs, outputs))

    start = random.standard_normal((count, n))
    v = split(start / np.linalg.norm(start, axis=1, keepdims=True), inputs)
    u = [ops.zeros_like(y) for y in outputs]
    beta = ops.zeros((count,), dtype=inputs[0].dtype)
    steps = min(iterations, n, m)
    # U^T J = B V^T, where B has one more column than rows. Without that column, the norm is too small for n > m.
    bidiagonal = np.zeros((count, steps, steps + 1))
    for i in range(steps):
        step = functools.partial(_bidiagonalize, chosen)
        (u, v, alpha, beta), _ = compiled.run(NAME, model, step, ("step", chosen), (x, v, u, beta), kwargs)
        bidiagonal[:, i, i] = numbers(alpha)
        bidiagonal[:, i, i + 1] = numbers(beta)
    is_finite = np.isfinite(bidiagonal).all(axis=(1, 2))
    largest = np.full(count, np.nan)
    largest[is_finite] = np.linalg.svd(bidiagonal[is_finite], compute_uv=False)[:, 0]

    # A random orthonormal frame, the same for all examples, in the smaller of the input and output spaces.
    smaller, like, body = (m, outputs, _squared_vjp) if m <= n else (n, inputs, _squared_jvp)
    directions = min(iterations, smaller)
    frame, _ = np.linalg.qr(random.standard_normal((smaller, directions)))
    total = 0.0
    for direction in frame.T:
        along = split(np.broadcast_to(direction, (count, smaller)), like)
        product = functools.partial(body, chosen)
        total = total + numbers(compiled.run(NAME, model, product, (body.__name__, chosen), (x, along), kwargs)[0])
    return JacobianSpectrum(largest, np.sqrt(total * (smaller / directions)), None)


# --- Functions to compile. They take the chosen inputs, a model, its examples and vectors for each example. ---


def _outputs(chosen, fun, x, **kwargs):
    return nesting.flatten(taped(NAME, chosen, fun, x, kwargs).value), None


def taped(name, chosen, fun, x, kwargs):
    """A call of `fun` on `x`, recorded as a function of the list of the chosen inputs."""
    return TapedCall(name, chosen.function(fun, x), (chosen.parts(x),), kwargs)


def _bidiagonalize(chosen, fun, x, v, u, beta, **kwargs):
    """One step: J v = alpha u' + beta u and J^T u' = alpha v + beta' v', where u, v, u' and v' have length 1."""
    call = taped(NAME, chosen, fun, x, kwargs)
    call.tape.keeps_graph = True
    forward = nesting.flatten(call.jvp(v))
    u, alpha = normalized([p - scaled(beta, old) for p, old in zip(forward, u, strict=True)])
    back = nesting.flatten(call.vjp(nesting.pack_as(call.target, u)))
    v, beta = normalized([p - scaled(alpha, old) for p, old in zip(back, v, strict=True)])
    return (u, v, alpha, beta), None


def _squared_vjp(chosen, fun, x, u, **kwargs):
    call = taped(NAME, chosen, fun, x, kwargs)
    return squares(nesting.flatten(call.vjp(nesting.pack_as(call.target, u), is_last=True))), None


def _squared_jvp(chosen, fun, x, v, **kwargs):
    call = taped(NAME, chosen, fun, x, kwargs)
    call.tape.keeps_graph = True
    return squares(nesting.flatten(call.jvp(v))), None
