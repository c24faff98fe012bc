"""Sees the calls that give the values of tensors to Python without an operation of torch, such as `numpy()`."""

import torch
from torch.overrides import TorchFunctionMode

T = torch.Tensor
_LEAKS = {
    T.numpy: "numpy()",
    T.tolist: "tolist()",
    T.__array__: "numpy()",
    T.data_ptr: "data_ptr()",
    T.untyped_storage: "untyped_storage()",
    T.storage: "storage()",
    T.__dlpack__: "__dlpack__()",
    T.__repr__: "repr()",
    T.__format__: "format()",
    T.__reduce_ex__: "pickle",
    T.__deepcopy__: "deepcopy",
    torch.ctc_loss: "ctc_loss",
    torch.nn.functional.ctc_loss: "ctc_loss",
    torch.tensor_split: "tensor_split",
    T.tensor_split: "tensor_split",
    torch.utils.dlpack.to_dlpack: "to_dlpack",
}
# Their results share the memory of the tensor, and may change it.
_SHARING = {T.numpy, T.__array__, T.data_ptr, T.untyped_storage, T.storage, T.__dlpack__, torch.utils.dlpack.to_dlpack}
_SETTERS = {T.data.__set__: "an assignment to `.data`"}
_WITH_LENGTHS = {torch.tensor_split, T.tensor_split}


def _one_hot(tensor, num_classes=-1):
    # torch reads the values to check them, and then does this, which checks them as well.
    if num_classes < 0 or tensor.dtype != torch.int64:
        return torch.nn.functional.one_hot(tensor, num_classes)
    return tensor.new_zeros((*tensor.shape, num_classes)).scatter_(-1, tensor.unsqueeze(-1), 1)


def _add_multiples(tensors, others, alpha):
    torch._foreach_add_(tensors, others, alpha=alpha.item())


_WITHOUT_VALUES = {torch.nn.functional.one_hot: _one_hot}


class Leaks(TorchFunctionMode):
    """A block in which `refuse(reason)` is called before a value of a tensor that is not constant leaves torch.

    `share(x)` is called before the memory of a constant tensor is shared with Python.
    `run(fun, changed, *args)` runs `fun(changed, *args)`, which changes tensors, as one operation.
    """

    def __init__(self, refuse, is_constant, share, run):
        super().__init__()
        self._refuse, self._is_constant, self._share, self._run = refuse, is_constant, share, run

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _LEAKS:
            given = args[1:] if func in _WITH_LENGTHS else args
            tensors = [x for x in (*given, *kwargs.values()) if isinstance(x, torch.Tensor)]
            if not all(map(self._is_constant, tensors)):
                self._refuse(f"`{_LEAKS[func]}` gives the values of a tensor to Python")
            elif func in _SHARING:
                self._share(args[0])
        elif func is torch._foreach_add_ and isinstance(kwargs.get("alpha"), torch.Tensor):
            # Keras' SGD gives its learning rate where torch expects a number, which would become a constant.
            return self._run(_add_multiples, *args, kwargs["alpha"])
        elif func in _SETTERS:
            self._refuse(f"{_SETTERS[func]} gives a tensor other memory")
        return _WITHOUT_VALUES.get(func, func)(*args, **kwargs)
