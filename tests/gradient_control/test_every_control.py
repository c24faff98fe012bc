"""What every stock control does: values, and derivatives to second order, eagerly and compiled."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from keras_gradtools import clip_gradient_norm, clip_gradient_value, reverse_gradient, scale_gradient, straight_through
from tests.cases import close, tensor
from tests.compilers import with_every_compiler
from tests.gradient_control.slopes import first_and_second, gradient_for, gradient_of

# y = control(x)^2 at x = 3, where the gradient that reaches `control` is 6: dy/dx and d2y/dx2. The derivative
# of control(x) is the one it was given wherever it occurs, so that it enters the second derivative twice.
CONTROLS = {
    "norm_clipped": (lambda x: clip_gradient_norm(x, 4.0), 4, 0),
    "norm_left_alone": (lambda x: clip_gradient_norm(x, 10), 6, 2),
    "norm_at_the_limit": (lambda x: clip_gradient_norm(x, 6.0), 6, 2),
    "value_clipped": (lambda x: clip_gradient_value(x, 4.0), 4, 0),
    "value_left_alone": (lambda x: clip_gradient_value(x, 10), 6, 2),
    "value_at_the_limit": (lambda x: clip_gradient_value(x, 6.0), 6, 2),
    "scaled": (lambda x: scale_gradient(x, 0.5), 3, 0.5),
    "scaled_by_zero": (lambda x: scale_gradient(x, 0), 0, 0),
    "reversed": (lambda x: reverse_gradient(x, 2.0), -12, 8),
    "reversed_by_default": (reverse_gradient, -6, 2),
    "straight_through": (straight_through(lambda x: x + 0), 6, 2),
}
with_every_control = pytest.mark.parametrize(("control", "first", "second"), CONTROLS.values(), ids=CONTROLS)
# What does not depend on a threshold is the same for all thresholds.
KINDS = ("norm_clipped", "value_clipped", "scaled", "reversed", "straight_through")
with_every_kind = pytest.mark.parametrize("control", [CONTROLS[name][0] for name in KINDS], ids=KINDS)


@with_every_control
def test_derivatives(control, first, second):
    close(first_and_second(lambda x: ops.square(control(x)))(tensor(3.0)), (9, first, second))


@with_every_compiler
@pytest.mark.parametrize("name", KINDS)
def test_compiled_derivatives(compiler, name):
    control, first, second = CONTROLS[name]
    derivatives = compiler.compile(first_and_second(lambda x: ops.square(control(x))))
    close(derivatives(tensor(3.0)), (9, first, second))


@with_every_kind
def test_values_and_dtypes_are_kept(control):
    for dtype in ("float16", "bfloat16", "float32"):
        x = tensor([[1.5, -2.0]], dtype)
        y = control(x)
        assert keras.backend.standardize_dtype(y.dtype) == dtype
        close(ops.cast(y, "float32"), [[1.5, -2.0]], rtol=0, atol=0)
        gradient = gradient_of(control, x)
        assert keras.backend.standardize_dtype(gradient.dtype) == dtype


@with_every_control
def test_takes_a_variable(control, first, second):
    variable = keras.Variable(3.0)
    with kg.GradientTape() as tape:
        y = ops.square(control(variable))
    close(tape.gradient(y, variable), first)


@with_every_kind
def test_is_a_constant_to_a_block_that_comes_later(control):
    x = tensor([3.0, 4.0])
    before = control(x)
    close(gradient_of(lambda x: x * before, x), [3, 4])


@with_every_kind
def test_jacobians_are_vectorized(recwarn, control):
    x = tensor([[1.0, 2.0], [3.0, 4.0]])
    with kg.GradientTape() as tape:
        tape.watch(x)
        y = ops.square(control(x))
    assert tuple(tape.batch_jacobian(y, x).shape) == (2, 2, 2)
    assert not [str(w.message) for w in recwarn if "one row at a time" in str(w.message)]


def test_empty_tensor():
    for name, (control, *_) in CONTROLS.items():
        assert tuple(gradient_for(control, np.zeros((0, 3))).shape) == (0, 3), name


@pytest.mark.parametrize(
    ("name", "control"),
    [
        ("clip_gradient_norm", lambda x: clip_gradient_norm(x, 1.0)),
        ("clip_gradient_value", lambda x: clip_gradient_value(x, 1.0)),
        ("scale_gradient", lambda x: scale_gradient(x, 1.0)),
        ("reverse_gradient", reverse_gradient),
        ("straight_through", straight_through(ops.round)),
    ],
)
def test_what_can_have_no_gradient(name, control):
    for wrong, message in [
        (tensor([1, 2], "int32"), "must be real and floating-point. Received: .*int32"),
        (tensor([1.0], "complex64"), "must be real and floating-point. Received: .*complex64"),
        (np.ones(2), "must be a tensor of the backend .* Received: .*float64"),
        ([tensor(1.0)], "must be a tensor of the backend .* Received: "),
        (keras.KerasTensor((2,), "int32"), "must be real and floating-point. Received: the symbolic .*int32"),
    ]:
        with pytest.raises(ValueError, match=f"The argument of {name} {message}"):
            control(wrong)
