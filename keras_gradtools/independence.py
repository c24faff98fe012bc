"""Whether the examples of a batch depend on one another: what their gradients say, and the report of it."""

import dataclasses

import numpy as np
from keras import ops

from keras_gradtools import backend, nesting, validation

# Sums in another order differ by some epsilons; the smallest statistic of a batch matters by far more.
_ROUNDING = 64


@dataclasses.dataclass(frozen=True)
class BatchIndependence:
    """What `kg.diagnostics.batch_independence` found; printed, plain sentences.

    Attributes:
        independent: whether no output of an example depends on the input of another one, but for rounding; None where
            that cannot be told from these examples and weights, for the `reason`.
        leak: the length of the gradients that cross from one example to another over that of those within an example;
            0.0 where they are exactly zero, infinity where only those that cross are not.
        layers: the names of the layers that mix the examples, in the order of their calls, with the names of the
            models and layers around them inside the model, `"inner/batch_normalization"`; a model's own where it
            mixes them between its layers. Empty where nothing mixes, or no layer is known.
        classes: the class of each of them.
        batch_size: the number of examples.
        of: the name of the model or function.
        reason: why it cannot be told; empty where it can.
        training: whether the model was called in training mode; None where the call had no such argument.
    """

    independent: bool | None
    leak: float
    layers: tuple
    classes: tuple
    batch_size: int
    of: str
    reason: str = ""
    training: bool | None = None

    def __str__(self):
        tried = f"{self.of}, tried with {self.batch_size} examples"
        if self.independent:
            if not self.leak:
                size = "no gradient crosses from one example to another"
            else:
                size = f"what crosses from one example to another is rounding, {self.leak:.1g} of what stays within one"
            return f"{tried}: the examples are independent; {size}. A batch Jacobian means what it says."
        if self.independent is None:
            mixing = f" What {self._named()} mixes has no effect here." if self.layers else ""
            return (
                f"{tried}: it cannot be told whether the examples are independent: {self.reason}.{mixing} Try it with "
                "other weights, after some training for one, or other examples."
            )
        size = (
            "gradients cross from one example to another, and none stays within one"
            if np.isinf(self.leak)
            else f"the gradients that cross from one example to another are {self.leak:.2g} times those within one"
        )
        return (
            f"{tried}: the output of an example depends on the input of others; {size}. {self._cause()} The batch "
            "Jacobian of it has the right shape and no meaning: it sums what crosses. Use the whole `jacobian`, or "
            f"{self._advice()}."
        )

    def _cause(self):
        if not self.layers:
            if self.of == RECORD:
                return (
                    "A tape knows of no layers; `keras_gradtools.diagnostics.batch_independence` of the model names "
                    "those that are the cause."
                )
            return "No layer is the cause: it is computed outside of layers."
        if len(self.layers) > 1:
            return f"The causes are {self._named()}."
        if self.of == f"the model {self.layers[0]!r}":
            return f"The cause is the model's own call, that of {self.classes[0]}."
        return f"The cause is {self._named()}."

    def _named(self):
        named = [f"{layer!r} ({cls})" for layer, cls in zip(self.layers, self.classes, strict=True)]
        if len(named) == 1:
            return f"the layer {named[0]}"
        return f"the layers {', '.join(named[:-1])} and {named[-1]}"

    def _advice(self):
        if self.training and any("Normalization" in cls for cls in self.classes):
            return "call the model with training=False, in which BatchNormalization goes by its moving statistics"
        if self.training:
            return "leave out what mixes the examples; with training=False, some layers mix none"
        if self.of == RECORD:
            return "leave out what mixes the examples: BatchNormalization in training mode, for one"
        return "leave out what mixes the examples"


RECORD = "what the tape has recorded"


def tolerance(dtype):
    """The leak that is rounding."""
    dtype = validation.dtype_of(dtype) if hasattr(dtype, "dtype") else str(dtype)
    epsilon = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}.get(dtype, 2.0**-23)
    return min(_ROUNDING * epsilon, 0.1)


def halves(batch_size, seed=0):
    """Boolean arrays that choose half of the examples: in turn, the first ones, drawn ones; and the other half of each.

    Which are neighbours, far apart, or a pair in particular: some half has the one without the other.
    """
    index = np.arange(batch_size)
    in_turn, first = index % 2 == 0, index < batch_size / 2
    drawn = np.random.default_rng(seed).permutation(batch_size) < batch_size / 2
    return [half for chosen in (in_turn, first, drawn) for half in (chosen, ~chosen)]


