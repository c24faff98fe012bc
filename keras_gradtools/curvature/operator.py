"""The base class of the curvature operators: products, summed over a data set, and what is computed from them."""

import copy
import functools
import math

import numpy as np
from keras import ops

from keras_gradtools import backend, jacobians, nesting, validation
from keras_gradtools.backend import state
from keras_gradtools.curvature import dense_memory, determinism
from keras_gradtools.curvature.batch_loss import BatchLoss, checked_model
from keras_gradtools.curvature.batches import Batches, OneBatch, batch_size_of
from keras_gradtools.curvature.diagonal import estimate_diagonal
from keras_gradtools.curvature.draws import Draws
from keras_gradtools.curvature.eigenvalues import eigsh
from keras_gradtools.curvature.loss_surface import loss_surface
from keras_gradtools.curvature.parameters import Parameters
from keras_gradtools.curvature.progress import Progress
from keras_gradtools.curvature.spectral_density import spectral_density
from keras_gradtools.curvature.trace import estimate_trace
from keras_gradtools.transforms import compiled
from keras_gradtools.transforms.first_order import value_and_grad

# Columns of a matrix that are multiplied in one pass over the data. More were slower on every backend, since the
# activations for all columns no longer fit into the cache.
COLUMNS = 64
# Limit on the numbers in the rows that one call of a program computes. A call covers several chunks, which share one
# evaluation of the model.
_NUMBERS_OF_A_CALL = 2**24
# Larger models take long to trace. Both limits matter: two transformer blocks have few variables, but hundreds of
# operations.
_MOST_VARIABLES, _MOST_LAYERS = 32, 16


