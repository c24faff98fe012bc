"""What a recorder must know about each operation of torch."""

import functools
from typing import NamedTuple

import torch

# Some do not change what they share memory with, but resize it or give it other memory.
_NEW_MEMORY = {"set_", "resize_", "resize_as_", "_resize_output_", "set_data", "requires_grad_", "_fw_primal"}
# They read the lengths of sequences from memory, so that these would become constants.
_READS_LENGTHS = {"_ctc_loss", "_cudnn_ctc_loss", "_pack_padded_sequence", "_pad_packed_sequence"}
# They depend on dtypes and shapes only.
_OF_METADATA = {
    "promote_types",
    "result_type",
    "can_cast",
    "is_same_size",
    "is_floating_point",
    "is_complex",
    "is_signed",
}


class Slot(int):
    """The place of a tensor, or of a random generator, among the values of a program."""

    __slots__ = ()


class Operation(NamedTuple):
    """One recorded operation.

    `args` and `kwargs` hold a `Slot` for each tensor. `outputs` are the slots of the outputs, or None for an output
    that is no tensor, and `is_single` says whether the operation returns it alone. `mutated` are the slots that it
    overwrites. `is_kept` says whether it is needed for more than its outputs.
    """

    function: object
    args: tuple
    kwargs: dict
    outputs: tuple
    is_single: bool
    mutated: tuple
    is_kept: bool


class Guard:
    """Takes the place of a function in an `Operation` that reads a bool: a program is only valid for one value."""


GUARD = Guard()


def slots_in(x):
    """The slots in the arguments of an operation, or in a part of them."""
    if isinstance(x, Slot):
        yield x
    elif isinstance(x, (list, tuple)):
        for y in x:
            yield from slots_in(y)
    elif isinstance(x, dict):
        yield from slots_in(list(x.values()))


def with_slots(x, function):
    """The arguments of an operation with `function(slot)` for each slot."""
    if isinstance(x, Slot):
        return function(x)
    if isinstance(x, dict):
        return {name: with_slots(y, function) for name, y in x.items()}
    if isinstance(x, tuple):
        return tuple([with_slots(y, function) for y in x])
    return [with_slots(y, function) for y in x] if isinstance(x, list) else x


class Facts(NamedTuple):
    """What holds for every call of an operation.

    `refusal`: why it cannot be run again from a record, or None. `written`: the arguments that it overwrites, as pairs
    of position and name. `draws`: whether it draws random numbers. `may_vary`: whether the shape of some results
    depends on values. `reshapes`: whether it changes the shape of a tensor in place. `is_of_metadata`: whether
    its result depends on dtypes and shapes only.
    """

    refusal: str | None
    written: tuple
    draws: bool
    may_vary: bool
    reshapes: bool = False
    is_of_metadata: bool = False


@functools.cache
def facts(function):
    if not isinstance(function, torch._ops.OpOverload):
        return Facts(f"it uses torch's higher-order operation `{function}`", (), False, False)
    schema, tags = function._schema, function.tags
    if schema.name.split("::")[-1] in _OF_METADATA:
        return Facts(None, (), False, False, is_of_metadata=True)
    written = tuple(
        (i, argument.name)
        for i, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    draws, may_vary = torch.Tag.nondeterministic_seeded in tags, torch.Tag.dynamic_output_shape in tags
    return Facts(_refusal(function, schema, tags), written, draws, may_vary, torch.Tag.inplace_view in tags)


def _refusal(function, schema, tags):
    name = schema.name.split("::")[-1]
    if name in _READS_LENGTHS:
        return f"the lengths in torch's operation `{name}` may be values of tensors"
    if name in _NEW_MEMORY:
        return f"torch's operation `{name}` changes the memory of a tensor"
    if torch.Tag.dynamic_output_shape in tags and name not in ("index", "repeat_interleave"):
        return f"the shape of the result of torch's operation `{name}` depends on the values of tensors"
    if torch.Tag.data_dependent_output in tags or not all(_is_of_tensors(r.type) for r in schema.returns):
        return f"torch's operation `{name}` gives values of tensors to Python"
    return None


def _is_of_tensors(kind):
    while kind.kind() in ("ListType", "OptionalType"):
        kind = kind.getElementType()
    return kind.kind() == "TensorType"


def has_variable_shape(function, args, kwargs):
    """Whether the shape of this result depends on values, for an operation of which some results have."""
    name = function._schema.name
    if name == "aten::index":
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return name == "aten::repeat_interleave" and kwargs.get("output_size") is None
