"""How much memory a computation on torch needs, and how much there is."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from keras_gradtools.backend.torch.random_numbers import get_device


def computed_bytes(fun):
    with _Count() as count:
        fun()
    return count.bytes


def free_bytes():
    return torch.cuda.mem_get_info()[0] if get_device().startswith("cuda") else None


class _Count(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, views excepted."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        returned = results if isinstance(results, (tuple, list)) else [results]
        for argument, result in zip(function._schema.returns, returned, strict=False):
            if argument.alias_info is None and isinstance(result, torch.Tensor):
                self.bytes += result.untyped_storage().nbytes()
        return results
