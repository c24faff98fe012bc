"""Hand-written training steps for PyTorch, in the style of an experienced PyTorch user."""

import keras
import torch

from benchmarks.hand_written.torch_compiled import WithoutKeras, by_inductor
from benchmarks.rows.regularized_step import (
    LEARNING_RATE,
    STEP_SIZE,
    WEIGHT,
    Handwritten,
    compiled,
    copy_of,
    example_losses,
)

BETAS, EPSILON = (0.9, 0.999), 1e-7


def double_backward(model, loss, losses, x, y):
    """The loss, the penalty and the mean norm of the input gradients."""
    size = x.shape[0]
    value = loss(y, model(x))
    (by_input,) = torch.autograd.grad(value, x, create_graph=True)
    squares = (size * by_input).square().flatten(1).sum(1)
    penalty = squares.mean()
    return value + WEIGHT * penalty, penalty, squares.detach().sqrt().mean()


def finite_difference(model, loss, losses, x, y):
    before = losses(y, model(x))
    (by_input,) = torch.autograd.grad(before.sum(), x, retain_graph=True)
    norms = by_input.flatten(1).norm(dim=1)
    shift = STEP_SIZE * by_input / norms.reshape(-1, 1, 1, 1)
    after = losses(y, model(x.detach() + shift))
    penalty = ((after - before) / STEP_SIZE).square().mean()
    return before.mean() + WEIGHT * penalty, penalty, norms.mean()


class Regularized(Handwritten):
    """A training step of Keras."""

    def __init__(self, model, objective):
        super().__init__(model)
        self.objective = objective

    def train_step(self, data):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        x = keras.ops.convert_to_tensor(x).detach().requires_grad_()
        total, penalty, norm = self.objective(
            lambda x: self(x, training=True),
            lambda y, y_pred: self.compute_loss(x=x, y=y, y_pred=y_pred),
            example_losses,
            x,
            y,
        )
        gradients = torch.autograd.grad(total, [v.value for v in self.trainable_variables])
        with torch.no_grad():
            self.optimizer.apply(gradients, self.trainable_variables)
        for metric, value in zip(self.metrics, (total, penalty, norm), strict=True):
            metric.update_state(value.detach(), sample_weight=x.shape[0])
        return self.get_metrics_result()


class _Adam:
    """Adam in basic operations, which inductor fuses. torch's own is the fastest eager one, but cannot be traced."""

    def __init__(self, parameters):
        self._parameters, self._steps = parameters, torch.zeros(())
        self._moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
        self.state = [*parameters, self._steps, *(m for pair in self._moments for m in pair)]

    def step(self, gradients):
        self._steps.add_(1)
        first, second = (1 - beta**self._steps for beta in BETAS)
        for p, (m, v), g in zip(self._parameters, self._moments, gradients, strict=True):
            m.lerp_(g, 1 - BETAS[0])
            v.lerp_(g.square(), 1 - BETAS[1])
            p.sub_(LEARNING_RATE * (m / first) / ((v / second).sqrt() + EPSILON))


class _FusedAdam:
    def __init__(self, parameters):
        self._parameters = parameters
        self._optimizer = torch.optim.Adam(parameters, LEARNING_RATE, BETAS, EPSILON, fused=True)

    def step(self, gradients):
        for p, g in zip(self._parameters, gradients, strict=True):
            # The fused kernel takes memory in order, whatever the strides.
            p.grad = g.contiguous()
        self._optimizer.step()


def _without_keras(model, compiler, objective):
    """A step that returns the loss, the penalty and the norm, as `train_on_batch` does."""
    is_compiled = compiler is by_inductor
    optimizer = (_Adam if is_compiled else _FusedAdam)(model.parameters)

    def losses(y, logits):
        return torch.nn.functional.cross_entropy(logits, y.long(), reduction="none")

    def step(x, y):
        results = objective(model, model.loss, losses, x.detach().requires_grad_(), y)
        gradients = torch.autograd.grad(results[0], model.parameters)
        with torch.no_grad():
            optimizer.step(gradients)
            return torch.stack([r.detach() for r in results])

    step = by_inductor(step, optimizer.state) if is_compiled else step
    return lambda x, y: step(x, y).tolist()


def _step(model, compiler, objective):
    if isinstance(model, WithoutKeras):
        return _without_keras(model, compiler, objective)
    return compiled(Regularized(copy_of(model), objective)).train_on_batch


def exact_step(model, compiler):
    return _step(model, compiler, double_backward)


def finite_difference_step(model, compiler):
    return _step(model, compiler, finite_difference)
