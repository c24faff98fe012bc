"""Differential operators on fields: the Laplacian and the divergence at each example."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Concatenate

import keras
from keras import ops

from keras_gradtools import validation
from keras_gradtools.annotations import Arguments, ChunkSize, Tensor
from keras_gradtools.transforms import compiled
from keras_gradtools.transforms.jacobians import require_rows
from keras_gradtools.transforms.taped_call import require_function, require_points
from keras_gradtools.transforms.taylor.chunks import Chunks
from keras_gradtools.transforms.taylor.operators import (
    divergence_estimate_of,
    divergence_of,
    laplacian_estimate_of,
    laplacian_of,
)
from keras_gradtools.transforms.taylor.sampling import Distribution, require_sampling


def laplacian(
    fun: Callable[Concatenate[Tensor, Arguments], Any],
    axes: Sequence[int] | None = None,
    coefficients: Any = None,
    chunk_size: ChunkSize = "auto",
    samples: int | None = None,
    directions: Distribution = "rademacher",
    seed: int | keras.random.SeedGenerator | None = None,
    return_standard_error: bool = False,
    memory_budget: int | None = None,
) -> Callable[Concatenate[Tensor, Arguments], Any]:
    r"""Turns a function of points into its Laplacian, $\sum_i \partial^2 f_{b k} / \partial x_{b i}^2$.

    With coefficients, $\sum_{i j} D_{i j} \partial^2 f_{b k} / \partial x_{b i} \partial x_{b j}$, the second-order
    part of anisotropic diffusion. One pass carries the value, the first derivatives along all axes, and the sum of the
    second ones. No Hessian is formed. The examples must be independent, which is not checked. It is compiled and cached
    as for `jacobian`.

    With `samples`, for many axes, it returns an unbiased estimate from S random directions $v_s$ instead, the mean of
    $v_s^\top D \, \nabla^2 f_{b k} \, v_s$. All examples of a call get the same directions. The square of a residual,
    $(\text{estimate} - g)^2$, is on average too large by the variance of the estimate. Without this bias it is
    $(\text{estimate} - g)^2 - \sigma^2$, with the standard error $\sigma$.

    Args:
        fun: A function or a Keras model of `(x, ...)`, with `x` of shape `(batch, n)`, that returns one tensor of shape
            `(batch, ...)`.
        axes: The indices of the inputs to sum over, as a list. Negative indices count from the end. By default all n
            inputs. `[0]` gives $\partial^2 f / \partial x_0^2$.
        coefficients: The numbers $D_{i j}$ for the m axes, a tensor of shape `(m,)` (the diagonal), `(m, m)`, or
            `(batch, m, m)` for each example its own. They need not be symmetric. By default the identity.
        chunk_size: Number of axes, or of random directions, whose first derivatives are computed at once, or None for
            all. The result is the same up to rounding. By default `"auto"`: as many as fit into `memory_budget` and,
            on a processor, into its caches, which is faster. On TensorFlow and JAX, the caches count only if the
            Laplacian is compiled automatically and is not differentiated. If the batch size is not known, as in `fit`
            on TensorFlow, all.
        samples: The number of random directions. By default None, for the exact Laplacian.
        directions: `"rademacher"`, vectors of random signs, which are exact for functions without mixed derivatives.
            `"gaussian"`, normal numbers. `"coordinates"`, axes that are drawn without replacement, which are exact if
            all second derivatives are equal, or all axes are drawn.
        seed: An integer, which draws the same directions at each call, or a `keras.random.SeedGenerator`, which draws
            new ones. By default Keras' global generator. Transforms other than `kg.jit` do not advance generators.
        return_standard_error: Whether to return the pair `(estimate, standard_error)`, from at least 2 samples.
        memory_budget: The number of bytes that a chunk may take, with `chunk_size="auto"`. By default a quarter of the
            memory that is free at the first call. At least one axis is carried at once. The memory of an axis is
            estimated from above, as twice the size of all tensors that `fun` computes. If the Laplacian is
            differentiated, what all chunks have computed is kept.

    Returns:
        A function with the arguments of `fun` that returns the Laplacian with respect to the first, in the shape of the
        output of `fun`. It can be differentiated again, also with respect to `coefficients`.

    Raises:
        ValueError: For invalid options. When called, if `x` does not have the shape `(batch, n)`, n is not known, or an
            axis does not exist, or `coefficients` has another shape, or there are fewer coordinates than `samples`.

    Cost:
        Counted in linear operations, which are most of the work in a network: for m axes m + 2 evaluations of `fun`,
        for any number of outputs, and 2 m + 2 with a matrix of coefficients. In memory, m first derivatives of each
        intermediate value. An estimate has S directions in place of the m axes, and takes 2 S + 1 evaluations with the
        standard error.

    Example:

    >>> import keras_gradtools as kg
    >>> from keras import ops
    >>> x = ops.convert_to_tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> f = lambda x: x[:, :1] ** 3 + x[:, :1] * x[:, 1:] ** 2  # its Laplacian: 6 x + 2 x
    >>> [[float(v) for v in row] for row in kg.laplacian(f)(x)], [float(v) for v in kg.laplacian(f, axes=[1])(x)[:, 0]]
    ([[8.0], [24.0]], [2.0, 6.0])
    >>> radius = lambda x: ops.sum(x**2, axis=1)  # without mixed derivatives, so that one vector of signs is enough
    >>> float(kg.laplacian(radius, samples=1, seed=0)(ops.ones((1, 100)))[0])
    200.0

    Source: Li et al., "A computational framework for neural network-based variational Monte Carlo with forward
    Laplacian" (arXiv:2307.08214, 2023); Dangel et al., "Collapsing Taylor mode automatic differentiation"
    (arXiv:2505.13644, 2025); Hutchinson (1989) and Hu et al., "Hutchinson trace estimation for high-dimensional and
    high-order physics-informed neural networks" (arXiv:2312.14499, 2023); Shi et al., "Stochastic Taylor derivative
    estimator" (arXiv:2412.00088, 2024), for the coordinates.
    """
    require_function("laplacian", fun)
    _require_axes_at_first("laplacian", axes)
    chunk_size, memory_budget = require_rows("laplacian", chunk_size, memory_budget)
    sampling = require_sampling("laplacian", samples, directions, seed, return_standard_error)

    @functools.wraps(fun, updated=())
    def transformed(x: Tensor, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Tensor:
        x = require_points("laplacian", x)
        chosen = tuple(require_axes("laplacian", axes, x.shape[1]))
        factors = None if coefficients is None else require_coefficients("laplacian", coefficients, x, len(chosen))
        # A program would not advance the generator.
        vectors = None if sampling is None else sampling.draw("laplacian", len(chosen), seed, x.dtype)
        chunks = Chunks(chunk_size, memory_budget, is_last=compiled.may_run())
        body = functools.partial(_laplacian, chosen, chunks, sampling)
        options = chosen, chunks, sampling
        found, _ = compiled.run("laplacian", fun, body, options, (factors, vectors, x, *args), kwargs)
        return found

    return transformed


def _laplacian(axes, chunks, sampling, fun, coefficients, vectors, x, *args, **kwargs):
    def value(x):
        return fun(x, *args, **kwargs)

    if sampling is None:
        return laplacian_of(value, x, axes, coefficients, chunks)[1], None
    return laplacian_estimate_of(value, x, axes, sampling, vectors, coefficients, chunks)[1], None


def divergence(
    fun: Callable[Concatenate[Tensor, Arguments], Any],
    axes: Sequence[int] | None = None,
    chunk_size: ChunkSize = "auto",
    samples: int | None = None,
    directions: Distribution = "rademacher",
    seed: int | keras.random.SeedGenerator | None = None,
    return_standard_error: bool = False,
    memory_budget: int | None = None,
) -> Callable[Concatenate[Tensor, Arguments], Any]:
    r"""Turns a vector field into its divergence, $\nabla \cdot f_b = \sum_k \partial f_{b k} / \partial x_{b i_k}$.

    The examples must be independent, which is not checked. It is compiled and cached as for `jacobian`. With `samples`,
    for many axes, it returns an unbiased estimate from random directions instead, the mean of $v_s^\top J_b \, v_s$.

    Args:
        fun: A function or a Keras model of `(x, ...)`, with `x` of shape `(batch, n)`, that returns a tensor of shape
            `(batch, m)`.
        axes: The index of the input $i_k$ for each of the m outputs, as a list. Negative indices count from the end. By
            default all n inputs in order.
        chunk_size: Number of axes, or of random directions, whose derivatives are computed at once, `"auto"` or None,
            as for `kg.laplacian`.
        samples: The number of random directions. By default None, for the exact divergence.
        directions: `"rademacher"`, `"gaussian"` or `"coordinates"`, as for `kg.laplacian`.
        seed: An integer, a `keras.random.SeedGenerator` or None, as for `kg.laplacian`.
        return_standard_error: Whether to return the pair `(estimate, standard_error)`, from at least 2 samples.
        memory_budget: As for `kg.laplacian`.

    Returns:
        A function with the arguments of `fun` that returns the divergence with respect to the first, of shape
        `(batch, 1)`. It can be differentiated again.

    Raises:
        ValueError: For invalid options. When called, if a shape does not match, or there is not one axis per output.

    Cost:
        About m + 1 evaluations of `fun`, and S + 1 for S samples.

    Example:

    >>> import keras_gradtools as kg
    >>> from keras import ops
    >>> x = ops.convert_to_tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> [float(v) for v in kg.divergence(lambda x: ops.stack([x[:, 0] ** 2, x[:, 0] * x[:, 1]], axis=1))(x)[:, 0]]
    [3.0, 9.0]

    Source: Griewank & Walther, "Evaluating Derivatives" (2008), sections 3.1 and 3.2; Grathwohl et al., "FFJORD"
    (arXiv:1810.01367, 2018), for the estimate.
    """
    require_function("divergence", fun)
    _require_axes_at_first("divergence", axes)
    chunk_size, memory_budget = require_rows("divergence", chunk_size, memory_budget)
    sampling = require_sampling("divergence", samples, directions, seed, return_standard_error)

    @functools.wraps(fun, updated=())
    def transformed(x: Tensor, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Tensor:
        x = require_points("divergence", x)
        chosen = tuple(require_axes("divergence", axes, x.shape[1]))
        vectors = None if sampling is None else sampling.draw("divergence", len(chosen), seed, x.dtype)
        chunks = Chunks(chunk_size, memory_budget, is_last=compiled.may_run())
        body = functools.partial(_divergence, chosen, chunks, sampling)
        found, _ = compiled.run("divergence", fun, body, (chosen, chunks, sampling), (vectors, x, *args), kwargs)
        return found

    return transformed


def _divergence(axes, chunks, sampling, fun, vectors, x, *args, **kwargs):
    def value(x):
        return fun(x, *args, **kwargs)

    if sampling is None:
        return divergence_of(value, x, axes, chunks)[1], None
    return divergence_estimate_of(value, x, axes, sampling, vectors, chunks)[1], None


def _require_axes_at_first(name, axes):
    if axes is not None:
        require_axes(name, axes, advice=f"`{name}` returns a function of the arguments: `{name}(fun)(x)`.")


def require_axes(name, axes, size=None, advice=""):
    """Returns `axes` as a list. Raises `ValueError` if an axis is repeated or does not exist.

    With `size`, the number of axes, None means all axes, and the returned indices are not negative.
    """
    given = range(size) if axes is None and size is not None else axes
    right = isinstance(given, (list, tuple, range)) and len(given) > 0
    low, high = (-math.inf, math.inf) if size is None else (-size, size)
    if right and all(validation.is_count(i, low) and i < high for i in given):
        found = [int(i) if size is None else int(i) % size for i in given]
        if len(set(found)) == len(found):
            return found
    below = "" if size is None else f" below {size}"
    raise validation.refused(name, f"a list of distinct axis indices{below}, or None for all,", "axes", axes, advice)


def require_coefficients(name, coefficients, x, count):
    """Returns `coefficients` as a tensor. Raises `ValueError` unless its shape is that of `count` axes of `x`."""
    found = validation.as_tensor(coefficients, f"{name} expects `coefficients` as a tensor", x.dtype)
    validation.require_differentiable(found, f"`coefficients` of {name}")
    shape = tuple(found.shape)
    if shape not in ((count,), (count, count)) and not (len(shape) == 3 and shape[1:] == (count, count)):
        raise validation.refused(
            name,
            f"a tensor of shape ({count},), ({count}, {count}) or (batch, {count}, {count})",
            "coefficients",
            found,
        )
    if len(shape) == 3 and None not in (shape[0], x.shape[0]) and shape[0] != x.shape[0]:
        raise ValueError(
            f"{name} expects `coefficients` of one matrix for each of the {x.shape[0]} examples. Received: "
            f"{validation.describe(found)}."
        )
    return ops.cast(found, x.dtype)
