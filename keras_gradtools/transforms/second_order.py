"""Second derivatives of functions: Hessians, Hessian-vector products and Gauss-Newton-vector products."""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

from keras import ops

from keras_gradtools import backend, nesting, validation
from keras_gradtools.annotations import Arguments, ChunkSize, Function, Nested, Tensor
from keras_gradtools.tape import vectors
from keras_gradtools.transforms.first_order import gradient_named, require_tuple
from keras_gradtools.transforms.jacobians import Jacobian, Options, require_rows
from keras_gradtools.transforms.taped_call import TapedCall, require_argnums, require_function, require_scalar


def hessian(
    fun: Callable[Arguments, Any],
    argnums: int | Sequence[int] = 0,
    chunk_size: ChunkSize = None,
    has_aux: bool = False,
    memory_budget: int | None = None,
) -> Callable[Arguments, Any]:
    r"""Turns a function into its Hessian, $H_{k i j} = \partial^2 f_k / \partial x_i \partial x_j$.

    An eager call is compiled and cached, as for `jacobian`. A warning is given, once, if all second derivatives are
    zero because the function is piecewise linear (ReLU).

    Args:
        fun: A function that returns one scalar tensor, or real floating-point tensors in any nested structure.
        argnums: The position of the argument to differentiate with respect to, or a tuple of positions. These
            arguments are real floating-point tensors, variables, arrays or Python floats, in any nested structure.
        chunk_size: Number of columns (or rows) of the Hessian to compute at once. By default all. Smaller chunks need
            less memory. The result is the same. In a compiled Hessian every chunk evaluates `fun` again. With `"auto"`,
            as many as fit into `memory_budget`.
        has_aux: As for `jacobian`.
        memory_budget: As for `jacobian`.

    Returns:
        A function with the arguments of `fun` that returns the Hessian, or `(hessian, aux)` with `has_aux`.

        - One scalar output, one tensor argument: a tensor of shape `(*in, *in)`.
        - One scalar output, a nested argument (or several): the structure of the argument, in which each entry has
          that structure again, with leaves of shape `(*in_i, *in_j)`. `flatten_hessian` joins them into one matrix.
        - Any other output: the structure of the output, in which each entry is such a Hessian, with leaves of shape
          `(*out, *in_i, *in_j)`.

        Unconnected arguments get zeros.

    Raises:
        ValueError: As `jacobian`.

    Cost:
        For each output, `n` vectorized Hessian-vector products of about two gradients each, and the memory of `n`
        gradients. With `chunk_size`, the memory of `chunk_size` gradients.

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
    has_aux = validation.require_flag("hessian", "has_aux", has_aux)
    # The derivative has at least as many elements as the argument, so forward mode never needs more directions.
    mode = "auto" if backend.HESSIAN_MODE == "reverse" else "forward"
    chunk_size, memory_budget = require_rows("hessian", chunk_size, memory_budget)
    options = Options("hessian", argnums, mode, chunk_size, has_aux, memory_budget, of_derivative=True)
    return Jacobian(fun, options).as_function()


def flatten_hessian(blocks: Nested) -> tuple[Tensor, Callable[[Tensor], Nested]]:
    r"""Joins the blocks of a Hessian with respect to several tensors into one matrix of shape `(n, n)`.

    The elements of the $i$-th tensor, in the order of `keras.ops.reshape(x, -1)`, have the rows and columns that
    begin at $\sum_{j < i} n_j$, where $n_j$ is the number of elements of the $j$-th tensor.

    Args:
        blocks: What `hessian` returns for a scalar function: the structure of the argument, in which each entry has
            that structure again. The block of the i-th and j-th tensors has the shape `(*in_i, *in_j)`. None, for
            leaves without a derivative, is skipped.

    Returns:
        `(matrix, unravel)`. `unravel(vector)` takes a vector of shape `(n,)`, such as the solution of an equation with
        the matrix, and returns its parts in the structure and the shapes of the argument, with None for leaves without
        a derivative.

    Raises:
        ValueError: If `blocks` is not the Hessian of a scalar function. In `unravel`, for another shape.

    Cost:
        One copy of the blocks.

    Example:

    >>> import keras
    >>> import keras_gradtools as kg
    >>> blocks = kg.hessian(lambda p: p["a"] ** 2 * p["b"])({"a": 3.0, "b": 5.0})
    >>> matrix, unravel = kg.flatten_hessian(blocks)
    >>> [[float(d) for d in row] for row in matrix]
    [[10.0, 6.0], [6.0, 0.0]]
    >>> step = unravel(keras.ops.matmul(matrix, keras.ops.ones(2)))
    >>> float(step["a"]), float(step["b"])
    (16.0, 6.0)

    Source: TensorFlow's guide "Advanced automatic differentiation", which notes that a Hessian matrix of several
    tensors needs "careful concatenation and slicing". `unravel` is as in `jax.flatten_util.ravel_pytree`.
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
    return matrix, functools.partial(_unraveled, argument, shapes)


