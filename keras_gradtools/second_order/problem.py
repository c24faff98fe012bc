"""The function that a compiled `SecondOrder` minimizes."""

import functools

import numpy as np
from keras import ops

from keras_gradtools import backend, nesting
from keras_gradtools.keras_state.layer_state import state_variables
from keras_gradtools.second_order.normal_equations import NormalEquations
from keras_gradtools.second_order.second_order_optimizer import identities
from keras_gradtools.training.squared_residuals import SquaredResiduals


class Problem:
    """The function that a compiled `SecondOrder` minimizes, and the end of its steps.

    Attributes:
        weights: The `identities` of the weights.
        operator: The curvature operator, of the first batch.
        equations: The `NormalEquations` that all batches share.
    """

    def __init__(self, trainer, batch, training):
        self._trainer, self._training = trainer, training
        # Layers may be frozen or unfrozen later.
        self.weights = identities(trainer.trainable_variables)
        cls = trainer.optimizer.operator_class()
        owner = type(trainer.optimizer).__name__
        self.operator = cls.of_callback(owner, trainer, None, [batch], training=training, verbose=0)
        self.equations = NormalEquations(self.operator)
        self._residuals = trainer.loss if isinstance(trainer.loss, SquaredResiduals) else None
        # Without these, only the loss is logged, and no forward pass is needed for the metrics.
        self._needs_outputs = len(trainer.metrics) > 1 or (training and bool(state_variables(trainer.model)))
        compiled = (lambda fun: fun) if trainer.run_eagerly else backend.jit
        self._update = compiled(self._update_metrics)
        # Two functions, since a program is called faster if all of its arguments are tensors.
        self._ends = [compiled(functools.partial(self._update_and_assign, resets)) for resets in (False, True)]

    def end(self, found, operator, batch, resets=False):
        """Moves the weights, and assigns what the optimizer has for `assign_end`. Returns the logs of the batch.

        Updates metrics, normalization statistics and seeds, by the model before the step. With `resets`, the metrics
        start from zero.
        """
        trainer, optimizer = self._trainer, self._trainer.optimizer
        # Cast to the dtype of the tracker, so that one program serves every value.
        loss, arrays = np.asarray(found.loss, "float32"), optimizer.at_end()
        step = None if found.step is None else found.step.astype(operator.dtype, copy=False)
        variable = operator.variables[0]
        if not backend.is_shared_by_replicas(batch, variable):
            return dict(self._ends[resets](loss, step, arrays, *batch))
        backend.replica_results(lambda part: self._update(ops.convert_to_tensor(loss), *part), batch, variable)
        if step is not None:
            operator.move(step)
        optimizer.assign_end(*arrays)
        return dict(trainer.get_metrics_result())

    def _update_and_assign(self, resets, loss, step, arrays, *batch):
        trainer = self._trainer
        if resets:
            trainer.reset_metrics()
        self._update_metrics(ops.convert_to_tensor(loss), *batch)
        if step is not None:
            for v, value in zip(self.operator.variables, self.operator.moved(step), strict=True):
                v.assign(value)
        trainer.optimizer.assign_end(*arrays)
        return trainer.get_metrics_result()

    def _update_metrics(self, loss, x, y, sample_weight):
        trainer = self._trainer
        if self._needs_outputs and self._residuals is not None:
            self._residuals.terms(trainer.model, x)
        elif self._needs_outputs:
            y_pred = trainer.model(x, training=self._training)
            if len(trainer.metrics) > 1:
                trainer.compute_loss(x, y, y_pred, sample_weight, training=self._training)
                trainer.compute_metrics(x, y, y_pred, sample_weight)
        trainer._loss_tracker.update_state(loss, sample_weight=nesting.flatten(x)[0].shape[0])
        return ops.zeros(())
