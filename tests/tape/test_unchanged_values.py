"""Values that an operation returns unchanged: the same object on some backends, and still two to a tape."""

import keras
import pytest
from keras import ops

import keras_gradtools as kg
from tests.cases import close, tensor


def _identity_with_gradient(factor):
    def identity(x):
        return x, lambda upstream: factor * upstream

    return kg.custom_gradient(identity)


# Functions that return their argument unchanged, and the derivative they are to have.
UNCHANGED = {
    "stop_gradient": (ops.stop_gradient, 0),
    "cast": (lambda x: ops.cast(x, x.dtype), 1),
    "convert": (ops.convert_to_tensor, 1),
    "reshape": (lambda x: ops.reshape(x, x.shape), 1),
    "broadcast": (lambda x: ops.broadcast_to(x, x.shape), 1),
    "clip": (lambda x: ops.clip(x, -100, 100), 1),
}
if hasattr(kg, "custom_gradient"):
    UNCHANGED["custom_gradient"] = (_identity_with_gradient(-2.0), -2)


@pytest.mark.parametrize(("unchanged", "slope"), UNCHANGED.values(), ids=UNCHANGED)
class TestValuesReturnedUnchanged:
    """They are the same object on some backends, and still two values to a tape."""

    def test_beside_its_argument(self, unchanged, slope):
        x = tensor(3.0)
        with kg.GradientTape(persistent=True) as tape:
            tape.watch(x)
            hidden = x * x
            total = hidden + unchanged(hidden)
            product = x * unchanged(x)
        close(tape.gradient(total, x), 6 + 6 * slope)
        close(tape.gradient(product, x), 3 + 3 * slope)

    def test_in_a_chain(self, unchanged, slope):
        x = tensor(3.0)
        with kg.GradientTape() as tape:
            tape.watch(x)
            y = unchanged(unchanged(x) * x) * x
        # y = b(x) x with b = u(u(x) x): b' = s (s x + x).
        close(tape.gradient(y, x), slope * (slope * 3 + 3) * 3 + 9)

    def test_as_a_source(self, unchanged, slope):
        x = tensor(3.0)
        with kg.GradientTape() as tape:
            tape.watch(x)
            copy = unchanged(x)
            tape.watch(copy)
            y = copy * copy * x
        close(tape.gradient(y, [copy, x]), [27 if copy is x else 18, 9 + 18 * slope])

    def test_of_a_variable(self, unchanged, slope):
        v = keras.Variable(3.0)
        with kg.GradientTape() as tape:
            y = v * unchanged(v * 1.0)
        close(tape.gradient(y, v), 3 + 3 * slope)

    def test_inside_stop_recording(self, unchanged, slope):
        x = tensor(3.0)
        with kg.GradientTape() as tape:
            tape.watch(x)
            hidden = x * x
            with tape.stop_recording():
                copy = unchanged(hidden)
            y = hidden * x + copy * x
        # Where Keras gives back the very tensor it was given, it is the one that the tape has recorded.
        close(tape.gradient(y, x), 54 if copy is hidden else 36)

    def test_second_order(self, unchanged, slope):
        x = tensor(3.0)
        with kg.GradientTape() as outer:
            outer.watch(x)
            with kg.GradientTape() as inner:
                inner.watch(x)
                y = x * x * unchanged(x)
            first = inner.gradient(y, x)
        # First: 2 x u + s x^2, with u = x and u' = s.
        close([first, outer.gradient(first, x)], [18 + 9 * slope, 6 + 6 * slope + 6 * slope])


class TestTheSameObjectFromKeras:
    """On JAX an operation of Keras may hand its argument back."""

    def test_a_shape_that_stays_is_a_value_of_its_own(self):
        x = tensor([1.0, 2.0])
        with kg.GradientTape() as tape:
            tape.watch(x)
            h = ops.reshape(x, (2,))
            y = ops.sum(h * h) + ops.sum(x**3)
        close(tape.gradient(y, [h, x]), [[2.0, 4.0], [5.0, 16.0]])

    def test_a_layer_that_flattens_what_is_flat(self):
        x = tensor([[1.0, 2.0]])
        with kg.GradientTape() as tape:
            tape.watch(x)
            h = keras.layers.Flatten()(x)
            y = ops.sum(h * h) + ops.sum(x)
        close(tape.gradient(y, h), [[2.0, 4.0]])

    def test_computed_inside_a_pause(self):
        x = tensor([1.0, 2.0])
        with kg.GradientTape() as tape:
            tape.watch(x)
            with tape.stop_recording():
                h = ops.reshape(x, (2,))
            y = ops.sum(h * x)
        close(tape.gradient(y, x), [1.0, 2.0])

    @pytest.mark.parametrize("stop", [ops.stop_gradient, kg.stop_gradient])
    def test_stopped_before_the_block(self, stop):
        x = tensor(3.0)
        constant = stop(x)
        with kg.GradientTape() as tape:
            tape.watch(x)
            y = x * constant
        close(tape.gradient(y, x), 3.0)