class CurvatureOperator:
    """A symmetric curvature matrix of a loss with respect to the weights of a model, known by its products.

    The matrix is only formed by `dense` and `blocks`.

    Attributes:
        model: The model that has the weights. For a wrapper of `kg.models`, the wrapped model.
        variables: A list of the variables that the matrix is taken with respect to.
        slices: For each variable, the slice of its elements in a flat vector, in the order of
            `keras.ops.reshape(v, -1)`.
        shape: `(n, n)`, where n is the total number of elements of the variables.
        dtype: Name of the dtype of the products, the common dtype of the variables.
    """

    def __init__(self, model, loss, data, variables=None, training=False, *, batch_size=256, verbose="auto"):
        owner = self._owner = type(self).__name__
        validation.require_loss(owner, loss)
        if not validation.is_one_of(verbose, ("auto", 0, 1)):
            raise ValueError(
                f"{owner} expects 'auto', 0 or 1 as `verbose`. Received: verbose={validation.shown(verbose)}."
            )
        self._verbose = verbose
        self._given_model = model
        self.model = checked_model(owner, model)
        self._parameters = Parameters(owner, self.model, variables)
        # A wrapper is compiled itself, so the compiled loss is that of `model`, not of the wrapped model.
        self._loss = BatchLoss(owner, model if loss is None else self.model, loss, self._parameters.variables, training)
        self._batches: Batches | OneBatch = Batches(owner, data, batch_size, must_repeat=True)
        self._spec = self._make_spec()
        self._batches.counts_order = self._spec.draws_by_batch
        self._draws = Draws(self.model)
        self._checked: set[str] = set()
        self._may_reorder: set[str] = set()
        self._outputs = None
        self.variables = list(self._parameters.variables)
        self.slices = list(self._parameters.slices)
        self.shape = (self._parameters.size, self._parameters.size)
        self.dtype = self._parameters.dtype

    # Without this, NumPy would multiply element by element. With None, `array @ operator` raises a TypeError.
    __array_ufunc__ = None

    def _make_spec(self):
        """Returns the `OfBatch` that makes the linear map of one batch."""
        raise NotImplementedError

    def __matmul__(self, vector):
        """The product with a flat vector, a matrix of columns, or tensors in the structure of the variables."""
        parts, count, in_kind = self._parameters.received(vector)
        if count is None or count <= COLUMNS:
            return in_kind(self._product(parts, count))
        chunks = []
        with Progress(math.ceil(count / COLUMNS), f"{self._owner} @ matrix", self._verbose) as progress:
            for start in range(0, count, COLUMNS):
                chunk = [part[start : start + COLUMNS] for part in parts]
                chunks.append(progress.after(self._product(chunk, chunk[0].shape[0])))
        return in_kind([ops.concatenate(of_variable, axis=0) for of_variable in zip(*chunks, strict=True)])

    def dense(self, chunk_size=None):
        """The matrix as a NumPy array of shape `(n, n)`.

        The matrix is exactly symmetric: a block of two variables is computed once and copied to its mirror image, and
        the block of a variable with itself is averaged with its transpose.

        Args:
            chunk_size: Number of rows to compute at once, 64 by default. It bounds the memory and changes no value.

        Raises:
            MemoryError: If the matrix would take more than half of the machine's memory.
        """
        chunk_size = jacobians.checked_chunk_size(chunk_size) or COLUMNS
        n, dtype = self._parameters.size, _array_dtype(self.dtype)
        dense_memory.check(self._owner, n, dtype)
        matrix = np.empty((n, n), dtype)
        per_call = max(_NUMBERS_OF_A_CALL // max(n, 1) // chunk_size, 1) * chunk_size
        tasks = [
            (place, start, min(per_call, s.stop - s.start))
            for place, s in enumerate(self.slices)
            for start in range(0, s.stop - s.start, per_call)
        ]
        with Progress(len(tasks), f"{self._owner}.dense", self._verbose) as progress:
            for place, start, size in tasks:
                first, last = self.slices[place].start + start, self.slices[place].stop
                totals, count = self._rows(place, start, size, chunk_size)
                for total, columns in zip(totals, self.slices[place:], strict=True):
                    rows = ops.convert_to_numpy(total)[: last - first].reshape(-1, columns.stop - columns.start)
                    np.divide(rows, count, out=matrix[first : first + len(rows), columns])
                progress.update()
        dense_memory.symmetrize(matrix, self.slices)
        return matrix

    def blocks(self, chunk_size=None):
        """The matrix as nested blocks like those of `kg.hessian`, NumPy arrays of shape `(*in_i, *in_j)`.

        `blocks[i][j]` is the block of the i-th and the j-th variable.
        """
        matrix = self.dense(chunk_size)
        shapes = self._parameters.shapes
        rows = [
            [matrix[a, b].reshape(*s, *t) for b, t in zip(self.slices, shapes, strict=True)]
            for a, s in zip(self.slices, shapes, strict=True)
        ]
        structure = self._parameters.structure
        return nesting.pack_as(structure, [nesting.pack_as(structure, row) for row in rows])

    def trace(self, matvecs=99, method="hutch++", seed=0):
        r"""An estimate of the trace from products with vectors $v_i$ of random signs.

        Hutchinson's estimator is the mean of $v_i^\top A v_i$. Hutch++ uses a third of the products to find the
        directions $Q$ of the largest eigenvalues, computes the trace exactly on these, and samples the rest:
        $\operatorname{tr}(Q^\top A Q) + \overline{v_i^\top (I - QQ^\top) A (I - QQ^\top) v_i}$. It is more accurate if
        a few eigenvalues are far larger than the others, as in trained models.

        Args:
            matvecs: Number of products. If it is `n` or more, the trace is computed exactly with `n` products.
            method: `"hutch++"` or `"hutchinson"`.
            seed: An integer that seeds the random vectors.

        Returns:
            An `Estimate` of the trace, with the standard error of the mean over the samples.

        Cost:
            `matvecs` products, and for Hutch++ memory for a third as many vectors.

        Source: Hutchinson, "A stochastic estimator of the trace of the influence matrix" (1989); Meyer, Musco, Musco &
        Woodruff, "Hutch++" (arXiv:2010.09649, 2020), algorithm 1.
        """
        dtype = _array_dtype(self.dtype)
        return estimate_trace(self._matvec(), self.shape[0], matvecs, method, seed, dtype, self._progress("trace"))

    def diagonal(self, matvecs=99, seed=0):
        r"""An estimate of the diagonal, the mean of $v_i \odot A v_i$ over vectors $v_i$ of random signs.

        Args:
            matvecs: Number of products. If it is `n` or more, the diagonal is computed exactly with `n` products.
            seed: An integer that seeds the random vectors.

        Returns:
            An `Estimate` with arrays of shape `(n,)` in double precision: the diagonal, and the standard error of each
            of its elements.

        Cost:
            `matvecs` products. The standard error of an element is the norm of the other elements in its row, divided
            by the square root of `matvecs`.

        Source: Bekas, Kokiopoulou & Saad, "An estimator for the diagonal of a matrix" (2007), equation 2.
        """
        return estimate_diagonal(self._matvec(), self.shape[0], matvecs, seed, self._progress("diagonal"))

    def eigsh(self, k=6, which="LA", *, ncv=None, max_restarts=None, tol=None, seed=0):
        r"""Some eigenvalues and their eigenvectors, as `scipy.sparse.linalg.eigsh` returns them.

        This is the Lanczos method with full reorthogonalization and thick restarts. The basis has `ncv` vectors, for
        any number of products, and rounding does not create copies of an eigenvalue. A multiple eigenvalue may be found
        fewer times than its multiplicity, as with any method that uses a single starting vector.

        Args:
            k: Number of eigenvalues.
            which: `"LA"` for the largest, `"SA"` for the smallest, `"LM"` for those of largest magnitude, `"BE"` for
                half of them from each end.
            ncv: Number of vectors in the basis, more than `k`. Default: `max(2 * k + 1, 20)`. A larger basis needs
                fewer products.
            max_restarts: Maximum number of restarts, 100 by default.
            tol: An eigenvalue has converged if $\lVert A v - \lambda v \rVert \le$ `tol` $\lvert \lambda \rvert$.
                Default: the machine epsilon of `dtype` to the power of 2/3, which is 2e-5 in float32 and 4e-11 in
                float64.
            seed: An integer that seeds the starting vector.

        Returns:
            `(eigenvalues, eigenvectors)`: the eigenvalues in ascending order, of shape `(k,)`, and orthonormal
            eigenvectors in columns, of shape `(n, k)`. A column can be multiplied with `@`.

        Raises:
            EigenvalueConvergenceError: If an eigenvalue has not converged after `max_restarts`. The attributes of the
                error have the approximations.
            FloatingPointError: If a product is not finite.
            ValueError: If an option is invalid.

        Cost:
            About ten to a few hundred products, and memory for a few more than `ncv + 1` vectors.

        Source: Wu & Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems" (2000), algorithm 1.
        """
        return eigsh(
            self._matvec(),
            self.shape[0],
            k,
            which,
            ncv=ncv,
            max_restarts=max_restarts,
            tol=tol,
            seed=seed,
            dtype=_array_dtype(self.dtype),
            progress=self._progress("eigsh"),
        )

    def spectral_density(self, probes=10, steps=50, *, points=1000, width=None, seed=0):
        r"""An estimate of the density of the eigenvalues, $\frac1n \sum_i \mathcal{N}(t; \lambda_i, \sigma^2)$.

        It does not compute the eigenvalues. Each probe runs the Lanczos method from a random vector, which gives nodes
        and weights of a Gauss quadrature of the density.

        Args:
            probes: Number of random vectors, 2 or more.
            steps: Number of Lanczos steps, and of products, for each probe.
            points: Number of points in the grid on which the density is returned.
            width: $\sigma$. Default: a hundredth of the range of the eigenvalues.
            seed: An integer that seeds the random vectors.

        Returns:
            A `SpectralDensity`: the grid, the density, which integrates to 1 on it, its standard error over the probes,
            and the nodes and weights. `kg.plots.plot_spectral_density` draws it.

        Cost:
            `probes * steps` products, and memory for `steps` vectors.

        Source: Ghorbani, Krishnan & Xiao, "An investigation into neural net optimization via Hessian eigenvalue
        density" (arXiv:1901.10159, 2019), section 2.
        """
        return spectral_density(
            self._matvec(),
            self.shape[0],
            probes,
            steps,
            points=points,
            width=width,
            seed=seed,
            dtype=_array_dtype(self.dtype),
            progress=self._progress("spectral_density"),
        )

    def loss(self, offset=None):
        """The loss $L$ whose curvature this is, as a float.

        Args:
            offset: A vector, in any form that `@` accepts, that is added to the weights for this evaluation. None for
                no offset. The weights of the model do not change.
        """

        def zeros():
            return [ops.zeros((), dtype=self.dtype)]

        (total,), count = self._over_data("loss", _add_loss, zeros, self._offset("loss", offset))
        return float(total) / count

    def gradient(self, offset=None):
        """The gradient of the loss, a NumPy array of shape `(n,)`. `offset` is as for `loss`."""
        return self.loss_and_gradient(offset)[1]

    def loss_and_gradient(self, offset=None):
        """The loss and the gradient, at the cost of the gradient. `offset` is as for `loss`."""
        offset = self._offset("loss_and_gradient", offset)
        totals, count = self._over_data("gradient", *self._gradient_of(offset))
        gradient = self._parameters.joined_in_numpy([total / count for total in totals[1:]])
        return float(totals[0]) / count, gradient

    def move(self, offset):
        """Adds a vector, in any form that `@` accepts, to the variables. After an error, none of them has changed."""
        if offset is None:
            raise ValueError("move expects a vector as `offset`. Received: offset=None.")
        self._parameters.move(self._offset("move", offset))

    def loss_surface(self, directions=None, distance=1.0, points=21, seed=0):
        r"""The loss $L(\theta + a \, u_1 + b \, u_2)$ over a plane through the weights.

        Args:
            directions: A NumPy array of shape `(n, 2)` with the directions in its columns, which are scaled to length
                1. Default: the eigenvectors of the two largest eigenvalues.
            distance: $a$ and $b$ range from `-distance` to `distance`, in the units of the weights.
            points: Number of values of $a$ and of $b$. An odd number includes 0.
            seed: An integer that seeds `eigsh`.

        Returns:
            A `LossSurface`, which `kg.plots.plot_loss_surface` draws. The weights do not change.

        Cost:
            `points**2` evaluations of the loss over the data, two products, and those of `eigsh`.

        Source: Yao, Gholami, Keutzer & Mahoney, "PyHessian" (arXiv:1912.07145, 2019), figure 1.
        """
        return loss_surface(self, directions, distance, points, seed, self._progress("loss_surface"))

    def linearized(self):
        """The matrix at the current weights, for many products with NumPy vectors. It has only `shape` and `@`.

        If the data is one batch, its products are faster than those of the operator. On torch, what does not depend on
        the vector is computed once and kept while this object exists, which halves the time. On the other backends, one
        program takes and returns flat vectors, which saves a few milliseconds.
        """
        return LinearizedOperator(self.shape, self._matvec())

    def to_scipy(self):
        """This operator as a `scipy.sparse.linalg.LinearOperator`, for the solvers of SciPy.

        Raises:
            ImportError: If SciPy is not installed.
        """
        try:
            from scipy.sparse.linalg import LinearOperator
        except ImportError:
            raise ImportError('`to_scipy` needs SciPy: pip install "keras-gradtools[solvers]".') from None

        def matmat(matrix):
            return self @ matrix

        return LinearOperator(
            self.shape, matvec=lambda v: self @ v.reshape(-1), matmat=matmat, rmatvec=lambda v: self @ v.reshape(-1),
            rmatmat=matmat, dtype=_array_dtype(self.dtype),
        )  # fmt: skip

    def __repr__(self):
        names = ", ".join(v.path for v in self.variables[:3]) + (", ..." if len(self.variables) > 3 else "")
        return f"<{self._owner} of {self.model.name!r} by {names}, shape {self.shape}, dtype {self.dtype}>"

    def outputs_of_example(self):
        """The number of outputs of the model for one example. None if there are regularizers, which add to the rank."""
        if self._outputs is None:
            weights = self._parameters.variables_as_tensors()
            if self._loss.regularization(self.model, weights) is not None:
                return None
            x, _, _ = next(iter(self._batches))
            outputs = self._loss.drawing(self._draws).outputs(
                self.model, weights, nesting.map_structure(lambda a: a[:1], x)
            )
            self._outputs = sum(math.prod(o.shape) for o in nesting.flatten(outputs))
        return self._outputs

    def check(self, of="product"):
        """Runs the checks of the first product now. With `of="gradient"`, those of the first loss or gradient."""
        self._prepare(of)

    def batches(self):
        """Iterates over the batches of the data, `(x, y, sample_weight)` as tensors."""
        return iter(self._batches)

    def count_examples(self):
        """The number of examples in the data."""
        return sum(map(batch_size_of, self._batches))

    def of_batch(self, batch):
        """The same operator on a single batch, `(x, y, sample_weight)` as tensors.

        Its random numbers start from the current states of the seeds.
        """
        other = self._on(batch)
        other.draw_anew()
        # Both share the set of passed checks. The seeds that a check finds are kept for the next batch.
        other._prepare()
        self._draws = other._draws
        return other

    def _on(self, batch):
        other = copy.copy(self)
        other._batches = OneBatch(batch)
        return other

    def draw_anew(self):
        """Takes the current states of the model's seeds, so that dropout uses new masks from here on.

        Until this is called, all products, losses and gradients use the masks from when the operator was created,
        whatever is called in between, and also after `move`.
        """
        self._sync()
        self._draws = self._draws.anew(self.model)

    # --- products over the data ---

    def _offset(self, name, offset):
        if offset is None:
            return None
        parts, count, _ = self._parameters.received(offset)
        if count is not None:
            raise ValueError(f"{name} expects one vector as `offset`. Received: {count} columns.")
        return parts

    def _matvec(self):
        """A function from a flat NumPy vector to its product at the current weights, a NumPy vector."""
        if self._batches.count != 1:
            return lambda vector: self @ vector
        if backend.LINEARIZES_ONCE:
            return self._matvec_by_one_record()
        # Large models use the program of `self @ vector`, which exists already. Its call overhead is small beside the
        # product.
        return self._matvec_by_one_program() if self._is_quick_to_trace else lambda vector: self @ vector

    @property
    def _is_quick_to_trace(self):
        """Whether the model is so small that tracing one more program is quick."""
        return len(self.variables) <= _MOST_VARIABLES and len(state.layers_of(self.model)) <= _MOST_LAYERS

    def _matvec_by_one_record(self):
        self._prepare()
        (batch,) = self._batches
        batch = nesting.map_structure(_spread, batch)
        spec = self._spec.drawing(self._draws)
        linear = spec.of_batch(self.model, self._parameters.variables_as_tensors(), batch, self._seed(0))
        linear.keep()

        size = batch_size_of(batch)

        def product(vector):
            products = linear.apply(self._parameters.split(np.asarray(vector)))
            totals, count = backend.summed_over_processes([size * ops.stop_gradient(p) for p in products], size)
            return self._parameters.joined_in_numpy([total / count for total in totals])

        return product

    def _matvec_by_one_program(self):
        # The program takes a few tensors, not two for each variable. On small models, passing those takes longer than
        # the product.
        self._prepare()
        (batch,) = self._batches
        size, seed = batch_size_of(batch), self._seed(0)
        batch = nesting.map_structure(_spread, batch)

        dtype = _array_dtype(self.dtype)
        key, body = self._program("flat product", _flat_product)
        values = self._draws.values
        example = (values, np.zeros(self.shape[0], dtype), batch, seed)
        run = compiled.prepare(self._owner, self.model, body, key, example, {})

        def product(vector):
            # Passing an array is faster than converting it with Keras.
            total, _ = run((values, np.asarray(vector, dtype), batch, seed), {})
            (total,), count = backend.summed_over_processes([total], size)
            return ops.convert_to_numpy(total) / count

        return product

    def _progress(self, what):
        return functools.partial(Progress, title=f"{self._owner}.{what}", verbose=self._verbose)

    def _product(self, vectors, columns):
        if columns == 0:
            return vectors
        zeros = functools.partial(self._parameters.zeros, () if columns is None else (columns,))
        totals, count = self._over_data("product", _add_product, zeros, vectors)
        return [total / count for total in totals]

    def _rows(self, place, start, size, chunk_size):
        add = functools.partial(_add_rows, place, size, chunk_size)
        start = ops.convert_to_tensor(np.int32(start))

        def zeros():
            return self._parameters.zeros((size,))[place:]

        return self._over_data(("rows", place, size, chunk_size), add, zeros, start)

    def _over_data(self, what, add, zeros, vectors):
        """Runs `add` on every batch, starting from `zeros()`. Returns the sums and the number of examples."""
        self._prepare("gradient" if what in ("loss", "gradient") else "product")
        return self._summed(what, add, zeros, vectors)

    def _summed(self, what, add, zeros, vectors):
        # A single batch needs no totals, and fewer arguments are faster.
        totals = None if self._batches.count == 1 else zeros()
        count = 0
        for number, batch in enumerate(self._batches):
            count += batch_size_of(batch)
            batch = nesting.map_structure(_spread, batch)
            totals = self._run(what, add, totals, vectors, batch, self._seed(number))
        return backend.summed_over_processes(totals, count)

    def _of_one_batch(self, what, body, vectors):
        """Runs `body(spec, loss, parameters, model, vectors, batch, seed)` compiled, for data that is one batch."""
        self._prepare()
        (batch,) = self._batches
        return self._run(what, body, vectors, nesting.map_structure(_spread, batch), self._seed(0))

    def _run(self, what, add, *args):
        key, body = self._program(what, add)
        return compiled.run(self._owner, self.model, body, key, (self._draws.values, *args), {})[0]

    def _program(self, what, add):
        # The body must not hold anything else, such as the data, since programs are cached as long as the model lives.
        body = functools.partial(_drawing, add, self._spec, self._loss, self._parameters, self._draws)
        return (self._owner, what, self._spec.key, self._draws.key), body

    def _seed(self, number):
        return ops.convert_to_tensor(np.array([self._spec.seed, number], "int32"))

    def _sync(self):
        # Between training steps on JAX, Keras keeps the current weights outside of the variables.
        for model in (self._given_model, self.model):
            sync = getattr(model, "jax_state_sync", None)
            if sync is not None:
                sync()

    def _prepare(self, what="product"):
        self._sync()
        # If products repeat, gradients do, so a check of products covers both.
        if not self._checked & {what, "product"}:
            self._check(what)
        if self._batches.is_reordered and what not in self._may_reorder:
            self._check_order(what)

    def _check(self, what):
        """Raises `ValueError` if the loss has no value for each example, or if results of the first batch differ."""
        batch = next(iter(self._batches))
        loss, weights = self._loss.drawing(self._draws), self._parameters.variables_as_tensors()
        outputs, assigned = loss.outputs_and_assigned(self.model, weights, batch[0])
        losses = ops.convert_to_numpy(loss.of_each_output(outputs, batch[1]))
        self._draws = self._draws.with_variables(assigned)
        compute = self._first_product if what == "product" else self._first_gradient
        loss = self._loss.drawing(self._draws)
        determinism.check(self._owner, self.model, loss, self._parameters, batch, losses, compute)
        if not self._checked:
            self._batches.look()
        self._checked.add(what)

    def _check_order(self, what):
        """Raises `ValueError` if the order of the examples, which changes from pass to pass, changes the result."""

        def gradient():
            return self._parameters.joined_in_numpy(self._summed("gradient", *self._gradient_of(None))[0][1:])

        def product():
            zeros = self._parameters.zeros
            return self._parameters.joined_in_numpy(self._summed("product", _add_product, zeros, self._direction())[0])

        is_drawn = self._spec.draws_by_batch
        computed = [gradient] if what == "gradient" else [product] if is_drawn else [product, gradient]
        determinism.check_order(self._owner, self.model, self._loss.training, is_drawn, computed)
        self._may_reorder.add(what)

    def _direction(self):
        return self._parameters.split(np.random.default_rng(0).standard_normal(self.shape[0]))

    def _first_product(self, batch):
        totals = None if self._batches.count == 1 else self._parameters.zeros()
        product = self._run("product", _add_product, totals, self._direction(), batch, self._seed(0))
        return self._parameters.joined_in_numpy(product)

    def _first_gradient(self, batch):
        add, zeros, offset = self._gradient_of(None)
        totals = None if self._batches.count == 1 else zeros()
        gradient = self._run("gradient", add, totals, offset, batch, self._seed(0))[1:]
        return self._parameters.joined_in_numpy(gradient)

    def _gradient_of(self, offset):
        """The arguments of `_summed` that compute the loss and its gradient."""

        def zeros():
            return [ops.zeros((), dtype=self.dtype), *self._parameters.zeros()]

        return _add_loss_and_gradient, zeros, offset


def _spread(x):
    return x if x is None else backend.spread(x)


class LinearizedOperator:
    """A symmetric matrix at fixed weights, known by its product with a flat NumPy vector."""

    __array_ufunc__ = None

    def __init__(self, shape, matvec):
        self.shape, self._matvec = shape, matvec

    def __matmul__(self, vector):
        if np.shape(vector) != self.shape[:1]:
            raise ValueError(
                f"A linearized operator multiplies a NumPy vector of shape {self.shape[:1]}. Received: "
                f"{validation.describe(vector)}. The operator itself multiplies matrices and nested tensors, too."
            )
        return self._matvec(vector)


# Each of these functions adds to `totals`, if given, its result for a batch times the number of examples. If replicas
# share the batch, `of_part` computes one part of it. The size of the part multiplies the vectors or the result, so that
# the results of the parts add up to that of the batch.


def _drawing(add, spec, loss, parameters, draws, model, values, *args):
    draws = draws.with_values(values)
    return add(spec.drawing(draws), loss.drawing(draws), parameters, model, *args)


def _add_product(spec, loss, parameters, model, totals, vectors, batch, seed):
    def of_part(part, size):
        linear = spec.of_batch(model, parameters.variables_as_tensors(), part, seed)
        is_stack = len(vectors[0].shape) > len(parameters.shapes[0])
        return (linear.apply_stack if is_stack else linear.apply)([size * v for v in vectors])

    return _added(totals, of_part, batch, parameters)


def _flat_product(spec, loss, parameters, model, vector, batch, seed):
    products, note = _add_product(spec, loss, parameters, model, None, parameters.split(vector), batch, seed)
    return parameters.joined(products), note


def _add_rows(place, count, chunk_size, spec, loss, parameters, model, totals, start, batch, seed):
    shape, dtype = parameters.shapes[place], parameters.variables[place].dtype
    every = ops.arange(math.prod(shape), dtype="int32")

    def of_part(part, size):
        linear = spec.of_batch(model, parameters.variables_as_tensors(), part, seed)

        def rows(numbers):
            units = size * ops.cast(ops.equal((start + numbers)[:, None], every[None, :]), dtype)
            return linear.rows(place, ops.reshape(units, (-1, *shape)))

        if count <= chunk_size:
            return rows(ops.arange(count, dtype="int32"))
        return backend.map_chunks(rows, count, chunk_size)

    return _added(totals, of_part, batch, parameters)


def _add_loss(spec, loss, parameters, model, totals, offset, batch, seed):
    def of_part(part, size):
        weights = _moved(parameters.variables_as_tensors(), offset)
        return [size * loss.total(model, weights, *part)]

    return _added(totals, of_part, batch, parameters)


def _add_loss_and_gradient(spec, loss, parameters, model, totals, offset, batch, seed):
    def of_part(part, size):
        weights = _moved(parameters.variables_as_tensors(), offset)
        value, gradient = value_and_grad(lambda w: loss.total(model, w, *part))(weights)
        return [size * x for x in (value, *gradient)]

    return _added(totals, of_part, batch, parameters)


def _moved(weights, offset):
    return weights if offset is None else [w + d for w, d in zip(weights, offset, strict=True)]


def _added(totals, of_part, batch, parameters):
    of_batch = backend.summed_over_replicas(
        lambda part: of_part(part, batch_size_of(part)), batch, parameters.variables[0]
    )
    # On torch, weights that are not among the variables may still have a graph.
    summands = [ops.stop_gradient(ops.cast(b, parameters.dtype)) for b in of_batch]
    return summands if totals is None else [t + s for t, s in zip(totals, summands, strict=True)], None


def _array_dtype(dtype):
    # NumPy has no bfloat16, and half precision is too imprecise for solvers.
    return np.dtype("float64" if dtype == "float64" else "float32")
