"""The loss of a `SquaredResiduals` on a batch as a function of some of a model's weights."""

import fractions

import keras
import numpy as np
from keras import ops

from keras_gradtools import backend, nesting, validation
from keras_gradtools.curvature.data.batch_loss import BatchLoss
from keras_gradtools.curvature.data.batches import Batches, batch_size_of
from keras_gradtools.training.squared_residuals import NAME, SquaredResiduals, points_of
from keras_gradtools.transforms import closures
from keras_gradtools.transforms.closures import Identity
from keras_gradtools.transforms.taped_call import TapedCall


class ResidualLoss(BatchLoss):
    """A `BatchLoss` whose outputs are the scaled residuals, one vector, and whose value is the sum of their squares.

    A batch is `(points, None, None)`, where the function of the `SquaredResiduals` gets the points.
    """

    def __init__(self, owner, loss, variables, training):
        self._bind(owner, variables, training)
        self.loss = loss
        self.key = (Identity(loss), self.training, tuple(map(Identity, variables)))

    def functions(self):
        return [self.loss.residuals]

    def captured_values(self):
        try:
            return closures.captured_values(self.loss.residuals).key
        except TypeError as error:
            raise ValueError(
                f"{self._owner} compiles the function of the residuals, and compares the values that it captures at "
                f"each call. Received: {self.loss.name}, which captures too many values to compare. Pass them as data."
            ) from error

    def require_dependent(self, model, x):
        variables = model.trainable_variables
        if backend.is_shared_by_replicas((x,), variables[0]):
            raise ValueError(
                f"{self._owner} does not divide the points of {NAME} among the replicas of a strategy. Received: a "
                "model on several replicas. Train it on one device."
            )

        self._require_equal_shares(x)
        weights = [ops.stop_gradient(ops.convert_to_tensor(v)) for v in variables]

        def require():
            call = TapedCall(NAME, lambda w: self._sums_of_terms(model, variables, w, x), (weights,))
            call.tape.keeps_graph = True
            for name, total in call.target.items():
                found = backend.pullback(call.tape, [total], call.flat_sources, [ops.ones_like(total)])
                if all(gradient is None for gradient in found):
                    raise ValueError(
                        f"{self._owner} expects residuals that depend on the trainable weights of the model "
                        f"{model.name!r}. Received: residuals {name!r} of {self.loss.name}, which do not. Call the "
                        "model that the function gets, and use `keras.ops` instead of NumPy."
                    )

        try:
            backend.tried(require)
        except Exception as error:
            if not backend.depends_on_values(error):
                raise
            require()

    def _require_equal_shares(self, points):
        """Each term is a mean, and the mean over all points is that of the processes only if their shares are equal."""
        sizes = np.array([leaf.shape[0] for leaf in nesting.flatten(points)], "float64")
        sums, processes = backend.summed_over_processes([sizes, sizes**2], 1)
        total, squares = map(ops.convert_to_numpy, sums)
        if np.any(processes * squares != total**2):
            raise ValueError(
                f"{self._owner} expects the same number of points of each set in every process, because the terms of "
                f"{NAME} are means. Received: sets of {sizes.astype(int).tolist()} points in this process, and of "
                f"{(total / processes).tolist()} on average. Divide the points evenly."
            )

    def _sums_of_terms(self, model, variables, weights, x):
        lent = self._draws.lent(list(zip(variables, weights, strict=True)))
        with lent, lent:
            return {name: ops.sum(term) for name, term in self.loss.terms(model, x).items()}

    def of_logits(self, likelihood):
        return self

    def _called(self, model, weights, x):
        lent = self._lent(weights)
        with lent, lent:
            return self.loss.vector(model, x), []

    def terms(self, model, weights, x):
        """The residuals by their names, without their scales."""
        lent = self._lent(weights)
        with lent, lent:
            return self.loss.terms(model, x)

    def outputs_of_example(self, model, weights, x):
        # The sizes of the sets of points may differ, and the number of residuals need not be that of the points.
        return fractions.Fraction(self.outputs(model, weights, x).shape[0], batch_size_of((x,)))

    def outputs_and_assigned(self, model, weights, x):
        lent = self._lent(weights)
        with lent, lent:
            return self.loss.vector(model, x), lent.scope.variables_assigned

    def of_outputs(self, outputs, y, sample_weight):
        return ops.sum(ops.square(outputs))

    def total(self, model, weights, x, y, sample_weight):
        loss = self.of_outputs(self.outputs(model, weights, x), y, sample_weight)
        added = self.regularization(model, weights)
        return loss if added is None else loss + ops.cast(added, loss.dtype)

    def variables_read(self, model, weights, x, y, sample_weight):
        lent = self._lent(weights)
        with lent, lent:
            self.loss.vector(model, x)
            return None if self._draws.have_drawn(lent.scope) else lent.scope.variables_read

    def of_each_output(self, outputs, y):
        return ops.square(outputs)


def residual_loss_of(model, loss):
    """The `SquaredResiduals` if `loss`, or the loss that `model` was compiled with, is one. Otherwise None."""
    found = getattr(model, "loss", None) if loss is None else loss
    return found if isinstance(found, SquaredResiduals) else None


class PointBatches(Batches):
    """Batches `(points, None, None)` for a `SquaredResiduals`. The sets of points may have different sizes."""

    def __init__(self, owner, data, must_repeat=False):
        is_one_batch = isinstance(data, (dict, tuple)) or hasattr(data, "shape")
        if data is None or isinstance(data, keras.KerasTensor):
            raise validation.refused(owner, POINTS, "data", data)
        super().__init__(owner, [data] if is_one_batch else data, 1, must_repeat)

    def _require_batch(self, batch):
        is_unpacked = isinstance(batch, dict) or hasattr(batch, "shape")
        if not is_unpacked and not (isinstance(batch, (tuple, list)) and 1 <= len(batch) <= 3):
            raise ValueError(f"{self._owner} expects {POINTS} as data. Received: {validation.describe(batch)}.")
        x, y, sample_weight = (batch, None, None) if is_unpacked else (*batch, None, None)[:3]
        points = points_of(self._owner, x, y, sample_weight)
        return require_points(self._owner, points), None, None


POINTS = "points, `x` or `(x, y)`, with an array or a dict of arrays of points as `x`, or an iterable of such batches,"


def require_points(owner, points):
    """Returns the points as tensors. Raises `ValueError` unless they are arrays of numbers of shape (points, ...)."""
    expected = f"{owner} expects arrays of shape (points, ...) as data"
    tensors = nesting.map_structure(lambda a: validation.as_tensor(_array(a), expected), points)
    leaves = nesting.flatten(tensors)
    if not leaves or not all(len(leaf.shape) for leaf in leaves):
        raise ValueError(f"{expected}. Received: {validation.describe(points)}.")
    return tensors


def _array(x):
    # Tensors of other frameworks are converted to NumPy arrays first.
    return x if x is None or ops.is_tensor(x) or not hasattr(x, "__array__") else np.asarray(x)
