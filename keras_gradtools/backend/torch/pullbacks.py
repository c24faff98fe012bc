"""Reverse mode on torch: a backward pass through the part of autograd's graph that a tape has recorded."""

import functools
import warnings

import torch

from keras_gradtools.backend.torch import batching_rules, graph, levels
from keras_gradtools.backend.torch.backward_pass import passing
from keras_gradtools.backend.torch.tape import grad_mode_outside
from keras_gradtools.keras_internals import backend_modules
from keras_gradtools.keras_state import recording

get_device = backend_modules.function("core", "get_device")


def pullback(tape, targets, sources, cotangents):
    run = single_pass if tape.keeps_graph else _last_pass
    return tape.gather(sources, lambda values: Pullback(tape, targets, values)(cotangents, run))


def constant_pullback(tape, targets, sources, cotangents):
    block = graph.GradMode(False)
    with block, block:
        return pullback(tape, targets, sources, cotangents)


def pullback_batch(tape, targets, sources, cotangents):
    return tape.gather(sources, lambda values: Pullback(tape, targets, values)(cotangents, batched_pass))


class Pullback:
    """The pullback of a tape, as a function of cotangents. The part of the graph that it needs is found only once."""

    def __init__(self, tape, targets, sources):
        if get_device() == "meta":
            # Keras first infers shapes on the device "meta", where it cuts the graph at every operation, so connected
            # tensors would seem unconnected. After an error, it infers the shapes again with values.
            raise RuntimeError(
                "A GradientTape cannot differentiate on the device 'meta', where Keras cuts the graph. Received: "
                "a call inside `keras.device('meta')`. Use a device that has memory."
            )
        levels.check(targets, sources)
        self._tape, self._targets, self._sources = tape, targets, sources
        self._target_edges, self._source_edges = tape.edges(targets, sources)
        self._wanted = list({edge: None for edge in self._source_edges if edge is not None})
        outputs = [edge for edge in self._target_edges if edge is not None]
        self._part = tape.slice(outputs) if outputs and self._wanted else None
        self._outputs = _native(outputs)

    def __call__(self, cotangents, run, is_recorded=None):
        gradients = {}
        if self._part is not None:
            if is_recorded is None:
                is_recorded = will_be_recorded(self._part, cotangents)
            upstream = tuple(u for edge, u in zip(self._target_edges, cotangents, strict=True) if edge is not None)
            block = passing(self._part, is_recorded)
            with block, block:
                given = run(self._outputs, _native(self._wanted), upstream, is_recorded)
            gradients = dict(zip(self._wanted, map(dense, given), strict=True))
        results = [gradients.get(edge) for edge in self._source_edges]
        for i, source in enumerate(self._sources):
            for target, edge, u in zip(self._targets, self._target_edges, cotangents, strict=True):
                # The derivative of a target by itself, even if this tape does not follow it.
                if target is source and (edge is None or self._source_edges[i] is None):
                    results[i] = u if results[i] is None else results[i] + u
            if results[i] is None:
                self._tape.require_unchanged(source)
        return results


def dense(gradient):
    # torch may return zero tensors without memory, which `numpy()` cannot read. A clone is an ordinary tensor.
    return gradient.clone() if gradient is not None and gradient._is_zerotensor() else gradient


def _native(edges):
    return [torch.autograd.graph.GradientEdge(*edge) for edge in edges]


def will_be_recorded(part, given):
    """Whether a result may be differentiated again, by another tape, or by torch itself outside of all tapes.

    If tensors require gradients only because of tapes, it cannot be. Then the result must not require gradients,
    because torch refuses to convert a tensor that does to a NumPy array.
    """
    return may_be_recorded(lambda: part.is_used_outside() or graph.is_used_outside(nodes_of(given)))


def may_be_recorded(is_used_outside):
    if not torch.is_grad_enabled():
        return False
    if recording.active_tapes():
        return True
    return grad_mode_outside() and is_used_outside()


def nodes_of(tensors):
    return [torch.autograd.graph.get_gradient_edge(t).node for t in tensors if t.requires_grad]


def single_pass(outputs, inputs, upstream, is_recorded):
    return torch.autograd.grad(
        outputs, inputs, upstream, retain_graph=True, create_graph=is_recorded, allow_unused=True
    )


def _last_pass(outputs, inputs, upstream, is_recorded):
    # Freeing the graph during the pass saves time, because the memory is used again.
    return torch.autograd.grad(
        outputs, inputs, upstream, retain_graph=is_recorded, create_graph=is_recorded, allow_unused=True
    )


def batched_pass(outputs, inputs, upstream, is_recorded):
    if len(upstream[0]) == 1 or levels.depth():
        # One row needs no vectorization. Inside a transform of `torch.func`, the results would be batched tensors of
        # the vectorized pass, wrapped in tensors of that transform.
        return _pass_per_row(outputs, inputs, upstream, is_recorded)
    batching_rules.install()
    try:
        # Not by `torch.vmap` or `torch.func`, which fail on convolutions in the channels-last layout.
        vectorized = levels.VectorizedPass()
        with vectorized, vectorized:
            return torch.autograd.grad(
                outputs,
                inputs,
                upstream,
                retain_graph=True,
                create_graph=is_recorded,
                allow_unused=True,
                is_grads_batched=True,
            )
    except RuntimeError as error:
        rows = _pass_per_row(outputs, inputs, upstream, is_recorded)
        warn_unvectorized(str(error).splitlines()[0])
        return rows


def _pass_per_row(outputs, inputs, upstream, is_recorded):
    rows = [single_pass(outputs, inputs, row, is_recorded) for row in zip(*upstream, strict=True)]
    return [None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True)]


@functools.cache
def warn_unvectorized(reason):
    warnings.warn(
        "torch cannot vectorize this computation. Jacobians are computed one row at a time, and per-example gradients "
        f"one example at a time, which is slower. torch said: {reason}",
        stacklevel=2,
    )
