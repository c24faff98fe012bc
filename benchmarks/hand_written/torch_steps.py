"""Hand-written training steps for PyTorch, in the style of an experienced PyTorch user."""

import keras
import torch

from benchmarks.rows.regularized_step import STEP_SIZE, WEIGHT, Handwritten, compiled, copy_of, example_losses


class Regularized(Handwritten):
    """A training step on an objective that subclasses define."""

    def objective(self, x, y):
        raise NotImplementedError

    def train_step(self, data):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        x = keras.ops.convert_to_tensor(x).detach().requires_grad_()
        total, penalty, norm = self.objective(x, y)
        gradients = torch.autograd.grad(total, [v.value for v in self.trainable_variables])
        with torch.no_grad():
            self.optimizer.apply(gradients, self.trainable_variables)
        for metric, value in zip(self.metrics, (total, penalty, norm), strict=True):
            metric.update_state(value.detach(), sample_weight=x.shape[0])
        return self.get_metrics_result()


class DoubleBackward(Regularized):
    def objective(self, x, y):
        size = x.shape[0]
        value = self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
        (by_input,) = torch.autograd.grad(value, x, create_graph=True)
        squares = (size * by_input).square().flatten(1).sum(1)
        penalty = squares.mean()
        return value + WEIGHT * penalty, penalty, squares.detach().sqrt().mean()


class FiniteDifference(Regularized):
    def objective(self, x, y):
        losses = example_losses(y, self(x, training=True))
        (by_input,) = torch.autograd.grad(losses.sum(), x, retain_graph=True)
        norms = by_input.flatten(1).norm(dim=1)
        shift = STEP_SIZE * by_input / norms.reshape(-1, 1, 1, 1)
        further = example_losses(y, self(x.detach() + shift, training=True))
        penalty = ((further - losses) / STEP_SIZE).square().mean()
        return losses.mean() + WEIGHT * penalty, penalty, norms.mean()


def exact_step(model, compiler):
    return compiled(DoubleBackward(copy_of(model))).train_on_batch


def finite_difference_step(model, compiler):
    return compiled(FiniteDifference(copy_of(model))).train_on_batch
