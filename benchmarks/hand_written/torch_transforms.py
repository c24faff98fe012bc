"""The hand-written PyTorch counterparts of the transforms. `torch.py` has those of the tape.

Each is the fastest of several versions: reverse over reverse for products with the Hessian (forward mode and
`torch.func` took longer) and for Jacobian-vector products, chunks that fit into the cache for Hessians, and
`torch.func` for per-example gradients.
"""

import keras
import torch

from benchmarks.hand_written.torch import direction_of, loss_of, parameters_of
from benchmarks.hand_written.torch_compiled import WithoutKeras
from benchmarks.models import HESSIAN_CHUNK, HESSIAN_KERNEL
from benchmarks.rows import with_preparation
from benchmarks.rows.curvature import batches_of


def _basis(x):
    return torch.eye(x.numel()).reshape(-1, *x.shape)


def gradient_of_sum_by_inputs(model, compiler):
    def gradient(x, y):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(model(x).sum(), x)[0]

    return compiler(gradient)


def jacobian(model, compiler):
    def rows(x, y):
        x = x.detach().requires_grad_()
        outputs = model(x)
        (pulled,) = torch.autograd.grad(outputs, x, _basis(outputs), is_grads_batched=True)
        return pulled.reshape(*outputs.shape, *x.shape)

    return compiler(rows)


def jacobian_of_decoder(model, compiler):
    """Forward mode by two vjps: a vjp is linear in its cotangent, and the vjp of that linear function is a jvp."""

    def columns(x, y):
        x = x.detach().requires_grad_()
        outputs = model(x)
        cotangent = torch.zeros_like(outputs, requires_grad=True)
        (pulled,) = torch.autograd.grad(outputs, x, cotangent, create_graph=True)
        (pushed,) = torch.autograd.grad(pulled, cotangent, _basis(x), is_grads_batched=True)
        return pushed.reshape(x.numel(), -1).T.reshape(*outputs.shape, *x.shape)

    return compiler(columns)


def _hessian(model, x, y, chunk_size):
    kernel = parameters_of(model)[HESSIAN_KERNEL]
    (gradient,) = torch.autograd.grad(loss_of(model)(y, model(x)), kernel, create_graph=True)
    rows = [
        torch.autograd.grad(gradient, kernel, chunk, is_grads_batched=True, retain_graph=True)[0]
        for chunk in _basis(kernel).split(chunk_size)
    ]
    return torch.cat(rows).reshape(*kernel.shape, *kernel.shape)


def hessian(model, compiler):
    return compiler(lambda x, y: _hessian(model, x, y, parameters_of(model)[HESSIAN_KERNEL].numel()))


def hessian_in_chunks(model, compiler):
    return compiler(lambda x, y: _hessian(model, x, y, HESSIAN_CHUNK))


def hvp(model, compiler):
    parameters, v = parameters_of(model), direction_of(model)

    def product(x, y):
        gradient = torch.autograd.grad(loss_of(model)(y, model(x)), parameters, create_graph=True)
        return torch.autograd.grad(gradient, parameters, v)

    return compiler(product)


def linearized_hvp(model, compiler):
    parameters, v = parameters_of(model), direction_of(model)

    def prepare(x, y):
        gradient = torch.autograd.grad(loss_of(model)(y, model(x)), parameters, create_graph=True)
        return compiler(lambda: torch.autograd.grad(gradient, parameters, v, retain_graph=True))

    return with_preparation(prepare)


def ggnvp(model, compiler):
    parameters, v = parameters_of(model), direction_of(model)

    def product(x, y):
        outputs = model(x)
        cotangent = torch.zeros_like(outputs, requires_grad=True)
        pulled = torch.autograd.grad(outputs, parameters, cotangent, create_graph=True)
        # Keep the graph of the model for the vjp at the end.
        (pushed,) = torch.autograd.grad(pulled, cotangent, v, retain_graph=True)
        held = outputs.detach().requires_grad_()
        (by_outputs,) = torch.autograd.grad(loss_of(model)(y, held), held, create_graph=True)
        (curved,) = torch.autograd.grad(by_outputs, held, pushed)
        return torch.autograd.grad(outputs, parameters, curved)

    return compiler(product)


def per_example_gradients(model, compiler):
    """By `vmap`. Keras' convolution works under it only because the package patches it, so both sides profit."""
    parameters, loss = parameters_of(model), loss_of(model)

    def outputs(parameters, x):
        if isinstance(model, WithoutKeras):
            return model(x, parameters)
        with keras.StatelessScope(state_mapping=zip(model.trainable_variables, parameters, strict=True)):
            return model(x)

    def value(parameters, x, y):
        return loss(y[None], outputs(parameters, x[None]))

    vectorized = torch.func.vmap(torch.func.grad(value), in_dims=(None, 0, 0))
    return compiler(lambda x, y: vectorized(parameters, x, y))


def _over_batches(product):
    """The mean of a product over all examples of several batches."""

    def prepare(x, y):
        batches = batches_of(x, y)
        count = sum(len(x) for x, _ in batches)

        def run():
            totals = None
            for x, y in batches:
                found = [len(x) * p for p in product(x, y)]
                totals = found if totals is None else [a.add_(b) for a, b in zip(totals, found, strict=True)]
            return [a.div_(count) for a in totals]

        return run

    return with_preparation(prepare)


def accumulated_hvp(model, compiler):
    return _over_batches(hvp(model, compiler))


def accumulated_ggnvp(model, compiler):
    return _over_batches(ggnvp(model, compiler))


def dense_hessian(model, compiler):
    """Computes the rows of one variable after another: fewer backward paths than for all variables at once."""
    parameters = parameters_of(model)

    def matrix(x, y):
        rows = []
        gradient = torch.autograd.grad(loss_of(model)(y, model(x)), parameters, create_graph=True)
        for part in gradient:
            for units in _basis(part).split(HESSIAN_CHUNK):
                found = torch.autograd.grad(
                    part, parameters, units, is_grads_batched=True, retain_graph=True, materialize_grads=True
                )
                rows.append(torch.cat([f.reshape(len(units), -1) for f in found], 1))
        return torch.cat(rows).numpy()

    return matrix