def numbers(x):
    """A tensor's values in double precision, or None where only a run will know them."""
    try:
        return np.asarray(ops.convert_to_numpy(ops.cast(ops.stop_gradient(x), "float32" if _is_short(x) else x.dtype)))
    except Exception:  # each framework has its own for this
        return None


class Leak:
    """The squares of what crosses and of what stays, summed up over halves."""

    def __init__(self):
        self.crossing, self.within, self.is_finite = 0.0, 0.0, True

    def add(self, values, own):
        """Adds the derivatives by all rows, of which `own` are those of the examples that they are derivatives of."""
        rows = np.asarray(values, "float64").reshape(len(own), -1)
        self.is_finite = self.is_finite and bool(np.isfinite(rows).all())
        self.crossing += float((rows[~own] ** 2).sum())
        self.within += float((rows[own] ** 2).sum())

    @property
    def is_zero(self):
        """Whether nothing crosses, and nothing stays within either: what says nothing."""
        return not self.crossing and not self.within

    @property
    def value(self):
        if not self.crossing:
            return 0.0
        return float(np.sqrt(self.crossing / self.within)) if self.within else np.inf


def of_record(tape, targets, sources, batch_size, seed=0):
    """The `Leak` of what a tape has recorded: the pullbacks of the outputs of some half of the examples.

    Of a tensor with more or fewer rows than examples, each example has its share of them, in their order.
    """
    leak, random = Leak(), np.random.default_rng(seed)
    targets = [t for t in targets if len(t.shape)]
    # Fewer rows than examples, or some that cannot be shared out, belong to no example.
    sources = [s for s in sources if s.shape[0] and s.shape[0] % batch_size == 0]
    owners = [_owners(t, batch_size) for t in targets]
    by = [_owners(s, batch_size) for s in sources]
    cotangents = [random.uniform(0.5, 1.5, tuple(t.shape)) for t in targets]
    for half in halves(batch_size, seed):
        chosen = [
            ops.convert_to_tensor(u * _along_rows(half[owner], u), dtype=t.dtype)
            for u, owner, t in zip(cotangents, owners, targets, strict=True)
        ]
        for found, owner in zip(backend.pullback(tape, targets, sources, chosen), by, strict=True):
            if found is not None:
                leak.add(numbers(found), half[owner])
    return leak


def require_of_record(name, tape, targets, sources):
    """Raises `ValueError` with a report if examples depend on one another in what a tape has recorded."""
    require_values(name, targets)
    batch_size = require_batch(name, "a target", targets)
    leak = of_record(tape, targets, sources, batch_size)
    require_finite(name, leak)
    if leak.value > tolerance(targets[0]):
        report = BatchIndependence(False, leak.value, (), (), batch_size, RECORD)
        raise ValueError(f"{name}: {report}")


def require_batch(name, role, tensors):
    """Returns the number of examples of tensors of shape `(batch, ...)`; raises `ValueError` unless it is 2 or more."""
    sizes = {x.shape[0] if len(x.shape) else 0 for x in tensors}
    if len(sizes) != 1 or not all(len(x.shape) for x in tensors):
        shapes = ", ".join(str(tuple(x.shape)) for x in tensors)
        raise ValueError(
            f"{name} expects {role} with one batch size, of shape (batch, ...). Received: the shapes {shapes}."
        )
    (size,) = sizes
    if size < 2:
        raise ValueError(
            f"{name} expects two examples or more, to see whether they depend on one another. Received: {size}."
        )
    return size


def require_finite(name, leak):
    """Raises `ValueError` where gradients that are not finite say nothing."""
    if not leak.is_finite:
        raise ValueError(
            f"{name} goes by gradients, and some of them are not finite. Expected examples for which the model and its "
            "gradient are finite."
        )


def require_values(name, tensors):
    """Raises `ValueError` inside a compiled function, where there are no values to judge by."""
    if any(numbers(x) is None for x in nesting.flatten(tensors)):
        raise ValueError(
            f"{name} judges by values, which are not known inside a compiled function. Call it eagerly, or "
            "`keras_gradtools.diagnostics.batch_independence(model, x)` before, and leave `check_independence` out "
            "here."
        )


def _owners(x, batch_size):
    rows = x.shape[0] if len(x.shape) else 1
    return np.arange(rows) * batch_size // max(rows, 1)


def _along_rows(chosen, like):
    return chosen.reshape(-1, *[1] * (like.ndim - 1))


def _is_short(x):
    return validation.dtype_of(x) in ("float16", "bfloat16")
