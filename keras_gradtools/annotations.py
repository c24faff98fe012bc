"""The names of types in annotations.

The type of a tensor depends on the backend, which no type checker knows. So tensors are `Any`, and so are structures
of tensors, which may be lists, tuples, dicts and every registered container. The other names say what is accepted.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeAlias, TypeVar

import keras

# A tensor of the current backend.
Tensor: TypeAlias = Any
# What can be converted to a tensor: a tensor, a `keras.Variable`, an array, a number, or a list of these.
ArrayLike: TypeAlias = Any
# Tensors or what can be converted to them, in any nested structure, which may also hold None.
Nested: TypeAlias = Any
# A function of tensors, or a Keras model.
Function: TypeAlias = Callable[..., Any]
# A square matrix: an operator of `kg.curvature`, an array, a sparse matrix, or anything with `shape` and `@`.
Matrix: TypeAlias = Any
# `(x, y)`, `(x, y, sample_weight)`, or an iterable of such batches.
Data: TypeAlias = Any
# A loss as `keras.Model.compile` takes it, or None for the compiled one.
Loss: TypeAlias = Any
# Keras variables in any nested structure, a layer, or None for all trainable variables.
Variables: TypeAlias = Any
# Names, keys or positions of the inputs of a model, or None for all of them.
InputNames: TypeAlias = str | int | Sequence[str | int] | None
# A number, or its values over the training steps.
Schedule: TypeAlias = float | keras.optimizers.schedules.LearningRateSchedule
Verbose: TypeAlias = Literal["auto", 0, 1]
ChunkSize: TypeAlias = int | Literal["auto"] | None
# The arguments and the result of a function that a transform takes.
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
else:
    Axes = Any
