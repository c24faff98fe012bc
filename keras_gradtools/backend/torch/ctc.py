"""The backward pass of torch's CTC loss as differentiable operations.

torch cannot differentiate its own backward pass of this loss, so second derivatives would be an error. See
`formulas`, which uses this file.
"""

import torch

# Stands for the logarithm of zero. It is finite, because an infinite one would make derivatives NaN.
_NEVER = -1e30


def backward(node):
    """Returns the formula for the node of a CTC loss, as `formulas.of` describes it."""
    log_probabilities, losses = node._saved_log_probs, node._saved_result0.detach()
    device = log_probabilities.device
    input_lengths = torch.as_tensor(node._saved_input_lengths, device=device).long()
    target_lengths = torch.as_tensor(node._saved_target_lengths, device=device).long()
    states, can_skip = _states(node._saved_targets.to(device).long(), target_lengths, node._saved_blank)
    steps = torch.arange(len(log_probabilities), device=device)
    inside = (steps[:, None] < input_lengths)[..., None]
    unreachable = 0.0 if node._saved_zero_infinity else torch.nan

    def formula(upstream, _):
        u = upstream[0]
        if u is None:
            return (None,)
        with torch.enable_grad():
            alias = log_probabilities.view_as(log_probabilities)
            likelihood = _log_likelihood(alias, states, can_skip, input_lengths, target_lengths)
            if not likelihood.requires_grad:
                return (None,)
            (expected,) = torch.autograd.grad(likelihood, alias, u, create_graph=True)
        # torch's convention: this gradient is right only if the log-probabilities come from a log-softmax.
        usual = torch.where(inside, torch.exp(log_probabilities) * u[:, None], 0.0) - expected
        return (torch.where(torch.isinf(losses)[:, None], unreachable, usual),)

    return formula


def _states(targets, lengths, blank):
    """The labels with a blank before and after each, of shape `(batch, 2 * length + 1)`, and a mask of that shape.

    The mask says which states can follow the state two places before, so that a path skips the blank between them.
    """
    if targets.dim() == 1:
        rows = targets.split(lengths.tolist())
        targets = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=blank)
    states = torch.full((targets.shape[0], 2 * targets.shape[1] + 1), blank, device=targets.device)
    valid = torch.arange(targets.shape[1], device=targets.device) < lengths[:, None]
    states[:, 1::2] = torch.where(valid, targets, blank)
    can_skip = torch.zeros_like(states, dtype=torch.bool)
    can_skip[:, 2:] = (states[:, 2:] != blank) & (states[:, 2:] != states[:, :-2])
    return states, can_skip


def _log_likelihood(log_probabilities, states, can_skip, input_lengths, target_lengths):
    """The forward algorithm of Graves et al., "Connectionist temporal classification" (2006), section 4.1."""
    count = states.shape[1]
    emitted = torch.gather(log_probabilities, 2, states.expand(len(log_probabilities), *states.shape))
    never = torch.full_like(emitted[0], _NEVER)
    reached = torch.where(torch.arange(count, device=states.device) < 2, emitted[0], never)
    for t in range(1, len(emitted)):
        before = torch.cat([never[:, :1], reached[:, :-1]], 1)[:, :count]
        skipped = torch.where(can_skip, torch.cat([never[:, :2], reached[:, :-2]], 1)[:, :count], never)
        step = torch.logsumexp(torch.stack([reached, before, skipped]), 0) + emitted[t]
        reached = torch.where((t < input_lengths)[:, None], step, reached)
    last = torch.gather(reached, 1, 2 * target_lengths[:, None])
    label = torch.gather(reached, 1, (2 * target_lengths[:, None] - 1).clamp(min=0))
    label = torch.where(target_lengths[:, None] > 0, label, torch.full_like(label, _NEVER))
    return torch.logsumexp(torch.cat([last, label], 1), 1)
