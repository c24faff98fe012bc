"""The hand-written PyTorch code that our code is compared with, in the style of an experienced PyTorch user."""

import functools

import keras
import torch

import keras_gradtools as kg
from benchmarks import models
from benchmarks.hand_written.torch_compiled import WithoutKeras, by_inductor, in_keras_layout
from benchmarks.models import CLASSES

_inductor = functools.partial(kg.jit, compiler="inductor")


# Otherwise Keras' own compiled step of a convolution is an error for a second batch size.
torch._dynamo.config.automatic_dynamic_shapes = False


def _plain(fun):
    return fun


# For each mode, the compiler for our code and the compiler for the hand-written code. In `fit`, the former is the
# argument `jit_compile`.
MODES = {
    "eager": (_plain, _plain),
    "self-compiled": (_plain, _plain),
    "replayed": (kg.jit, _plain),
    "inductor": (_inductor, _plain),
    "inductor, both": (_inductor, by_inductor),
    "fit": (False, _plain),
    "fit, replayed": (True, _plain),
    "fit, inductor": ("inductor", _plain),
    "fit, inductor, both": ("inductor", by_inductor),
}
# In these, the hand-written code does not use Keras.
_WITHOUT_KERAS = ("inductor", "inductor, both", "fit, inductor", "fit, inductor, both")
THREADS = "torch.set_num_threads(1), OMP_NUM_THREADS=1"


def use_one_thread():
    torch.set_num_threads(1)


def block(result):
    # On the CPU, torch computes synchronously.
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def device():
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def twin(model, mode):
    """The model for the hand-written code."""
    return WithoutKeras(model) if mode in _WITHOUT_KERAS else model


def comparable(results):
    return in_keras_layout(results)


def parameters_of(model):
    return model.parameters if isinstance(model, WithoutKeras) else [v.value for v in model.trainable_variables]


def loss_of(model):
    return model.loss if isinstance(model, WithoutKeras) else models.loss


def direction_of(model):
    return model.direction if isinstance(model, WithoutKeras) else models.direction(model)


def gradient_by_weights(model, compiler):
    parameters, loss = parameters_of(model), loss_of(model)
    return compiler(lambda x, y: torch.autograd.grad(loss(y, model(x)), parameters))


def gradient_by_inputs(model, compiler):
    loss = loss_of(model)

    def gradient(x, y):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(loss(y, model(x)), x)[0]

    return compiler(gradient)


def double_backward(model, compiler):
    parameters, loss = parameters_of(model), loss_of(model)

    def gradient(x, y):
        x = x.detach().requires_grad_()
        (by_input,) = torch.autograd.grad(loss(y, model(x)), x, create_graph=True)
        return torch.autograd.grad(by_input.square().sum(), parameters)

    return compiler(gradient)


def batch_jacobian(model, compiler):
    def jacobian(x, y):
        x = x.detach().requires_grad_()
        logits = model(x)
        basis = torch.eye(CLASSES)[:, None].expand(CLASSES, *logits.shape)
        (rows,) = torch.autograd.grad(logits, x, basis, is_grads_batched=True)
        return rows.transpose(0, 1)

    return compiler(jacobian)


def forward(model, compiler):
    return compiler(lambda x, y: model(x))


def empty_tape():
    """torch has no tape."""


def square_gradient(x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(keras.ops.multiply(x, x), x)[0]
