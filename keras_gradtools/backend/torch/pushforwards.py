"""Forward mode on torch, by the pullback of a pullback."""

import torch

from keras_gradtools.backend.torch import borrowing, graph
from keras_gradtools.backend.torch.backward_pass import passing
from keras_gradtools.backend.torch.pullbacks import (
    Pullback,
    batched_pass,
    dense,
    nodes_of,
    single_pass,
    will_be_recorded,
)


def pushforward_batch(tape, targets, sources, tangents):
    return _Linear(tape, targets, sources).push(tangents, batched_pass)


def linearize(tape, targets, sources, is_symmetric=False):
    if is_symmetric:
        # For a symmetric matrix, the pullback is the pushforward, which would need a second pullback.
        _, values, _ = tape.spread(sources, sources)
        pull = Pullback(tape, targets, values)
        return lambda tangents: tape.gather(sources, lambda _: pull(tangents, single_pass))
    linear = _Linear(tape, targets, sources)
    return lambda tangents: linear.push(tangents, single_pass)


# NaN entries of a tangent are computed again only if there are at most this many. Each needs a row of the Jacobian.
_MOST_ROWS = 1024


def _has_nan(x):
    try:
        return bool(torch.isnan(x).any())
    except RuntimeError:
        return False  # a tensor without values, while it is traced


class _Linear:
    """The pushforward of a tape, as a function of tangents.

    A pullback is linear in its cotangents, so its own pullback is the pushforward. torch's forward mode cannot be used,
    because it would have to be active while the block runs.
    """

    def __init__(self, tape, targets, sources):
        self._targets = len(targets)
        _, values, places = tape.spread(sources, range(len(sources)))
        self._outputs, self._places = targets, places
        self._pullback = Pullback(tape, targets, values)
        self._cotangents = [torch.zeros_like(t) for t in targets]
        block = borrowing.Borrowing(self._cotangents)
        with block, block:
            gradients = self._pullback(self._cotangents, single_pass, is_recorded=True)
            self._connected = [
                (g, place) for g, place in zip(gradients, places, strict=True) if g is not None and g.requires_grad
            ]

    def push(self, tangents, run):
        if not self._connected:
            return [None] * self._targets
        gradients = [g for g, _ in self._connected]
        along = [tangents[place] for _, place in self._connected]
        block = borrowing.Borrowing(self._cotangents)
        with block, block:
            part = graph.Slice([(node, 0) for node in nodes_of(gradients)], lambda number: False, {})
            is_recorded = will_be_recorded(part, along)
            part.boundaries = []
            one_pass = passing(part, is_recorded)
            with one_pass, one_pass:
                pushed = [dense(p) for p in run(gradients, self._cotangents, along, is_recorded)]
        return [self._mended(i, p, tangents, run) if p is not None and _has_nan(p) else p for i, p in enumerate(pushed)]

    def _mended(self, target, pushed, tangents, run):
        """Replaces the NaN entries in the tangent of one target by entries from rows of the Jacobian.

        Where the gradient of an operation is singular but does not matter (`std` of equal numbers), torch masks it. The
        pullback of that gradient meets the masked infinity and gives NaN. A row of the Jacobian, a single pullback,
        does not.
        """
        output = self._outputs[target]
        is_stack = run is batched_pass
        missing = torch.isnan(pushed).reshape(-1, output.numel()).any(0).nonzero()[:, 0]
        if len(missing) > _MOST_ROWS:
            return pushed
        units = torch.nn.functional.one_hot(missing, output.numel()).to(output.dtype).reshape(-1, *output.shape)
        cotangents = [output.new_zeros((len(missing), *output.shape)) for output in self._outputs]
        cotangents[target] = units
        pulled = self._pullback(cotangents, batched_pass)
        found = 0
        for rows, place in zip(pulled, self._places, strict=True):
            if rows is not None:
                v = tangents[place].reshape(len(pushed) if is_stack else 1, -1)
                found = found + v @ rows.reshape(len(missing), -1).transpose(0, 1)
        flat = pushed.reshape(-1, output.numel())
        mended = flat.index_copy(1, missing, torch.where(torch.isnan(flat[:, missing]), found, flat[:, missing]))
        return mended.reshape(pushed.shape)
