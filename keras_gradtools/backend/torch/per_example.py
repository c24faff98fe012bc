"""Gradients for each example of a batch on torch, by `torch.vmap` or, where that is not possible, one by one."""

import torch

from keras_gradtools.backend.torch.pullbacks import may_be_recorded, pullback, warn_unvectorized
from keras_gradtools.backend.torch.tape import Tape
from keras_gradtools.backend.torch.unfused import Unfused


def per_example_gradients(fun, weights, examples, must_vectorize=False):
    # A tape cannot record inside `torch.vmap`, so the gradient is that of `torch.func`.
    mapped = torch.vmap(torch.func.grad(fun, has_aux=True), in_dims=(None, 0), randomness="same")
    try:
        if not may_be_recorded(lambda: any(x.requires_grad for x in (*weights, *examples))):
            found = mapped(weights, examples)
            if not any(x.requires_grad for part in found for x in part):
                return found
        with Unfused():
            return mapped(weights, examples)
    except (RuntimeError, AttributeError) as error:
        if must_vectorize:
            raise
        rows = [_gradients(fun, weights, [x[i] for x in examples]) for i in range(len(examples[0]))]
        warn_unvectorized(str(error).strip().splitlines()[0])
        return tuple([torch.stack(column) for column in zip(*part, strict=True)] for part in zip(*rows, strict=True))


def _gradients(fun, weights, example):
    tape = Tape(watch_accessed_variables=False)
    with tape, tape:
        for w in weights:
            tape.watch(w)
        value, aux = fun(weights, example)
    gradients = pullback(tape, [value], weights, [torch.ones_like(value)])
    return [torch.zeros_like(w) if g is None else g for g, w in zip(gradients, weights, strict=True)], aux
