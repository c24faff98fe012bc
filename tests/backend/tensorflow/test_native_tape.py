"""No interrupt leaves a native tape of TensorFlow recording, which nothing could stop any more."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from tests.interrupts import at_every_point, left_behind

pytestmark = pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="native tapes are TensorFlow's")

WHERE = ("native_tape.py", "blocks.py", "pushforwards.py", "vjp.py", "eager/tape.py", "eager/backprop.py")
X = np.array([1.0, 2.0], "float32")


def test_an_interrupt_of_forward_mode():
    x, points = ops.convert_to_tensor(X), 0

    def run():
        kg.jvp(lambda x: ops.tanh(x) * x, (x,), (x,))

    run()
    for point in at_every_point(run, WHERE):
        assert not left_behind(), f"interrupted at point {point}"
        points += 1
    assert points > 10
    _, tangent = kg.jvp(lambda x: x**3, (x,), (x,))
    np.testing.assert_allclose(ops.convert_to_numpy(tangent), 3 * X**3, rtol=1e-6)


def test_an_interrupt_of_a_pullback():
    from keras_gradtools.backend.tensorflow.vjp import pulled_back

    x, points = ops.convert_to_tensor(X), 0
    for point in at_every_point(lambda: pulled_back(ops.square, [x], x), WHERE):
        assert not left_behind(), f"interrupted at point {point}"
        points += 1
    assert points > 10
    (found,) = pulled_back(ops.square, [x], x)
    np.testing.assert_allclose(ops.convert_to_numpy(found), 2 * X * X)


def test_nothing_is_recorded_after_the_block():
    from keras_gradtools.backend.tensorflow.native_tape import NativeTape

    x = ops.convert_to_tensor(X)
    native = NativeTape()
    with native, native:
        native.tape.watch(x)
        y = ops.square(x)
    z = ops.square(y)
    assert native.tape.gradient(z, x) is None
