"""The models of the benchmarks without Keras, and the best way that we know to compile hand-written code for PyTorch.

`torch.compile` cannot differentiate twice. `make_fx` traces the operations of all derivatives, and inductor compiles
them: https://github.com/pytorch/pytorch/issues/91469.
"""

import torch
from torch._inductor.compile_fx import compile_fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from torch.utils import _pytree

from benchmarks.models import direction

_ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "linear": lambda x: x}


class WithoutKeras:
    """A Keras model of the benchmarks in plain torch, with `parameters` in the layout of torch."""

    def __init__(self, model):
        self.parameters = [_native(v.value.detach().clone()).requires_grad_() for v in model.trainable_variables]
        self.direction = [_native(v) for v in direction(model)]
        self._layers = [(type(layer).__name__, layer.get_config()) for layer in model.layers]

    def __call__(self, x, parameters=None):
        given = iter(self.parameters if parameters is None else parameters)
        if x.dim() == 4:
            x = x.permute(0, 3, 1, 2)
        for kind, config in self._layers:
            if kind == "Dense":
                x = torch.addmm(*_swapped(x, next(given), next(given)))
            elif kind == "Conv2D":
                x = _convolution(x, next(given), next(given), config["strides"])
            elif kind in ("AveragePooling2D", "MaxPooling2D"):
                pool = functional.avg_pool2d if kind == "AveragePooling2D" else functional.max_pool2d
                x = pool(x, config["pool_size"])
            elif kind == "Flatten":
                # The order of Keras' weights.
                x = x.permute(0, 2, 3, 1).flatten(1)
            else:
                raise LookupError(f"There is no plain torch code for the layer {kind}.")
            x = _ACTIVATIONS[config.get("activation", "linear")](x)
        return x

    @staticmethod
    def loss(labels, logits):
        return functional.cross_entropy(logits, labels.long())


def _swapped(x, kernel, bias):
    return bias, x, kernel


def _convolution(x, kernel, bias, strides):
    if strides == (1, 1):
        return functional.conv2d(x, kernel, bias, padding="same")
    # As Keras pads even sizes for a stride of two and a kernel of three.
    return functional.conv2d(functional.pad(x, (0, 1, 0, 1)), kernel, bias, stride=strides)


def _native(x):
    """The kernel of a convolution in the layout of torch. Other tensors as they are."""
    return x.permute(3, 2, 0, 1).contiguous() if x.dim() == 4 else x


def in_keras_layout(results):
    """Gradients with respect to `parameters` as Keras orders them, for comparisons of values."""
    return _pytree.tree_map(_in_keras_layout, results)


def _in_keras_layout(x):
    is_kernel = isinstance(x, torch.Tensor) and x.dim() >= 4 and x.shape[-2:] == (3, 3)
    return x.movedim((-2, -1, -3, -4), (-4, -3, -2, -1)) if is_kernel else x


def by_inductor(fun, state=()):
    """Compiles a function of tensors at its first call: the operations that it runs, with all that it closes over.

    `state` are the tensors that it overwrites. Tracing leaves them as they were.
    """
    found = []

    def call(*args):
        if not found:
            before = [x.detach().clone() for x in state]
            found.append(_compiled(fun, args))
            with torch.no_grad():
                for x, value in zip(state, before, strict=True):
                    x.copy_(value)
        program, others, structure = found[0]
        with torch.no_grad():
            return _pytree.tree_unflatten(list(program(*args, *others)), structure)

    return call


def _compiled(fun, args):
    structure = None

    def flat(*args):
        nonlocal structure
        results, structure = _pytree.tree_flatten(fun(*args))
        return tuple([x.detach() for x in results])

    traced = make_fx(flat)(*args)
    # Weights and constants become arguments.
    others = []
    start = [node for node in traced.graph.nodes if node.op == "placeholder"]
    for node in [node for node in traced.graph.nodes if node.op == "get_attr"]:
        with traced.graph.inserting_after(start[-1]) if start else traced.graph.inserting_before():
            start.append(traced.graph.placeholder(f"given_{len(others)}"))
        others.append(getattr(traced, node.target))
        node.replace_all_uses_with(start[-1])
        traced.graph.erase_node(node)
    traced.recompile()
    with torch.no_grad():
        program = compile_fx(traced, [*args, *others])
    return program, others, structure
