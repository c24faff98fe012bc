"""Python's own bindings of some operations of torch, which take less time to call than those in `torch.ops`.

Both call the same kernels. Calls that a binding does not take in the form in which operations are recorded are left to
`torch.ops`.
"""

import torch

_functions = torch._C._VariableFunctions
_methods = torch._C.TensorBase

_NAMES = {
    _functions: """
        abs add addmm amax amin bmm cat clone cos div eq exp exp2 expm1 ge gt le log log1p log2 logical_and logical_not
        lt maximum mean minimum mm mul ne neg permute pow reciprocal relu rsqrt select sigmoid sign sin split sqrt
        square squeeze stack sub sum t tanh transpose tril triu unsqueeze where
    """,
    _methods: "expand view",
}
_FAST = {name: getattr(home, name) for home, names in _NAMES.items() for name in names.split()}
# Their bindings take other arguments than their schemas, or another type of number.
_OTHER = {"mul.Scalar", "add.Scalar", "div.Scalar", "sub.Scalar", "pow.Scalar", "view.dtype", "split.sizes"}


def fastest(function):
    """What to call in place of an operation that has been recorded."""
    if not isinstance(function, torch._ops.OpOverload):
        return function
    namespace, _, name = function._schema.name.partition("::")
    overload = f"{name}.{function._overloadname}"
    if namespace != "aten" or overload in _OTHER:
        return function._op
    return _FAST.get(name, function._op)