def _unraveled(argument, shapes, vector):
    """The parts of a vector in these shapes, in the structure of `argument`, with None where that has None."""
    sizes = [math.prod(shape) for shape in shapes]
    vector = validation.as_tensor(vector, f"unravel expects a vector of shape ({sum(sizes)},)")
    validation.require_shape(vector, (sum(sizes),), "The vector of `unravel`", "a row of the Hessian")
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    parts = iter([ops.reshape(vector[end - n : end], s) for end, n, s in zip(ends, sizes, shapes, strict=True)])
    return nesting.map_structure(lambda row: None if row is None else next(parts), argument)


def _like_the_argument(blocks):
    """The first branch of `blocks` that has the structure of the argument, with None for leaves without a derivative.

    Every leaf of the argument that has a derivative holds such a branch. Going down along first entries therefore
    reaches one, and the comparison below recognizes it.
    """
    branch = blocks
    while branch is not None:
        expected = nesting.map_structure(lambda block: None if block is None else branch, branch)  # noqa: B023
        are_none = ([block is None for block in nesting.flatten(x)] for x in (expected, blocks))
        if nesting.same_structure(expected, blocks) and operator.eq(*are_none):
            return branch
        branch = next((entry for entry in nesting.entries(branch) if entry is not None), None)
    raise ValueError(
        "flatten_hessian takes the blocks that `hessian` returns: the structure of the argument, whose entries have "
        f"that structure again. Received: the structure {nesting.outline(blocks)}."
    )


def _half(block):
    shape = tuple(getattr(block, "shape", ()))
    half = shape[: len(shape) // 2]
    if not ops.is_tensor(block) or shape != half * 2:
        raise ValueError(
            "flatten_hessian takes the blocks that `hessian` returns for a scalar function, whose diagonal blocks have "
            f"the shape `(*in, *in)`. Received: {validation.describe(block)}."
        )
    return half


def hvp(fun: Function, primals: Sequence[Nested], tangents: Sequence[Nested]) -> tuple[Nested, ...]:
    r"""Computes a Hessian-vector product, $H v = \nabla (\nabla f \cdot v)$, without forming the Hessian.

    Args:
        fun: A function of `primals` that returns one scalar tensor.
        primals: A tuple of the arguments: real floating-point tensors, variables, arrays or Python floats, in any
            nested structure.
        tangents: The vector $v$, a tuple in the structure and shapes of `primals`. None stands for zeros, also in
            place of a whole primal.

    Returns:
        A tuple in the structure and shapes of `primals`, with zeros for unconnected leaves.

    Raises:
        ValueError: If `fun` does not return a scalar, a primal cannot have a gradient, or a tangent does not have the
            structure and shape of its primal.

    Cost:
        About two to three gradients, as measured in docs/benchmarks.md: forward over reverse on JAX, reverse over
        reverse on the other backends. For many products at one point use `linearize(grad(fun), *primals)`.

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
    return _hvp("hvp", fun, require_tuple("hvp", "primals", primals), require_tuple("hvp", "tangents", tangents))


def _hvp(name, fun, primals, tangents):
    every = tuple(range(len(primals)))
    call = TapedCall(name, gradient_named(name, fun, every), primals, argnums=every)
    if backend.HESSIAN_MODE == "forward" or call.tape.has_custom_gradient:
        return call.jvp(tangents)
    # A Hessian is symmetric, so a vector-Jacobian product of the gradient gives H v. With a custom gradient the
    # field may not be the gradient of any function, and its Jacobian not symmetric.
    tangents = vectors.like(tangents, call.sources, "tangents", "`primals`", vectors.zeros)
    return call.vjp(vectors.pack_as(call.sources, tangents), is_last=True)


def ggnvp(
    model_fun: Function, loss_fun: Function, primals: Sequence[Nested], tangents: Sequence[Nested]
) -> tuple[Nested, ...]:
    r"""Computes the product of the generalized Gauss-Newton matrix with a vector, $J^\top H_\ell J v$.

    $J$ is the Jacobian of `model_fun` at `primals`, and $H_\ell$ the Hessian of `loss_fun` at its output. If the loss
    is convex in the output, the matrix is positive semi-definite. If the loss is the negative log-likelihood of an
    exponential family in its natural parameters, the matrix is the Fisher matrix.

    Args:
        model_fun: A function of `primals` that returns tensors in any nested structure.
        loss_fun: A function of the output of `model_fun` that returns one scalar tensor.
        primals: A tuple of the arguments: real floating-point tensors, variables, arrays or Python floats, in any
            nested structure.
        tangents: The vector $v$, a tuple in the structure and shapes of `primals`. None stands for zeros, also in
            place of a whole primal.

    Returns:
        A tuple in the structure and shapes of `primals`, with zeros for unconnected leaves.

    Raises:
        ValueError: If `loss_fun` does not return a scalar, a primal cannot have a gradient, or a tangent does not have
            the structure and shape of its primal.

    Cost:
        About 5/3 gradients of `loss_fun(model_fun(...))` on TensorFlow and JAX, and about 7/3 on torch.

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
    along = model.jvp(tangents)

    def loss_of(out):
        value = loss_fun(out)
        require_scalar("ggnvp", value)
        return value

    (curved,) = _hvp("ggnvp", loss_of, (model.value,), (along,))
    return model.vjp(curved, is_last=True)
