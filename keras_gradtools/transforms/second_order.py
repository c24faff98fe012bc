"""Second derivatives of functions: Hessians, and products with them and with the Gauss-Newton matrix."""

import math
import operator
from typing import Any, NamedTuple

from keras import ops

from keras_gradtools import backend, jacobians, nesting, validation, vectors
from keras_gradtools.transforms.first_order import grad, require_tuple
from keras_gradtools.transforms.jacobians import Jacobian, Options
from keras_gradtools.transforms.taped_call import TapedCall, require_argnums, require_function, require_scalar


def hessian(fun, argnums=0, chunk_size=None, has_aux=False):
    r"""Turns a function into its Hessian, $H_{k i j} = \partial^2 f_k / \partial x_i \partial x_j$.

    Called eagerly, it is compiled and kept, as `jacobian` is.

    Args:
        fun: a function that returns one scalar tensor, or real floating-point tensors in any nesting.
        argnums: the position of the argument to differentiate by, or a tuple of positions. These arguments are
            real floating-point tensors, variables, arrays or Python floats, in any nesting.
        chunk_size: how many columns (rows) to compute at once; all by default. It bounds the memory and changes no
            value; each chunk evaluates `fun` anew where it is compiled.
        has_aux: as for `jacobian`.

    Returns:
        A function with the arguments of `fun` that returns the Hessian, or `(hessian, aux)` if `has_aux`. Of a scalar
        by one tensor it is a tensor of shape `(*in, *in)`; by a nested argument (or several), the structure of it,
        each entry again in that structure, of shape `(*in_i, *in_j)`: see `flatten_hessian`. Of anything else it is
        in the structure of what `fun` returns, each entry such a Hessian, of shapes `(*out, *in_i, *in_j)`. Zeros
        where nothing is connected.

    Raises:
        ValueError: as `jacobian`.

    Cost:
        For each output, `n` vectorized products with the Hessian, about two gradients each; memory of `n` gradients for
        each output, with `chunk_size` in the place of `n`.

    Example:

    >>> import keras_gradtools as kg
    >>> from keras import ops
    >>> rosenbrock = lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
    >>> h = kg.hessian(rosenbrock)(ops.convert_to_tensor([-1.0, 2.0]))
    >>> [[float(d) for d in row] for row in h]
    [[402.0, 400.0], [400.0, 200.0]]

    Source: TensorFlow's guide "Advanced automatic differentiation", section "Example: Hessian".
    """
    require_function("hessian", fun)
    require_argnums("hessian", argnums)
    argnums = tuple(argnums) if isinstance(argnums, list) else argnums
    validation.require_flag("hessian", "has_aux", has_aux)
    # A derivative has more elements than its argument, unless it is that of a scalar.
    mode = "auto" if backend.HESSIAN_MODE == "reverse" else "forward"
    chunk_size = jacobians.checked_chunk_size(chunk_size)
    return Jacobian(fun, Options("hessian", argnums, mode, chunk_size, bool(has_aux), of_derivative=True)).as_function()


class FlatHessian(NamedTuple):
    """A Hessian as one matrix, and where in it the entries of the argument are."""

    matrix: Any
    slices: Any


