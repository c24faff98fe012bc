"""The hand-written PyTorch code that our code is compared with, in the style of an experienced PyTorch user."""

import keras
import torch

import keras_gradtools as kg
from benchmarks.models import CLASSES, loss

# The hand-written code is eager in every mode: `torch.compile` cannot differentiate twice.
MODES = {
    "eager": (lambda fun: fun, lambda fun: fun),
    "replayed": (kg.jit, lambda fun: fun),
    "fit": (lambda fun: fun, lambda fun: fun),
}
THREADS = "torch.set_num_threads(1), OMP_NUM_THREADS=1"


def use_one_thread():
    torch.set_num_threads(1)


def block(result):
    # On the CPU, torch computes synchronously.
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def device():
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _parameters(model):
    return [v.value for v in model.trainable_variables]


def gradient_by_weights(model, compiler):
    parameters = _parameters(model)
    return lambda x, y: torch.autograd.grad(loss(y, model(x)), parameters)


def gradient_by_inputs(model, compiler):
    def gradient(x, y):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(loss(y, model(x)), x)[0]

    return gradient


def double_backward(model, compiler):
    parameters = _parameters(model)

    def gradient(x, y):
        x = x.detach().requires_grad_()
        (by_input,) = torch.autograd.grad(loss(y, model(x)), x, create_graph=True)
        return torch.autograd.grad(by_input.square().sum(), parameters)

    return gradient


def batch_jacobian(model, compiler):
    def jacobian(x, y):
        x = x.detach().requires_grad_()
        logits = model(x)
        basis = torch.eye(CLASSES)[:, None].expand(CLASSES, *logits.shape)
        (rows,) = torch.autograd.grad(logits, x, basis, is_grads_batched=True)
        return rows.transpose(0, 1)

    return jacobian


def forward(model, compiler):
    return lambda x, y: model(x)


def empty_tape():
    """torch has no tape."""


def square_gradient(x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(keras.ops.multiply(x, x), x)[0]
