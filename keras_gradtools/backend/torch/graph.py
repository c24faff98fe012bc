"""Finds the nodes of autograd's graph that a tape has recorded.

Autograd has one graph and no tapes, but it numbers the nodes of each thread in the order of their creation. So a tape
is a set of windows of these sequence numbers: see `windows.py`. An edge is a pair `(node, output number)`, as in
`next_functions`. The gradient of one tensor arrives there.
"""

import re

import torch

from keras_gradtools.backend.torch import levels
from keras_gradtools.backend.torch.borrowing import is_borrowed
from keras_gradtools.backend.torch.windows import LEAF
from keras_gradtools.blocks import Block


class GradMode(Block):
    """A block with another grad mode. Unlike torch's context managers, it is safe against an interrupt."""

    def __init__(self, enabled):
        self._enabled, self._before = enabled, torch.is_grad_enabled()

    def begin(self):
        torch._C._set_grad_enabled(self._enabled)

    def end(self):
        torch._C._set_grad_enabled(self._before)


def leaf_edge(tensor):
    """The edge that an operation on `tensor`, a leaf that requires gradients, would have."""
    block = GradMode(True)
    with block, block, levels.outside(tensor):
        return tensor.view_as(tensor).grad_fn.next_functions[0]


class Slice:
    """The part of the graph that is reached from some nodes through nodes of the tape.

    `recorded(number)` says whether the tape has recorded a node. `watched` maps each watched edge to the sequence
    number at which watching began.

    - `boundaries`: The first nodes that are not recorded. Gradients must stop there.
    - `early`: For each node that used a tensor before it was watched, the positions of these edges.
    - `leaves`: The nodes of all leaves that were reached.
    - `nodes`: All nodes that were reached.
    """

    def __init__(self, roots, recorded, watched):
        self.boundaries, self.early, self.leaves = [], {}, []
        self.nodes = seen = set()
        stack = []

        def meet(node):
            seen.add(node)
            number = node._sequence_nr()
            if recorded(number):
                stack.append((node, number))
            elif number == LEAF:
                require_derivative(node)
                self.leaves.append(node)
            else:
                self.boundaries.append(node)

        for node, _ in roots:
            if node not in seen:
                meet(node)
        while stack:
            node, number = stack.pop()
            for position, edge in enumerate(node.next_functions):
                following = edge[0]
                if following is None:
                    continue
                if edge in watched and number < watched[edge]:
                    self.early.setdefault(node, set()).add(position)
                if following not in seen:
                    meet(following)

    def is_used_outside(self):
        """Whether it leads to a leaf that requires gradients, but not only because of a tape."""
        return any(_requires_grad(leaf) for leaf in self.leaves) or is_used_outside(self.boundaries)


def is_used_outside(nodes):
    """As `Slice.is_used_outside`, for everything that `nodes` were computed from."""
    seen, stack = set(nodes), list(nodes)
    while stack:
        node = stack.pop()
        if node._sequence_nr() == LEAF and _requires_grad(node):
            return True
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return False


def _requires_grad(leaf):
    variable = getattr(leaf, "variable", None)
    return variable is not None and variable.requires_grad and not is_borrowed(variable)


def require_derivative(node):
    """Raises `RuntimeError` if `node` stands for an operation without derivative, which torch would silently omit."""
    if node._sequence_nr() != LEAF or hasattr(node, "variable"):
        return
    try:
        node(torch.zeros(()))
    except RuntimeError as error:
        words = str(error)
    else:
        words = node.name()
    raise RuntimeError(no_derivative(words) or _differentiable_once(words))


COMPILED = "torch.compile with aot_autograd does not currently support double backward"  # the words of torch


def no_derivative(words):
    """The error message for an operation without derivative, from torch's message `words`. None for other messages."""
    if COMPILED in words:
        return (
            "A second derivative, or a derivative in forward mode, was asked for through a function that was compiled "
            f"by `torch.compile`, and has none. Received: torch's error {words!r}. Differentiate the function itself, "
            "without `torch.compile`."
        )
    found = re.search(r"derivative for '?(?:aten::)?_?(\w+?)(_backward)?'? is not implemented", words)
    if found is None:
        return None
    operation, is_second = found.groups()
    return (
        f"torch has no {'second ' if is_second else ''}derivative of its operation `{operation}`. Received: torch's "
        f"error {words!r}. Compute it from other operations, or give it a gradient with "
        "`keras_gradtools.custom_gradient`."
    )


def _differentiable_once(words):
    return (
        "A GradientTape was asked for a second derivative through a torch.autograd.Function that is marked with "
        f"`once_differentiable`, and has none. Received: torch's error {words!r}. Write its backward pass in "
        "differentiable torch operations and remove the mark, or use `keras_gradtools.custom_gradient`."
    )


def reaches(node, recorded, watched):
    """Whether `node` depends on a watched tensor through recorded nodes."""
    seen, stack = {node}, [node]
    while stack:
        node = stack.pop()
        number = node._sequence_nr()
        if not recorded(number):
            continue
        for edge in node.next_functions:
            if edge in watched and number >= watched[edge]:
                return True
            if edge[0] is not None and edge[0] not in seen:
                seen.add(edge[0])
                stack.append(edge[0])
    return False


def leads_to(node, recorded):
    """Whether following `node` back through nodes with one input, such as views, reaches a recorded node."""
    while True:
        following = [f for f, _ in node.next_functions if f is not None]
        if len(following) != 1:
            return False
        (node,) = following
        if recorded(node._sequence_nr()):
            return True
