"""The loss on fixed data that a callback differentiates."""

from keras_gradtools import validation
from keras_gradtools.training.squared_residuals import SquaredResiduals


class LossOnData:
    """The arguments `data`, `variables`, `loss`, `training` and `batch_size` of a callback, checked."""

    def __init__(self, owner, data, variables, loss, training, batch_size):
        # Without a loss, the compiled one may be a `SquaredResiduals`, which takes points in a dict.
        may_be_points = isinstance(loss, SquaredResiduals) or (loss is None and isinstance(data, dict) and data)
        if not may_be_points:
            validation.require_data(owner, data)
        validation.require_variables(owner, variables)
        validation.require_loss(owner, loss)
        self._owner = owner
        self.data, self.variables, self.loss = data, variables, loss
        self.training = validation.require_flag(owner, "training", training)
        self.batch_size = validation.require_count(owner, "batch_size", batch_size)

    def operator(self, cls, model):
        """The curvature operator of this class for this model, whose errors name the callback."""
        common = (self.loss, self.data, self.variables, self.training)
        return cls.of_callback(self._owner, model, *common, batch_size=self.batch_size, verbose=0)
