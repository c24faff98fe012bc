"""The curvature of one batch as a linear map, from recorded evaluations.

Each map takes and returns one tensor for each variable. `apply` multiplies one vector, and `apply_stack` a stack of
vectors along axis 0. `rows` returns the rows that belong to some elements of one variable, for the columns of this and
the later variables. Since the map is symmetric, the other columns are in the rows of earlier variables.
"""

import copy

from keras import ops

from keras_gradtools import backend, nesting
from keras_gradtools.transforms.first_order import grad
from keras_gradtools.transforms.taped_call import TapedCall


class OfBatch:
    """Makes the linear map of one batch from a loss.

    Attributes:
        loss: The `BatchLoss`.
        key: Equal for two instances if one program can compute both.
        seed: An integer that seeds the random numbers that the map itself draws, in addition to those of the model.
        draws_by_batch: Whether these numbers depend on the position of a batch in the data.
    """

    seed = 0
    draws_by_batch = False

    def __init__(self, loss, *options):
        self.loss = loss
        self.key = (loss.key, *options)

    def drawing(self, draws):
        """A copy of this map maker that takes its random numbers from these `Draws`."""
        bound = copy.copy(self)
        bound.loss = self.loss.drawing(draws)
        return bound

    def of_batch(self, model, weights, batch, seed):
        """The map at these weights."""
        raise NotImplementedError


class SecondDerivative:
    """The Hessian of the scalar `fun(sources)`. `sources` are tensors in any nested structure."""

    def __init__(self, name, fun, sources):
        call = TapedCall(name, grad(fun), (sources,))
        call.tape.keeps_graph = False
        self._name, self._fun, self._given = name, fun, sources
        self._tape, self._targets, self._sources = call.tape, call.flat_targets, call.flat_sources
        # A Hessian is symmetric, unless a custom gradient returns something that is not the gradient of any function.
        self._is_symmetric = not call.tape.has_custom_gradient
        self._is_forward = backend.HESSIAN_MODE == "forward" or not self._is_symmetric
        self._linear = None

    def linearize(self):
        """Computes once what every call of `apply` needs."""
        self._tape.keeps_graph = True
        self._linear = backend.linearize(self._tape, self._targets, self._sources, self._is_symmetric)

    def apply(self, vector):
        if self._linear is not None:
            found = self._linear(vector)
        elif self._is_forward:
            found = backend.pushforward(self._tape, self._targets, self._sources, vector)
        else:
            found = backend.pullback(self._tape, self._targets, self._sources, vector)
        return filled(found, self._sources)

    def gradient(self):
        """The gradient of `fun`, a tensor for each source."""
        return self._targets

    def quadratic_form(self, vector):
        """The quadratic form v' H v for a vector v, given as a tensor for each source.

        Two nested jvps compute it without a reverse pass, at about half the cost of a product. They cannot use what
        `linearize` has computed. So after `linearize`, the form is computed from a product.
        """
        if self._linear is not None:
            return sum(ops.sum(v * p) for v, p in zip(vector, self.apply(vector), strict=True))
        tangents = nesting.pack_as(self._given, vector)

        def along(sources):
            return TapedCall(self._name, self._fun, (sources,)).jvp(tangents)

        return TapedCall(self._name, along, (self._given,)).jvp(tangents)

    def apply_stack(self, stack):
        batch = backend.pushforward_batch if self._is_forward else backend.pullback_batch
        return filled(batch(self._tape, self._targets, self._sources, stack), self._sources, stack[0].shape[0])

    def rows(self, place, units):
        sources = self._sources[place:]
        if self._is_forward:
            found = backend.pushforward_batch(self._tape, self._targets[place:], sources[:1], [units])
        else:
            found = backend.pullback_batch(self._tape, [self._targets[place]], sources, [units])
        return filled(found, sources, units.shape[0])


class Sandwich:
    """The map $J^T B J$, where $J$ is the Jacobian of a call and $B$ a linear map on its outputs."""

    def __init__(self, call, middle):
        call.tape.keeps_graph = True
        self._tape, self._targets, self._sources = call.tape, call.flat_targets, call.flat_sources
        self._middle = middle

    def linearize(self):
        self._middle.linearize()

    def apply(self, vector):
        tangents = backend.pushforward(self._tape, self._targets, self._sources, vector)
        cotangents = self._middle.apply(filled(tangents, self._targets))
        return filled(backend.pullback(self._tape, self._targets, self._sources, cotangents), self._sources)

    def apply_stack(self, stack):
        tangents = backend.pushforward_batch(self._tape, self._targets, self._sources, stack)
        return self._carried_back(tangents, self._sources, stack[0].shape[0])

    def rows(self, place, units):
        sources = self._sources[place:]
        tangents = backend.pushforward_batch(self._tape, self._targets, sources[:1], [units])
        return self._carried_back(tangents, sources, units.shape[0])

    def _carried_back(self, tangents, sources, count):
        cotangents = self._middle.apply_stack(filled(tangents, self._targets, count))
        return filled(backend.pullback_batch(self._tape, self._targets, sources, cotangents), sources, count)


class OuterProducts:
    r"""The mean over samples of the maps $v \mapsto a (c \cdot v)$, with the dot product over the last axis.

    Args:
        samples: Pairs of tensors, a and c.
        has_last_axis: Whether the tensors have that axis. If not, each element is a number for one example.
    """

    def __init__(self, samples, has_last_axis):
        self._samples, self._has_last_axis = samples, has_last_axis

    def linearize(self):
        pass

    def apply(self, vector):
        (v,) = vector
        return [sum(a * self._contracted(c * v) for a, c in self._samples) / len(self._samples)]

    def _contracted(self, x):
        return ops.sum(x, axis=-1, keepdims=True) if self._has_last_axis else x

    def apply_stack(self, stack):
        (v,) = stack
        # One vector after the other, because for a whole stack XLA on the CPU (JAX 0.10) has computed wrong results for
        # the last vectors.
        return [ops.stack([self.apply([v[i]])[0] for i in range(v.shape[0])])]


class Sum:
    """The sum of linear maps of the same variables."""

    def __init__(self, *maps):
        self._maps = maps

    def linearize(self):
        for part in self._maps:
            part.linearize()

    def apply(self, vector):
        return _added([part.apply(vector) for part in self._maps])

    def apply_stack(self, stack):
        return _added([part.apply_stack(stack) for part in self._maps])

    def rows(self, place, units):
        return _added([part.rows(place, units) for part in self._maps])


def filled(found, like, count=None):
    """`found` with zeros in place of None. With `count`, the zeros have a leading stack axis of that size."""
    stack = () if count is None else (count,)
    return [
        ops.zeros((*stack, *ops.shape(x)), dtype=x.dtype) if y is None else y for y, x in zip(found, like, strict=True)
    ]


def taped(name, fun, weights):
    """The `TapedCall` of `fun(weights)`."""
    return TapedCall(name, fun, (weights,))


def _added(results):
    return [sum(column[1:], column[0]) for column in zip(*results, strict=True)]