def flatten_hessian(blocks):
    r"""Joins the blocks of a Hessian by several tensors into one matrix of shape `(n, n)`.

    With $n_i$ the number of elements of the $i$-th tensor, its elements have the rows and columns from
    $\sum_{j < i} n_j$ on, in the order of `keras.ops.reshape(x, -1)`.

    Args:
        blocks: what `hessian` returns of a scalar function: for an argument of some nesting, that nesting of itself,
            the block of the i-th and j-th tensors of shape `(*in_i, *in_j)`. None for what has no derivative is left
            out.

    Returns:
        A named tuple `(matrix, slices)`: the matrix, and a slice for each tensor, in the structure of the argument.
        `keras.ops.reshape(vector[s], x.shape)` takes the part of `x` out of a vector of length `n`.

    Raises:
        ValueError: if `blocks` are not those of a Hessian.

    Cost:
        A copy of the blocks.

    Example:

    >>> import keras_gradtools as kg
    >>> blocks = kg.hessian(lambda p: p["a"] ** 2 * p["b"])({"a": 3.0, "b": 5.0})
    >>> matrix, slices = kg.flatten_hessian(blocks)
    >>> [[float(d) for d in row] for row in matrix], slices
    ([[10.0, 6.0], [6.0, 0.0]], {'a': slice(0, 1, None), 'b': slice(1, 2, None)})

    Source: TensorFlow's guide "Advanced automatic differentiation", the "careful concatenation and slicing" that it
    warns of.
    """
    argument = _like_the_argument(blocks)
    flat = [block for block in nesting.flatten(blocks) if block is not None]
    number = math.isqrt(len(flat))
    rows = [flat[i * number : (i + 1) * number] for i in range(number)]
    shapes = [_half(rows[i][i]) for i in range(number)]
    sizes = [math.prod(shape) for shape in shapes]
    for row, a in zip(rows, shapes, strict=True):
        for block, b in zip(row, shapes, strict=True):
            validation.require_shape(block, (*a, *b), "Each block of a Hessian", "its two arguments")
    matrix = ops.concatenate(
        [
            ops.concatenate([ops.reshape(b, (m, n)) for b, n in zip(row, sizes, strict=True)], axis=1)
            for row, m in zip(rows, sizes, strict=True)
        ],
        axis=0,
    )
    starts = [sum(sizes[:i]) for i in range(number)]
    slices = [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    given = iter(slices)
    return FlatHessian(matrix, nesting.map_structure(lambda row: None if row is None else next(given), argument))


def _like_the_argument(blocks):
    """A branch of `blocks` that is nested as the argument is, None where that has no derivative.

    In each place of the argument there is such a branch, so that it is the first one of some depth.
    """
    branch = blocks
    while branch is not None:
        expected = nesting.map_structure(lambda block: None if block is None else branch, branch)  # noqa: B023
        are_none = ([block is None for block in nesting.flatten(x)] for x in (expected, blocks))
        if nesting.same_structure(expected, blocks) and operator.eq(*are_none):
            return branch
        branch = next((entry for entry in nesting.entries(branch) if entry is not None), None)
    raise ValueError(
        "flatten_hessian takes the blocks that `hessian` returns, a nesting of itself. Received: the structure "
        f"{nesting.outline(blocks)}."
    )


def _half(block):
    shape = tuple(getattr(block, "shape", ()))
    half = shape[: len(shape) // 2]
    if not ops.is_tensor(block) or shape != half * 2:
        raise ValueError(
            "flatten_hessian takes the blocks that `hessian` returns of a scalar function: on the diagonal of shape "
            f"`(*in, *in)`. Received: {validation.describe(block)}."
        )
    return half


def hvp(fun, primals, tangents):
    r"""Returns the product of a Hessian with a vector, $H v = \nabla (\nabla f \cdot v)$, without the Hessian.

    Args:
        fun: a function of `primals` that returns one scalar tensor.
        primals: a tuple of the arguments: real floating-point tensors, variables, arrays or Python floats, in any
            nesting.
        tangents: the vector $v$, a tuple in the structure and shapes of `primals`; None stands for
            zeros, also for a whole primal.

    Returns:
        A tuple in the structure and shapes of `primals`, zeros where nothing is connected.

    Raises:
        ValueError: if `fun` does not return a scalar, a primal has no gradient, or a tangent not the structure and
            shape of its primal.

    Cost:
        About two to three gradients: forward over reverse on JAX, reverse over reverse elsewhere, as measured in
        docs/benchmarks.md. For many products at one point use `linearize(grad(fun), *primals)`.

    Example:

    >>> import keras_gradtools as kg
    >>> from keras import ops
    >>> rosenbrock = lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
    >>> (product,) = kg.hvp(rosenbrock, (ops.convert_to_tensor([-1.0, 2.0]),), (ops.convert_to_tensor([1.0, 0.0]),))
    >>> [float(d) for d in product]
    [402.0, 400.0]

    Source: Pearlmutter, "Fast exact multiplication by the Hessian" (1994), equation 3.
    """
    require_function("hvp", fun)
    primals = require_tuple("hvp", "primals", primals)
    tangents = require_tuple("hvp", "tangents", tangents)
    every = tuple(range(len(primals)))
    call = TapedCall("hvp", grad(fun, every), primals, argnums=every)
    if backend.HESSIAN_MODE == "forward" or call.record.has_custom_gradient:
        return call.push(tangents)
    # A Hessian is its own transpose, if no custom gradient has made a field of it that is no gradient.
    tangents = vectors.like(tangents, call.sources, "tangents", "`primals`", vectors.zeros)
    return call.pull(vectors.pack_as(call.sources, tangents), is_last=True)


def ggnvp(model_fun, loss_fun, primals, tangents):
    r"""Returns the product of the generalized Gauss-Newton matrix with a vector, $J^\top H_\ell J v$.

    $J$ is the Jacobian of `model_fun` at `primals`, and $H_\ell$ the Hessian of `loss_fun` at its output. For a
    loss that is convex in the output the matrix is positive semi-definite, and for the losses of an exponential
    family it is the Fisher matrix.

    Args:
        model_fun: a function of `primals` that returns tensors, in any nesting.
        loss_fun: a function of what `model_fun` returns that returns one scalar tensor.
        primals: a tuple of the arguments: real floating-point tensors, variables, arrays or Python floats, in any
            nesting.
        tangents: the vector $v$, a tuple in the structure and shapes of `primals`; None stands for
            zeros, also for a whole primal.

    Returns:
        A tuple in the structure and shapes of `primals`, zeros where nothing is connected.

    Raises:
        ValueError: if `loss_fun` does not return a scalar, a primal has no gradient, or a tangent not the structure
            and shape of its primal.

    Cost:
        About five thirds of a gradient of `loss_fun(model_fun(...))` on a backend that compiles, seven thirds on
        torch.

    Example:

    >>> import keras_gradtools as kg
    >>> (product,) = kg.ggnvp(lambda x: x * x, lambda y: y * y, (3.0,), (1.0,))  # (2 x) 2 (2 x)
    >>> float(product)
    72.0

    Source: Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent" (2002), section 3.
    """
    require_function("ggnvp", model_fun)
    require_function("ggnvp", loss_fun)
    primals = require_tuple("ggnvp", "primals", primals)
    tangents = require_tuple("ggnvp", "tangents", tangents)
    model = TapedCall("ggnvp", model_fun, primals, argnums=tuple(range(len(primals))))
    pushed = model.push(tangents)

    def loss_of(out):
        value = loss_fun(out)
        require_scalar("ggnvp", value)
        return value

    (curved,) = hvp(loss_of, (model.value,), (pushed,))
    return model.pull(curved, is_last=True)
