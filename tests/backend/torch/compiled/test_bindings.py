"""The bindings that programs call compute what the recorded operations compute."""

import keras
import pytest

if keras.backend.backend() != "torch":
    pytest.skip("these are about torch", allow_module_level=True)

import torch  # noqa: E402

from keras_gradtools.backend.torch.compiled import bindings  # noqa: E402

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.rand(3, 4, generator=GENERATOR) + 0.1, torch.rand(3, 4, generator=GENERATOR) + 0.1
B = X > 0.5
UNARY = """
    abs clone cos exp exp2 expm1 log log1p log2 mean neg reciprocal relu rsqrt sigmoid sign sin sqrt square sum t tanh
    tril triu
"""
# An operation, its arguments, and keywords with which it may be called as well.
ROWS = [
    *[(f"{name}.default", [X], {}) for name in UNARY.split()],
    ("clone.default", [X], {"memory_format": torch.contiguous_format}),
    ("add.Tensor", [X, Y], {"alpha": 2}),
    ("add.Tensor", [X, torch.tensor(2)], {}),
    ("sub.Tensor", [X, Y], {"alpha": 3}),
    ("mul.Tensor", [X, Y], {}),
    ("div.Tensor", [X, Y], {}),
    ("div.Tensor_mode", [X, Y], {"rounding_mode": "floor"}),
    *[(f"{name}.Tensor", [X, Y], {}) for name in ("eq", "ne", "ge", "gt", "le", "lt")],
    *[(f"{name}.Scalar", [X, 0.5], {}) for name in ("eq", "ne", "ge", "gt", "le", "lt")],
    ("maximum.default", [X, Y], {}),
    ("minimum.default", [X, Y], {}),
    ("pow.Tensor_Scalar", [X, 2], {}),
    ("pow.Tensor_Scalar", [X, 2.5], {}),
    ("pow.Tensor_Tensor", [X, Y], {}),
    ("logical_and.default", [B, ~B], {}),
    ("logical_not.default", [B], {}),
    ("where.self", [B, X, Y], {}),
    ("sum.dim_IntList", [X, [0], True], {"dtype": torch.float64}),
    ("sum.dim_IntList", [X, None], {}),
    ("mean.dim", [X, [0], True], {}),
    ("amax.default", [X, [0], True], {}),
    ("amin.default", [X, [1]], {}),
    ("mm.default", [X, Y.T], {}),
    ("bmm.default", [X[None], Y.T[None]], {}),
    ("addmm.default", [torch.ones(3), X, Y.T], {"beta": 2, "alpha": 3}),
    ("cat.default", [[X, Y], 1], {}),
    ("stack.default", [[X, Y], 1], {}),
    ("split.Tensor", [X, 2, 1], {}),
    ("select.int", [X, 0, 1], {}),
    ("squeeze.dim", [X[:1], 0], {}),
    ("squeeze.dims", [X[:1], [0]], {}),
    ("unsqueeze.default", [X, 0], {}),
    ("permute.default", [X, [1, 0]], {}),
    ("transpose.int", [X, 0, 1], {}),
    ("triu.default", [X, 1], {}),
    ("expand.default", [X[:1], [3, 4]], {"implicit": False}),
    ("view.default", [X, [12]], {}),
]


@pytest.mark.parametrize(("name", "args", "kwargs"), ROWS, ids=lambda x: x if isinstance(x, str) else "")
def test_equal_to_the_operation(name, args, kwargs):
    packet, _, overload = name.partition(".")
    function = getattr(getattr(torch.ops.aten, packet), overload)
    fast = bindings.fastest(function)
    assert fast is not function._op
    expected, found = (f(*args, **kwargs) for f in (function, fast))
    for a, b in zip(*(x if isinstance(x, (list, tuple)) else [x] for x in (expected, found)), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype


def test_every_binding_is_tested():
    assert {name.partition(".")[0] for name, _, _ in ROWS} == set(bindings._FAST)
