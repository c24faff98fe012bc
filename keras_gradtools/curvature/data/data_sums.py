"""Sums over the batches of a data set, by compiled programs that return the same result at every call."""

import copy
import functools

import numpy as np
from keras import ops

from keras_gradtools import backend, nesting
from keras_gradtools.curvature.data import batch_sums
from keras_gradtools.curvature.data.batches import OneBatch, batch_size_of
from keras_gradtools.curvature.data.draws import Draws
from keras_gradtools.curvature.data.loss_state import loss_state
from keras_gradtools.curvature.data.repeatability import Repeatability
from keras_gradtools.keras_state.layer_state import layers_of
from keras_gradtools.training.current_weights import sync_weights
from keras_gradtools.transforms import compiled

# Larger models take long to trace. Both limits matter: two transformer blocks have few variables, but hundreds of
# operations.
_MOST_VARIABLES, _MOST_LAYERS = 32, 16
# With more weights, products one by one need fewer vectors, and take less time: see `benchmarks.large_model`.
_MOST_WEIGHTS_IN_LOOPS = 2**17


class DataSums:
    """Products, losses and gradients, summed over the batches of the data.

    Attributes:
        owner: The name of the operator, or of the callback that uses it, for error messages.
        model: The model that has the weights.
        loss: The `BatchLoss`.
        spec: The `OfBatch` that makes the linear map of a batch.
        parameters: The `Parameters`.
        batches: The batches, which can be iterated repeatedly.
        reads: What `loss_state` remembers between batches.
        draws: The `Draws` with which every call starts.
    """

    def __init__(self, owner, operator, model, loss, spec, parameters, batches, trainer):
        self._operator = operator  # its name, which programs are cached by
        self.owner, self.model, self.loss, self.spec, self.parameters = owner, model, loss, spec, parameters
        self.batches = batches
        self.batches.counts_order = spec.draws_by_batch
        self.draws = Draws(model)
        self._trainer = trainer
        self._repeatability = Repeatability()
        # What an eager call of the loss has read, shared by all batches.
        self.reads: dict = {}
        # The result of `can_loop`, once it is known, for all batches.
        self._can_loop: dict = {}

    def of_batch(self, batch):
        """The `DataSums` of a single batch. It shares the set of passed checks with this object."""
        other = copy.copy(self)
        other.batches = OneBatch(batch)
        return other

    def draw_anew(self):
        """Takes the current states of the model's seeds."""
        self.sync()
        self.draws = self.draws.anew(self.model)

    @property
    def is_one_batch(self):
        """Whether the data is one batch."""
        return self.batches.count == 1

    @property
    def is_quick_to_trace(self):
        """Whether the model is so small that tracing one more program is quick."""
        return len(self.parameters.variables) <= _MOST_VARIABLES and len(layers_of(self.model)) <= _MOST_LAYERS

    def product(self, vectors, columns):
        """The product with one vector, or with a stack of `columns` vectors, as a tensor for each variable."""
        if columns == 0:
            return vectors
        zeros = functools.partial(self.parameters.zeros, () if columns is None else (columns,))
        self.prepare()
        totals, count = self.summed("product", batch_sums.add_product, zeros, vectors)
        return [total / count for total in totals]

    def rows(self, place, start, size, chunk_size):
        """The sums of some rows for the columns of this and the later variables, and the number of examples."""
        add = functools.partial(batch_sums.add_rows, place, size, chunk_size)
        start = ops.convert_to_tensor(np.int32(start))

        def zeros():
            return self.parameters.zeros((size,))[place:]

        self.prepare()
        return self.summed(("rows", place, size, chunk_size), add, zeros, start)

    def bytes_of_rows(self, count):
        """The number of bytes of all tensors that are computed for some rows at once, on the first batch."""
        self.prepare()
        batch = on_devices(next(iter(self.batches)))
        _, drawing = self._program("rows", functools.partial(batch_sums.add_rows, 0, count, count))
        start = ops.convert_to_tensor(np.int32(0))

        def computed():
            return drawing(self.model, self.draws.values, None, start, batch, self.seed(0))[0]

        return backend.computed_bytes(computed)

    def loss_at(self, offset):
        """The loss at the weights plus `offset`, a flat vector or None."""

        def zeros():
            return [ops.zeros((), dtype=self.parameters.dtype)]

        self.prepare("gradient")
        (total,), count = self.summed("loss", batch_sums.add_loss, zeros, offset)
        return float(total) / count

    def loss_and_gradient_at(self, offset):
        """The loss and the gradient, a flat NumPy array, at the weights plus `offset`."""
        self.prepare("gradient")
        (loss, gradient), count = self.gradient_sums(offset)
        # Divided in NumPy, because an operation on a small tensor takes longer than its computation.
        gradient = ops.convert_to_numpy(gradient)
        return float(loss) / count, np.divide(gradient, count, dtype=gradient.dtype)

    def gradient_sums(self, offset=None):
        """The sums of the loss and of its flat gradient, and the number of examples, without checks."""
        return self.summed("gradient", batch_sums.add_loss_and_gradient, self.zeros_of_gradient, offset)

    def zeros_of_gradient(self):
        """Zeros to which losses and gradients are added."""
        return [ops.zeros(shape, dtype=self.parameters.dtype) for shape in ((), (self.parameters.size,))]

    def outputs_of_example(self):
        """See `CurvatureOperator.outputs_of_example`."""
        weights = self.parameters.variables_as_tensors()
        if self.loss.regularization(self.model, weights) is not None:
            return None
        x, _, _ = next(iter(self.batches))
        return self.loss.drawing(self.draws).outputs_of_example(self.model, weights, x)

    def summed(self, what, add, zeros, vectors):
        """Runs `add` on every batch, starting from `zeros()`. Returns the sums and the number of examples."""
        # A single batch needs no totals, and fewer arguments are faster.
        totals = None if self.is_one_batch else zeros()
        count = 0
        for number, batch in enumerate(self.batches):
            count += batch_size_of(batch)
            totals = self.run(what, add, totals, vectors, on_devices(batch), self.seed(number))
        return backend.summed_over_processes(totals, count)

    def of_one_batch(self, what, body, vectors, needs="product"):
        """Runs `body(spec, loss, parameters, model, vectors, batch, seed)` compiled, for data that is one batch.

        `needs` is what the checks are for, as for `prepare`.
        """
        self.prepare(needs)
        (batch,) = self.batches
        return self.run(what, body, vectors, on_devices(batch), self.seed(0))

    def can_evaluate_at_once(self):
        """Whether one program can hold several evaluations: of one batch, in one process, and quick to trace."""
        is_alone = backend.summed_over_processes([np.zeros(())], 1)[1] == 1
        if not (is_alone and self.is_one_batch and self.is_quick_to_trace):
            return False
        (batch,) = self.batches
        return not backend.is_shared_by_replicas(batch, self.parameters.variables[0])

    def can_loop(self):
        """Whether one program can compute many products and losses, and is faster than one program for each."""
        is_small = self.parameters.size <= _MOST_WEIGHTS_IN_LOOPS
        if not (backend.COMPILES_LOOPS and is_small and self.can_evaluate_at_once()):
            return False
        (batch,) = self.batches
        if not self._can_loop:
            loss, weights = self.loss.drawing(self.draws), self.parameters.variables_as_tensors()
            try:
                is_slow = backend.slows_in_loops(lambda: [loss.total(self.model, weights, *batch)])
            except Exception:
                # If the model itself is at fault, the products will raise its error again.
                is_slow = True
            self._can_loop["found"] = not is_slow
        return self._can_loop["found"]

    def loss_state(self):
        """What the loss of a single batch depends on now, a `LossState`. None if it cannot be told."""
        self.sync()
        return loss_state(self)

    def run(self, what, body, *args):
        """Runs `body` compiled. `what` identifies the program in the cache."""
        key, drawing = self._program(what, body)
        return compiled.run(self._operator, self.model, drawing, key, (self.draws.values, *args), {})[0]

    def compiled(self, what, body, *args):
        """The program of `body`, as a function of `draws.values` and arguments like `args`.

        Calling it is faster than `run`, which searches for the program each time.
        """
        key, drawing = self._program(what, body)
        return compiled.prepare(self._operator, self.model, drawing, key, (self.draws.values, *args), {})

    def _program(self, what, body):
        # The program must hold nothing else, such as the data, since it is cached as long as the model lives.
        drawing = functools.partial(batch_sums.drawing, body, self.spec, self.loss, self.parameters, self.draws)
        return (self._operator, what, self.spec.key, self.loss.captured_values(), self.draws.key), drawing

    def seed(self, number):
        """The seed of the random numbers that the linear map of a batch draws itself, as a tensor."""
        return ops.convert_to_tensor(np.array([self.spec.seed, number], "int32"))

    def prepare(self, what="product"):
        """Runs the checks that a product or a `"gradient"` needs, unless they have passed."""
        self.sync()
        self._repeatability.require(self, what)

    def sync(self):
        """Brings the current weights into the variables of the model, if `fit` holds them elsewhere."""
        sync_weights(self._trainer, self.model)


def on_devices(batch):
    """The batch on the devices of the distribution, if there is one."""
    return nesting.map_structure(lambda x: x if x is None else backend.spread(x), batch)
