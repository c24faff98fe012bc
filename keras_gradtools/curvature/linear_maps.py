"""The curvature of one batch as a linear map, by the records of its evaluation.

Each map takes and returns a tensor for each variable: `apply` those of one vector, `apply_stack` those of a stack of
vectors on axis 0, and `rows` those of the map that belong to some elements of one variable, from that variable on: the
map is symmetric, and what comes before is in the rows of others.
"""

import copy

from keras import ops

from keras_gradtools import backend, nesting
from keras_gradtools.transforms.first_order import grad
from keras_gradtools.transforms.taped_call import TapedCall


class OfBatch:
    """What makes the map of one batch, `of_batch(model, weights, batch, seed)`, out of a loss.

    Attributes:
        loss: the `BatchLoss`.
        key: equal for two of them where the same program computes both.
        seed: of what it draws itself, an integer.
        draws_by_batch: whether that depends on the place of a batch among the others.
    """

    seed = 0
    draws_by_batch = False

    def __init__(self, loss, *options):
        self.loss = loss
        self.key = (loss.key, *options)

    def drawing(self, draws):
        """The same of the loss whose random numbers come from these `Draws`."""
        bound = copy.copy(self)
        bound.loss = self.loss.drawing(draws)
        return bound

    def of_batch(self, model, weights, batch, seed):
        """The map, at these weights."""
        raise NotImplementedError


class SecondDerivative:
    """The Hessian of `fun(sources)`, a scalar; `sources` are tensors, in any nesting."""

    def __init__(self, name, fun, sources):
        call = TapedCall(name, grad(fun), (sources,))
        call.record.keeps_graph = False
        self._name, self._fun, self._given = name, fun, sources
        self._record, self._targets, self._sources = call.record, call.flat_targets, call.flat_sources
        # A Hessian is its own transpose, if no custom gradient has made a field of it that is no gradient.
        self._is_symmetric = not call.record.has_custom_gradient
        self._is_forward = backend.HESSIAN_MODE == "forward" or not self._is_symmetric
        self._linear = None

    def keep(self):
        """Does the work that `apply` needs no vector for, once."""
        self._record.keeps_graph = True
        self._linear = backend.linearize(self._record, self._targets, self._sources, self._is_symmetric)

    def apply(self, vector):
        if self._linear is not None:
            found = self._linear(vector)
        elif self._is_forward:
            found = backend.pushforward(self._record, self._targets, self._sources, vector)
        else:
            found = backend.pullback(self._record, self._targets, self._sources, vector)
        return filled(found, self._sources)

    def gradient(self):
        """The gradient of `fun`, a tensor for each source."""
        return self._targets

    def quadratic_form(self, vector):
        """The product of `vector`, a tensor for each source, with what it is mapped to.

        Twice along a vector, a scalar has derivatives that need no pullback, which are half as dear. What was computed
        once for products is of no use to them.
        """
        if self._linear is not None:
            return sum(ops.sum(v * p) for v, p in zip(vector, self.apply(vector), strict=True))
        tangents = nesting.pack_as(self._given, vector)

        def along(sources):
            return TapedCall(self._name, self._fun, (sources,)).push(tangents)

        return TapedCall(self._name, along, (self._given,)).push(tangents)

    def apply_stack(self, stack):
        batch = backend.pushforward_batch if self._is_forward else backend.pullback_batch
        return filled(batch(self._record, self._targets, self._sources, stack), self._sources, stack[0].shape[0])

    def rows(self, place, units):
        sources = self._sources[place:]
        if self._is_forward:
            found = backend.pushforward_batch(self._record, self._targets[place:], sources[:1], [units])
        else:
            found = backend.pullback_batch(self._record, [self._targets[place]], sources, [units])
        return filled(found, sources, units.shape[0])


class Sandwich:
    """The map $J^T B J$, with $J$ the Jacobian of a call and $B$ a map of what the call returns."""

    def __init__(self, call, middle):
        call.record.keeps_graph = True
        self._record, self._targets, self._sources = call.record, call.flat_targets, call.flat_sources
        self._middle = middle

    def keep(self):
        self._middle.keep()

    def apply(self, vector):
        pushed = backend.pushforward(self._record, self._targets, self._sources, vector)
        upstream = self._middle.apply(filled(pushed, self._targets))
        return filled(backend.pullback(self._record, self._targets, self._sources, upstream), self._sources)

    def apply_stack(self, stack):
        pushed = backend.pushforward_batch(self._record, self._targets, self._sources, stack)
        return self._pulled(pushed, self._sources, stack[0].shape[0])

    def rows(self, place, units):
        sources = self._sources[place:]
        pushed = backend.pushforward_batch(self._record, self._targets, sources[:1], [units])
        return self._pulled(pushed, sources, units.shape[0])

    def _pulled(self, pushed, sources, count):
        upstream = self._middle.apply_stack(filled(pushed, self._targets, count))
        return filled(backend.pullback_batch(self._record, self._targets, sources, upstream), sources, count)


class OuterProducts:
    r"""The mean over some samples of the maps $v \mapsto a (c \cdot v)$, the product over the last axis.

    Args:
        samples: pairs of tensors, a and c.
        has_last_axis: whether there is that axis; else, the elements of both are numbers of one example each.
    """

    def __init__(self, samples, has_last_axis):
        self._samples, self._has_last_axis = samples, has_last_axis

    def keep(self):
        pass

    def apply(self, vector):
        (v,) = vector
        return [sum(a * self._contracted(c * v) for a, c in self._samples) / len(self._samples)]

    def _contracted(self, x):
        return ops.sum(x, axis=-1, keepdims=True) if self._has_last_axis else x

    def apply_stack(self, stack):
        (v,) = stack
        # One after the other: of a sum over products of a whole stack, XLA on the processor (JAX 0.10) was seen to make
        # a program that has the last vectors wrong.
        return [ops.stack([self.apply([v[i]])[0] for i in range(v.shape[0])])]


class Sum:
    """The sum of maps."""

    def __init__(self, *maps):
        self._maps = maps

    def keep(self):
        for part in self._maps:
            part.keep()

    def apply(self, vector):
        return _added([part.apply(vector) for part in self._maps])

    def apply_stack(self, stack):
        return _added([part.apply_stack(stack) for part in self._maps])

    def rows(self, place, units):
        return _added([part.rows(place, units) for part in self._maps])


def filled(found, like, count=None):
    """`found` with zeros in place of None, behind an axis of `count` in a stack."""
    stack = () if count is None else (count,)
    return [
        ops.zeros((*stack, *ops.shape(x)), dtype=x.dtype) if y is None else y for y, x in zip(found, like, strict=True)
    ]


def taped(name, fun, weights):
    """The record of `fun(weights)`."""
    return TapedCall(name, fun, (weights,))


def packed_like(call, flat):
    """Flat tensors in the structure of what a call returned."""
    return nesting.pack_as(call.target, flat)


def _added(results):
    return [sum(column[1:], column[0]) for column in zip(*results, strict=True)]
