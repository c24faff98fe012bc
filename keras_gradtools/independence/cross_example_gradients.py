"""Whether the examples of a batch depend on one another, as shown by gradients, and the report about it."""

import dataclasses

import numpy as np
from keras import ops

from keras_gradtools import backend, nesting, validation
from keras_gradtools.display.results import displayed, field_table
from keras_gradtools.example_norms import numbers

# In epsilons. Sums in a different order differ by a few of them. Any statistic of a batch has a far larger effect.
_ROUNDING = 64


@displayed
@dataclasses.dataclass(frozen=True)
class BatchIndependence:
    """What `kg.diagnostics.batch_independence` found. Its string form is a report in plain sentences.

    Attributes:
        independent: True if no example's output depends on another example's input, up to rounding. False if one does.
            None if these examples and weights cannot decide it. `reason` says why.
        leak: The norm of the gradients between different examples, divided by the norm of the gradients within
            examples. 0.0 if no gradient crosses between examples, infinity if none stays within one.
        layers: The names of the layers that mix the examples, in call order, with the path inside the model, such as
            `"inner/batch_normalization"`. If a model mixes them outside of its layers, its own name. Empty if nothing
            mixes them or no layer is known.
        classes: The class name of each of these layers.
        batch_size: Number of examples.
        of: Description of the model or function, with its name.
        reason: Why `independent` is None, otherwise empty.
        training: Whether the model was called in training mode. None if the call had no such argument.
    """

    independent: bool | None
    leak: float
    layers: tuple[str, ...]
    classes: tuple[str, ...]
    batch_size: int
    of: str
    reason: str = ""
    training: bool | None = None

    def __str__(self) -> str:
        tried = f"{self.of}, tried with {self.batch_size} examples"
        if self.independent:
            if not self.leak:
                size = "no gradient crosses from one example to another"
            else:
                size = (
                    f"the gradients between examples are rounding noise, {self.leak:.1g} times those within an example"
                )
            return f"{tried}: the examples are independent; {size}. A batch Jacobian is correct."
        if self.independent is None:
            mixing = f" The examples are mixed by {self._named()}, without an effect here." if self.layers else ""
            return (
                f"{tried}: the test cannot decide whether the examples are independent: {self.reason}.{mixing} Try "
                "other weights, for instance after some training, or other examples."
            )
        size = (
            "gradients cross from one example to another, and none stays within one"
            if np.isinf(self.leak)
            else f"the gradients that cross from one example to another are {self.leak:.2g} times those within one"
        )
        return (
            f"{tried}: the output of an example depends on the input of others; {size}. {self._cause()} The batch "
            "Jacobian has the right shape but no meaning, because it sums over derivatives between examples. Use the "
            f"full `jacobian`, or {self._advice()}."
        )

    def _parts(self):
        return [str(self), field_table(self)]

    def _cause(self):
        if not self.layers:
            if self.of == RECORDED:
                return (
                    "A tape does not know layers. `keras_gradtools.diagnostics.batch_independence` names the layers of "
                    "a model that are the cause."
                )
            return "No layer is the cause: the examples are mixed outside of layers."
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
            return "call the model with training=False, so that BatchNormalization uses its moving statistics"
        if self.training:
            return "remove what mixes the examples (some layers do not mix them with training=False)"
        if self.of == RECORDED:
            return "remove what mixes the examples, such as BatchNormalization in training mode"
        return "remove what mixes the examples"


RECORDED = "what the tape has recorded"


def tolerance(dtype):
    """The largest leak that counts as rounding."""
    dtype = validation.dtype_of(dtype) if hasattr(dtype, "dtype") else str(dtype)
    epsilon = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}.get(dtype, 2.0**-23)
    return min(_ROUNDING * epsilon, 0.1)


def halves(batch_size, seed=0):
    """Boolean arrays that each choose half of the examples: every other one, the first half, a random half.

    The complement of each is included. So for most pairs of examples, whether neighbors or far apart, some half
    contains one without the other.
    """
    index = np.arange(batch_size)
    in_turn, first = index % 2 == 0, index < batch_size / 2
    drawn = np.random.default_rng(seed).permutation(batch_size) < batch_size / 2
    return [half for chosen in (in_turn, first, drawn) for half in (chosen, ~chosen)]


def known_numbers(x):
    """A tensor as a NumPy array in double precision, or None inside a compiled function."""
    try:
        return numbers(ops.stop_gradient(x))
    except Exception:  # each framework raises its own class
        return None


class Leak:
    """The sums of squared derivatives between examples and within examples, accumulated over halves of the batch."""

    def __init__(self):
        self.crossing, self.within, self.is_finite = 0.0, 0.0, True

    def add(self, values, own):
        """Adds derivatives with respect to all rows. `own` selects the rows of the examples that are differentiated."""
        rows = values.reshape(len(own), -1)
        self.is_finite = self.is_finite and bool(np.isfinite(rows).all())
        self.crossing += float((rows[~own] ** 2).sum())
        self.within += float((rows[own] ** 2).sum())

    @property
    def is_zero(self):
        """Whether all derivatives are zero, which shows nothing about independence."""
        return not self.crossing and not self.within

    @property
    def value(self):
        if not self.crossing:
            return 0.0
        return float(np.sqrt(self.crossing / self.within)) if self.within else np.inf


def of_tape(tape, targets, sources, batch_size, seed=0):
    """The `Leak` of recorded operations, from the gradients of the outputs of half of the examples at a time.

    The rows of a tensor are divided evenly among the examples, in order, if there are more or fewer rows than examples.
    """
    leak, random = Leak(), np.random.default_rng(seed)
    targets = [t for t in targets if len(t.shape)]
    # Sources whose rows cannot be divided evenly among the examples belong to no example.
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
                leak.add(known_numbers(found), half[owner])
    return leak


def require_independence(name, tape, targets, sources):
    """Raises `ValueError` with a report if examples depend on one another in the recorded operations of a tape."""
    require_values(name, targets)
    batch_size = require_batch(name, "a target", targets)
    leak = of_tape(tape, targets, sources, batch_size)
    require_finite(name, leak)
    if leak.value > tolerance(targets[0]):
        report = BatchIndependence(False, leak.value, (), (), batch_size, RECORDED)
        raise ValueError(f"{name}: {report}")


def require_batch(name, role, tensors):
    """Returns the batch size of tensors of shape `(batch, ...)`. Raises `ValueError` unless it is 2 or more."""
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
    """Raises `ValueError` if a gradient is not finite, so that it shows nothing."""
    if not leak.is_finite:
        raise ValueError(
            f"{name} compares gradients, and some of them are not finite. Expected examples for which the model and "
            "its gradient are finite."
        )


def require_values(name, tensors):
    """Raises `ValueError` inside a compiled function, where tensors have no values to compare."""
    if any(known_numbers(x) is None for x in nesting.flatten(tensors)):
        raise ValueError(
            f"{name} compares values, which are not known inside a compiled function. Call it eagerly. Or call "
            "`keras_gradtools.diagnostics.batch_independence(model, x)` first, and do not pass `check_independence` "
            "here."
        )


def _owners(x, batch_size):
    rows = x.shape[0] if len(x.shape) else 1
    return np.arange(rows) * batch_size // max(rows, 1)


def _along_rows(chosen, like):
    return chosen.reshape(-1, *[1] * (like.ndim - 1))
