"""The checks that products and gradients are the same at every call, run once before the first one."""

import numpy as np
from keras import ops

from keras_gradtools.curvature.data import batch_sums, determinism


class Repeatability:
    """Runs the checks that a `DataSums` needs, and remembers which of them have passed."""

    def __init__(self):
        self._passed: set[str] = set()
        self._passed_in_any_order: set[str] = set()

    def require(self, sums, what):
        """Raises `ValueError` if a product, or a gradient, is not the same twice, or depends on the order of the data.

        If products repeat, gradients do, so a check of products covers both.
        """
        if not self._passed & {what, "product"}:
            self._require_same_twice(sums, what)
        if sums.batches.is_reordered and what not in self._passed_in_any_order:
            self._require_same_in_any_order(sums, what)

    def _require_same_twice(self, sums, what):
        """Raises `ValueError` if the loss has no value for each example, or if results of the first batch differ."""
        batch = next(iter(sums.batches))
        loss, weights = sums.loss.drawing(sums.draws), sums.parameters.variables_as_tensors()
        loss.require_dependent(sums.model, batch[0])
        outputs, assigned = loss.outputs_and_assigned(sums.model, weights, batch[0])
        losses = ops.convert_to_numpy(loss.of_each_output(outputs, batch[1]))
        # Seeds that belong to no layer are known only now.
        sums.draws = sums.draws.with_variables(assigned)
        first = _first_product if what == "product" else _first_gradient
        loss = sums.loss.drawing(sums.draws)
        determinism.require_same_twice(
            sums.owner, sums.model, loss, sums.parameters, batch, losses, lambda batch: first(sums, batch)
        )
        if not self._passed:
            sums.batches.look()
        self._passed.add(what)

    def _require_same_in_any_order(self, sums, what):
        """Raises `ValueError` if the order of the examples, which changes from pass to pass, changes the result."""
        joined = sums.parameters.joined_in_numpy

        def gradient():
            return ops.convert_to_numpy(sums.gradient_sums()[0][1])

        def product():
            return joined(sums.summed("product", batch_sums.add_product, sums.parameters.zeros, _direction(sums))[0])

        is_drawn = sums.spec.draws_by_batch
        computed = [gradient] if what == "gradient" else [product] if is_drawn else [product, gradient]
        determinism.require_same_in_any_order(sums.owner, sums.model, sums.loss.training, is_drawn, computed)
        self._passed_in_any_order.add(what)


def _direction(sums):
    return sums.parameters.split(np.random.default_rng(0).standard_normal(sums.parameters.size))


def _first_product(sums, batch):
    totals = None if sums.is_one_batch else sums.parameters.zeros()
    product = sums.run("product", batch_sums.add_product, totals, _direction(sums), batch, sums.seed(0))
    return sums.parameters.joined_in_numpy(product)


def _first_gradient(sums, batch):
    totals = None if sums.is_one_batch else sums.zeros_of_gradient()
    gradient = sums.run("gradient", batch_sums.add_loss_and_gradient, totals, None, batch, sums.seed(0))
    return ops.convert_to_numpy(gradient[1])
