"""The backward pass of torch's CTC loss as differentiable operations.

torch cannot differentiate its own backward pass of this loss, so second derivatives would be an error. See
`formulas`, which uses this file.
"""

import functools

import keras
import torch

from keras_gradtools.backend import ctc


def backward(node):
    """Returns the formula for the node of a CTC loss, as `formulas.of` describes it."""
    log_probabilities, losses = node._saved_log_probs, node._saved_result0.detach()
    device, blank = log_probabilities.device, node._saved_blank
    input_lengths = torch.as_tensor(node._saved_input_lengths, device=device).int()
    target_lengths = torch.as_tensor(node._saved_target_lengths, device=device).int()
    targets = node._saved_targets.to(device).int()
    if targets.dim() == 1:
        rows = targets.split(target_lengths.tolist())
        targets = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=blank)
    steps = torch.arange(len(log_probabilities), device=device)
    inside = (steps[:, None] < input_lengths)[..., None]
    unreachable = 0.0 if node._saved_zero_infinity else torch.nan

    def formula(upstream, _):
        u = upstream[0]
        if u is None:
            return (None,)
        # On the device of the loss, which need not be Keras' current one.
        with torch.enable_grad(), keras.device(str(device)):
            alias = log_probabilities.view_as(log_probabilities)
            likelihood = ctc.log_likelihood(alias, targets, target_lengths, input_lengths, blank, _fold)
            if not likelihood.requires_grad:
                return (None,)
            (expected,) = torch.autograd.grad(likelihood, alias, u, create_graph=True)
        # torch's convention: this gradient is right only if the log-probabilities come from a log-softmax.
        usual = torch.where(inside, torch.exp(log_probabilities) * u[:, None], 0.0) - expected
        return (torch.where(torch.isinf(losses)[:, None], unreachable, usual),)

    return formula


def _fold(step, first, elements):
    return functools.reduce(step, zip(*elements, strict=True), first)
