"""Per-example gradients."""

import functools
import math
from collections.abc import Callable
from typing import Any

from keras import ops

from keras_gradtools import backend, memory, nesting, validation
from keras_gradtools.annotations import Arguments, ChunkSize
from keras_gradtools.keras_state.scopes import StateScope
from keras_gradtools.tape import vectors
from keras_gradtools.transforms import auxiliary
from keras_gradtools.transforms.jacobians import require_rows
from keras_gradtools.transforms.taped_call import (
    as_result,
    differentiable_argument,
    require_function,
    require_scalar,
)


def per_example_grad(
    fun: Callable[Arguments, Any],
    argnums: int = 0,
    has_aux: bool = False,
    chunk_size: ChunkSize = None,
    memory_budget: int | None = None,
) -> Callable[Arguments, Any]:
    r"""Turns the loss of a batch into the gradient for each example, $g_b = \nabla_\theta \ell(\theta, x_b)$.

    `fun` is called with each example as a batch of one, vectorized over all examples (`vmap`). If the backend cannot
    vectorize `fun`, the examples are evaluated one by one, with a warning. Layers that mix examples, such as
    BatchNormalization in training mode, see only one example. Assignments to variables inside `fun` are discarded.

    Args:
        fun: A function `fun(weights, *batch)` that returns one scalar tensor. Each argument in `batch` consists of
            tensors or arrays of shape `(batch, ...)` in any nested structure.
        argnums: The position of the weights, by default 0. Every other argument is part of the batch. The weights are
            real floating-point tensors, variables, arrays or Python floats, in any nested structure.
        has_aux: Whether `fun` returns a pair `(value, aux)`.
        chunk_size: Number of examples to differentiate at once. By default all. Smaller chunks need less memory. With
            `"auto"`, as many as fit into `memory_budget`.
        memory_budget: The number of bytes that a chunk may take, with `chunk_size="auto"`. By default a quarter of the
            free memory. The memory of an example is estimated from above, by the size of all tensors that `fun`
            computes. The result of all examples needs memory in addition.

    Returns:
        A function with the arguments of `fun` that returns the gradients in the structure of the weights, each of
        shape `(batch, *weight)`, with zeros for unconnected weights. With `has_aux` it returns `(gradients, aux)`, in
        which each tensor of `aux` is stacked over the examples on axis 0. The function runs eagerly. Compile it with
        `jit`.

    Raises:
        ValueError: When called, if `fun` does not return a scalar, the batch sizes differ, or the weights cannot have
            a gradient.

    Cost:
        About three evaluations of `fun` on the batch, and memory for one copy of the weights per example.

    Example:

    >>> import keras_gradtools as kg
    >>> from keras import ops
    >>> loss = lambda w, x, y: ops.mean((w * x - y) ** 2)
    >>> x, y = ops.convert_to_tensor([1.0, 2.0]), ops.convert_to_tensor([0.0, 0.0])
    >>> [float(g) for g in kg.per_example_grad(loss)(3.0, x, y)]
    [6.0, 24.0]

    Source: Goodfellow, "Efficient per-example gradient computations" (2015).
    """
    require_function("per_example_grad", fun)
    if not validation.is_count(argnums, -math.inf):
        advice = "`per_example_grad` returns a function of the arguments: `per_example_grad(fun)(x)`."
        raise validation.refused("per_example_grad", "one position", "argnums", argnums, advice)

    validation.require_flag("per_example_grad", "has_aux", has_aux)
    chunk_size, memory_budget = require_rows("per_example_grad", chunk_size, memory_budget)

    @functools.wraps(fun, updated=())
    def gradients(*args, **kwargs):
        if not -len(args) <= argnums < len(args):
            expected = f"the position of the weights among the {len(args)} arguments"
            raise validation.refused("per_example_grad", expected, "argnums", argnums)
        place = argnums % len(args)
        weights = differentiable_argument("per_example_grad", place, args[place])
        batch = nesting.map_structure(_example_tensor, (*args[:place], *args[place + 1 :]))
        flat_batch = [x for x in nesting.flatten(batch) if x is not None]
        _require_one_batch_size(flat_batch)

        rest_of_aux = None

        def value(flat_weights, flat_examples):
            nonlocal rest_of_aux
            examples = iter([ops.expand_dims(x, 0) for x in flat_examples])
            given = list(nesting.map_structure(lambda x: None if x is None else next(examples), batch))
            given.insert(place, vectors.replaced(weights, flat_weights))
            scope = StateScope()
            with scope, scope:
                returned = fun(*given, **kwargs)
                result, aux = auxiliary.split("per_example_grad", returned) if has_aux else (returned, None)
                tensors, rest_of_aux = auxiliary.take_apart(auxiliary.held(aux))
                result = as_result(result)
            require_scalar("per_example_grad", result)
            validation.require_differentiable(result, "What the function under `per_example_grad` returns")
            return result, tensors

        flat_weights = vectors.differentiable(weights)
        is_empty = 0 in tuple(flat_batch[0].shape)[:1]
        if is_empty and not has_aux:
            return vectors.pack_as(weights, [ops.zeros((0, *w.shape), dtype=w.dtype) for w in flat_weights])
        if is_empty:
            # One dummy example shows the structure of `aux`.
            flat_batch = [ops.zeros((1, *x.shape[1:]), dtype=x.dtype) for x in flat_batch]
        examples_at_once = chunk_size
        if chunk_size == "auto":
            examples_at_once = _examples_that_fit(value, flat_weights, flat_batch, memory_budget)
        found, tensors = _gradients(value, flat_weights, flat_batch, examples_at_once)
        if is_empty:
            found, tensors = [x[:0] for x in found], [x[:0] for x in tensors]
        found = vectors.pack_as(weights, found)
        return (found, auxiliary.put_together(tensors, rest_of_aux)) if has_aux else found

    return gradients


