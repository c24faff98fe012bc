"""`Backend`, the base class of the adapters: its methods are the kernels, and their docstrings the contract.

A method without a body differs between all frameworks. The others have the body that most frameworks share.
"""

import abc
import contextlib
import functools
import itertools
import os
from typing import Any

import numpy as np
from keras import ops

from keras_gradtools.backend import chunks
from keras_gradtools.blocks import Block

# Number of elements that are summed first in the dot product of two long vectors.
_PART = 2**12


class Backend(abc.ABC):
    """The kernels of one framework.

    Kernels take flat lists of differentiable tensors and Keras variables. Nested structures, defaults and checks of
    arguments are handled once for all backends, in `tape/` and above.

    `pullback` returns None for a source, and `pushforward` for a target, that no recorded operation connects with the
    other side. Every cotangent has the shape and dtype of its target, every tangent those of its source, and the
    gradient of a variable those of the variable. All other tapes that are recording record the computation of the
    results.
    """

    # A subclass of `recording.Recording`, made by `Tape(watch_accessed_variables)`.
    Tape: Any = None

    # What `jit` takes as `compiler` besides None.
    COMPILERS: tuple = ()
    # The faster mode for Hessians, "forward" or "reverse", as measured.
    HESSIAN_MODE = "reverse"
    # Whether `linearize` is faster than a compiled product.
    LINEARIZES_ONCE = False
    # Whether `keras.ops.while_loop` is part of a compiled program, and faster than a loop of Python.
    COMPILES_LOOPS = False

    # Whether a compiled program may round a product and its sum with something else only once.
    CONTRACTS_PRODUCTS = False

    # Whether the same tensor always has the same values, even if it was read from a variable that has changed since.
    HAS_IMMUTABLE_TENSORS = False
    # Dot products of longer vectors are not summed in double precision, which takes several times as long.
    LONG = 2**16

    # The axis of the directions in a stack of derivatives, 0 or 1, as measured. See `transforms/taylor/stacks.py`.
    STACK_AXIS = 0

    # Whether a loop over chunks of directions that fit the caches is not slower, as measured, if it is differentiated.
    CHUNKS_ALWAYS_PAY = False

    # Derivatives of a tape.

    @abc.abstractmethod
    def pullback(self, tape, targets, sources, cotangents):
        """Reverse mode: `sum_k J_k' u_k` for every source."""

    @abc.abstractmethod
    def constant_pullback(self, tape, targets, sources, cotangents):
        """As `pullback`, but the results are constants for all other tapes."""

    @abc.abstractmethod
    def pullback_batch(self, tape, targets, sources, cotangents):
        """As `pullback`, for a stack of cotangents along axis 0."""

    def kept(self, tape, target, sources, key, compute):
        """`compute(tape)`, a list of tensors and None, which may be computed by a program that is kept for other tapes.

        `compute` calls `pullback_batch` with the tape that it is given, and uses nothing else of it. What it computes
        otherwise depends only on `key` and on the shapes and dtypes of target and sources.
        """
        return compute(tape)

    @abc.abstractmethod
    def pushforward_batch(self, tape, targets, sources, tangents):
        """As `pushforward`, for a stack of tangents along axis 0."""

    @abc.abstractmethod
    def linearize(self, tape, targets, sources, is_symmetric=False):
        """Returns `tangents -> pushforward`. What does not depend on the tangents is computed only once.

        With `is_symmetric`, a vjp may take the place of a jvp.
        """

    def pushforward(self, tape, targets, sources, tangents):
        """Forward mode: `sum_i J_i v_i` for every target."""
        return self.linearize(tape, targets, sources)(tangents)

    # Steps of forward passes that carry several derivatives, see `steps`.

    def operations(self):
        """A block in which a call can be recorded, as well as by a tape, so that `steps_between` can split it."""
        return Block()

    def steps_between(self, tape, operations, targets, sources):
        """Returns `(steps, target slots, source slots)`, in the order in which the operations ran.

        A slot is None where nothing connects targets with sources. Returns None if the framework cannot take the call
        apart. `operations` is the block in which the tape recorded.
        """
        return None

    # Transforms of functions.

    @abc.abstractmethod
    def per_example_gradients(self, fun, weights, examples, must_vectorize=False):
        """The gradients of `fun(weights, example) -> (value, auxiliary tensors)` for each example.

        Returns two lists: the gradients for `weights`, and the auxiliary tensors, both with the examples along axis 0.
        With `must_vectorize`, the framework's error is raised where it cannot vectorize `fun`.
        """

    @abc.abstractmethod
    def custom_gradient(self, fun):
        """A function with its own gradient, from `fun(*args) -> (values, grad_fn)`.

        The gradient can be differentiated again. What `grad_fn` closes over counts.
        """

    @abc.abstractmethod
    def jit(self, fun, compiler=None):
        """`fun`, compiled, by one of `COMPILERS` or in the usual way. Variables are its state.

        If the function that is returned has an attribute `refusal`, this is why it runs eagerly, or None. If it has a
        method `repeat(args)`, this is a faster way for arguments with the structure, shapes and dtypes of the last
        call. It returns the result as a list of one, or None if the arguments are others or have a Keras mask.
        """

    def compiled_step(self, fun, compiler=None):
        """`fun`, a training, test or prediction step of `fit`, compiled where Keras cannot compile it itself.

        `compiler` is one of `COMPILERS`, or None for the usual way.
        """
        return fun

    def is_recording_values(self):
        """Whether a call that computes values is being compiled, so that Python must not read them."""
        return False

    def may_compile(self):
        """Whether a function that is called here may be compiled."""
        return False

    def depends_on_values(self, error):
        """Whether `error` says that a function could not be traced because Python needs values."""
        return False

    def tried(self, fun):
        """Runs `fun()`, or only traces it, to see its errors."""
        fun()

    def map_chunks(self, fun, count, chunk_size):
        """`fun(indices) -> list of tensors or None` for `0 ... count - 1`, in chunks; the results are concatenated."""
        return chunks.loop(fun, count, chunk_size)

    def hoisted(self, fun, like):
        """`fun`, a function of a tensor like `like`, to be called in a loop.

        What does not depend on the tensor may be computed here, once.
        """
        return fun

    def slows_in_loops(self, fun):
        """Whether the operations of `fun()` are far slower inside a loop of a program. It is only traced."""
        return False

    # Memory.

    @abc.abstractmethod
    def computed_bytes(self, fun):
        """The bytes of all tensors that `fun() -> list of tensors` computes, views excepted. It may run, or be traced.

        The number of iterations of some loops is not known. Then one iteration counts.
        """

    def free_bytes(self):
        """The free memory of the accelerator. None if there is none, or if the framework does not know it."""
        return None

    def threads(self):
        """How many threads of the processor one operation may use. None on an accelerator."""
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    # Tensors.

    @abc.abstractmethod
    def alias(self, x):
        """A new tensor equal to `x`, as a recorded operation."""

    @abc.abstractmethod
    def containers(self):
        """The `nesting.Registry` of the containers that are registered with the framework."""

    def add_product(self, variable, factor, left, right):
        """`variable <- factor * variable + left @ right`, in the memory of the variable if the framework can.

        `factor` is a float. The others have the dtype of the variable.
        """
        factor, left, right = (ops.convert_to_tensor(x, dtype=variable.dtype) for x in (factor, left, right))
        variable.assign(self._scaled_sum(ops.convert_to_tensor(variable), factor, left, right))

    @functools.cached_property
    def _scaled_sum(self):
        # With the operators of the tensors themselves: Keras' may round to single precision.
        return self.jit(lambda x, factor, left, right: factor * x + left @ right)

    def set_row(self, variable, place, row):
        """Overwrites a row of a matrix, in the memory of the variable if the framework can."""
        place = ops.reshape(ops.convert_to_tensor(place), (1, 1))
        variable.assign(ops.scatter_update(ops.convert_to_tensor(variable), place, row[None]))

    def dot(self, a, b):
        """The dot product of two vectors, summed in double precision, in their dtype."""
        return ops.cast(ops.sum(ops.cast(a, "float64") * ops.cast(b, "float64")), a.dtype)

    def dots_and_norms(self, vectors):
        """The dot products of every two vectors, a matrix, and their norms, summed in double precision, in their dtype.

        A few operations compute all of them, which takes less time on short vectors.
        """
        rows = ops.cast(ops.stack(vectors), "float64")
        found = rows @ ops.transpose(rows)
        # The roots in double precision, since squares may exceed the range of single precision.
        return ops.cast(found, vectors[0].dtype), ops.cast(ops.diagonal(found) ** 0.5, vectors[0].dtype)

    def dots(self, pairs):
        """The dot products of pairs of vectors, of shape `(2, pairs)` in their dtype.

        The sum of both parts is the product. Vectors of up to `LONG` elements are multiplied in double precision, and
        the second part is what the first one has lost by rounding.
        """
        if pairs[0][0].shape[0] <= self.LONG:
            return self._exact_dots(pairs)
        found = ops.stack([self.long_dot(a, b) for a, b in pairs])
        return ops.stack([found, ops.zeros_like(found)])

    def _exact_dots(self, pairs):
        # One product of matrices is fewer operations than one product for each pair.
        vectors = list({id(x): x for pair in pairs for x in pair}.values())
        places = {id(x): i for i, x in enumerate(vectors)}
        stacked = ops.cast(ops.stack(vectors), "float64")
        found = ops.reshape(stacked @ ops.transpose(stacked), (-1,))
        chosen = np.array([places[id(a)] * len(vectors) + places[id(b)] for a, b in pairs], "int32")
        return in_two_parts(ops.take(found, ops.convert_to_tensor(chosen), axis=0), pairs[0][0].dtype)

    def products(self, matrices, vectors):
        """As `dots`, for each row of some matrices with each vector, of shape `(2, rows, vectors)`."""
        if vectors[0].shape[0] <= self.LONG:
            return self._exact_products(matrices, vectors)
        found = ops.stack([ops.stack([self.long_dot(a, b) for b in vectors]) for a in _rows(matrices)])
        return ops.stack([found, ops.zeros_like(found)])

    def _exact_products(self, matrices, vectors):
        right = ops.transpose(ops.cast(ops.stack(vectors), "float64"))
        found = [ops.cast(matrix, "float64") @ right for matrix in matrices]
        return in_two_parts(ops.concatenate(found), vectors[0].dtype)

    def long_dot(self, a, b):
        """The dot product of two long vectors, in their precision. Parts of them are summed first."""
        size = a.shape[0] - a.shape[0] % _PART
        sums = ops.sum(ops.reshape(a[:size] * b[:size], (-1, _PART)), axis=1)
        return ops.sum(sums) + ops.sum(a[size:] * b[size:])

    def combination(self, factors, matrices):
        """The sum of the rows of some matrices times factors of shape `(2, rows)`: the sum of both parts is the factor.

        Rows of up to `LONG` elements are added in double precision.
        """
        if matrices[0].shape[1] <= self.LONG:
            # Matrix by matrix, since a single matrix would be a copy of all.
            factors = ops.cast(factors, "float64")
            ends = list(itertools.accumulate(matrix.shape[0] for matrix in matrices[:-1]))
            parts = ops.split(ops.sum(factors, axis=0, keepdims=True), ends, axis=1)
            total = sum(part @ ops.cast(matrix, "float64") for part, matrix in zip(parts, matrices, strict=True))
            return ops.cast(total[0], matrices[0].dtype)
        # One by one, since a single matrix would be a copy of all.
        return sum(factors[0, i] * row for i, row in enumerate(_rows(matrices)))

    def held(self, variable):
        """The value of a variable, as a tensor that later assignments do not change."""
        return ops.copy(variable)

    def viewed(self, x):
        """A tensor, or an array, as a NumPy array that may share its memory and must not be changed."""
        return np.asarray(x)

    def settled(self, tensors):
        """The tensors, detached if only tapes need their graph."""
        return tensors

    # State and modes of the framework.

    def has_values(self, tensor):
        """Whether a tensor that was held still has its values. JAX deletes arrays that a compiled step takes over."""
        return True

    def in_double_precision(self):
        """A block in which tensors can be cast to double precision, and operations keep it."""
        return contextlib.nullcontext()

    def eagerly(self):
        """A block that runs eagerly, even inside a trace."""
        return contextlib.nullcontext()

    def modes_kept(self):
        """A block that restores the framework's modes, for frameworks with modes that outlive an error."""
        return Block()

    def can_make_variables(self):
        """Whether variables can be created here."""
        return True

    def assigns_at_once(self):
        """Whether a training step assigns to variables immediately."""
        return True

    def random_state(self):
        """The state of random generators other than Keras' seeds. None if there are none."""
        return None

    def with_random_state(self, state):
        """A block in which those generators have this state."""
        return contextlib.nullcontext()

    # Training on several devices.

    @abc.abstractmethod
    def train_function(self, model, step):
        """What `fit` calls, made from a Python function `step(batch) -> logs`."""

    def can_step_directly(self, model):
        """Whether a training step may run outside of Keras' training loop: on one device, and not inside that loop."""
        return True

    def spread(self, x):
        """`x`, distributed over the devices of a data layout."""
        return x

    def why_single_precision(self):
        """Why the framework computes in single precision only, and what to do. None if it does not."""
        return None

    def is_shared_by_replicas(self, batch, variable):
        """Whether several replicas share the batch. `variable` is any variable of the model."""
        return False

    def summed_over_replicas(self, fun, batch, variable):
        """The sum of `fun(part)` over the replicas' parts of the batch."""
        return fun(batch)

    def replica_results(self, fun, batch, variable):
        """The list of `fun(part)` for each replica's part of the batch."""
        return [fun(batch)]

    def is_true_in_all_processes(self, condition):
        """Whether a bool is true in all processes that train together, each of which has to ask."""
        return condition

    def summed_over_processes(self, totals, count):
        """Tensors and a count, summed over all processes."""
        return totals, count


def in_two_parts(x, dtype):
    """Numbers in double precision as the sum of two tensors of a dtype, stacked."""
    if dtype == x.dtype:
        return ops.stack([x, ops.zeros_like(x)])
    rounded = ops.cast(x, dtype)
    return ops.stack([rounded, ops.cast(x - ops.cast(rounded, "float64"), dtype)])


def _rows(matrices):
    return [matrix[i] for matrix in matrices for i in range(matrix.shape[0])]