def _gradients(value, weights, batch, chunk_size):
    count = ops.shape(batch[0])[0]
    if chunk_size is None or (isinstance(count, int) and chunk_size >= count):
        return backend.per_example_gradients(value, weights, batch)

    def of_chunk(index):
        # The last chunk may have indices past the end. What they give is cut off.
        rows = ops.minimum(index, count - 1)
        gradients, tensors = backend.per_example_gradients(value, weights, [ops.take(x, rows, axis=0) for x in batch])
        return [*gradients, *tensors]

    found = backend.map_chunks(of_chunk, count, chunk_size)
    return found[: len(weights)], found[len(weights) :]


def _examples_that_fit(value, weights, batch, budget):
    """The number of examples to differentiate at once. A derivative takes as much memory as the value, at most."""
    if not all(isinstance(n, int) for x in batch for n in ops.shape(x)):
        return None

    example = [x[0] for x in batch]

    def evaluated():
        result, tensors = value(weights, example)
        return [result, *tensors]

    gradients = sum(memory.bytes_of(w.shape, validation.dtype_of(w)) for w in weights)
    needed = 2 * backend.computed_bytes(evaluated) + gradients
    return max((budget or memory.budget()) // max(needed, 1), 1)


def _example_tensor(x):
    if x is None:
        return None
    return validation.as_tensor(x, "per_example_grad takes, besides the weights, tensors of shape (batch, ...)")


def _require_one_batch_size(batch):
    sizes = [x.shape[0] if len(x.shape) else "none" for x in batch]
    known = {n for n in sizes if n is not None}
    if not sizes or "none" in known or len(known) > 1:
        raise ValueError(
            "per_example_grad takes, besides the weights, tensors of shape (batch, ...) of one batch size. Received: "
            f"the shapes {[tuple(x.shape) for x in batch]}. Let the function close over values that are not per "
            "example."
        )
