"""Defects that were found by looking for them: each once gave a wrong value, None, or a state that was left behind."""

import threading

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from keras_gradtools.backend.recording import active_tapes
from tests.cases import close, tensor


def test_jit_sees_the_variables_that_each_shape_reads():
    a, b = keras.Variable(1.0), keras.Variable(1.0)
    scaled_sum = kg.jit(lambda x: ops.sum(x * (a if x.shape[0] > 2 else b)))
    scaled_sum(tensor(np.ones(3)))
    scaled_sum(tensor(np.ones(2)))
    b.assign(10.0)
    with kg.GradientTape() as tape:
        y = scaled_sum(tensor(np.ones(2)))
    close([y, tape.gradient(y, b)], [20.0, 2.0])


def test_jit_assigns_what_each_shape_assigns():
    counter = keras.Variable(0.0)

    @kg.jit
    def count_long(x):
        if x.shape[0] > 2:
            counter.assign_add(1.0)
        return ops.sum(x)

    for n in (3, 2, 3):
        count_long(tensor(np.ones(n)))
    close(counter.value, 2.0)


def test_a_normalization_that_was_compiled_before_the_tape():
    layer = keras.layers.LayerNormalization()
    layer.build((2, 4))
    x, w = tensor([[1.0, 2.0, 4.0, 3.0], [0.0, 1.0, -1.0, 2.0]]), tensor(np.arange(8.0).reshape(2, 4))

    def curvature(fun):
        with kg.GradientTape() as outer:
            outer.watch(x)
            with kg.GradientTape() as inner:
                inner.watch(x)
                y = fun(x)
            energy = ops.sum(inner.gradient(y, x) * w)
        return ops.convert_to_numpy(outer.gradient(energy, x))

    def cubed(x):
        return ops.sum(layer(x) ** 3)

    compiled = kg.jit(cubed)
    compiled(x)
    close(curvature(compiled), curvature(cubed), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("calls", [0, 1])
def test_reset_inside_a_pause(calls):
    x = tensor(3.0)
    with kg.GradientTape() as tape:
        tape.watch(x)
        y = x * x
        with tape.stop_recording():
            for _ in range(calls):
                tape.gradient(y, x)
            tape.reset()
            tape.watch(x)
            constant = x * x
        tape.watch(x)
        z = x * x * constant
    close(tape.gradient(z, x), 54.0)
    assert active_tapes() == []


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


def test_random_numbers_in_the_function_of_a_custom_gradient():
    seed = keras.random.SeedGenerator(1)

    @kg.custom_gradient
    def noisy(x):
        noise = keras.random.normal((2,), seed=seed)
        return x * 1.0, lambda u: u * noise

    x = tensor([1.0, 2.0])
    gradients = []
    for _ in range(2):
        with kg.GradientTape() as tape:
            tape.watch(x)
            y = noisy(x)
        gradients.append(ops.convert_to_numpy(tape.gradient(y, x)))
    assert np.abs(gradients[0] - gradients[1]).max() > 1e-3
    assert np.isfinite(ops.convert_to_numpy(keras.random.normal((2,), seed=seed))).all()


def test_a_rule_that_draws_leaves_the_seed_alive():
    seed = keras.random.SeedGenerator(1)
    x = tensor([1.0, 2.0])
    noisy = kg.custom_gradient(lambda x: (x * 1.0, lambda u: u + keras.random.normal((2,), seed=seed)))
    try:
        with kg.GradientTape() as tape:
            tape.watch(x)
            y = noisy(x)
        tape.gradient(y, x)
    except ValueError as error:
        assert "cannot assign to variables" in str(error)  # noqa: PT017
    assert np.isfinite(ops.convert_to_numpy(keras.random.normal((2,), seed=seed))).all()


def test_a_tape_that_goes_on_elsewhere_is_right_or_refused():
    """torch numbers the operations of each thread for itself."""
    x = tensor(3.0)
    tape = kg.GradientTape()
    with tape:
        tape.watch(x)
        h = x * x
    outcome = []

    def go_on():
        try:
            with tape:
                outcome.append(h * x)
        except RuntimeError as error:
            outcome.append(error)

    thread = threading.Thread(target=go_on)
    thread.start()
    thread.join()
    if isinstance(outcome[0], RuntimeError):
        assert "another thread" in str(outcome[0])
    else:
        close(tape.gradient(outcome[0], x), 27.0)


@pytest.mark.parametrize("given", ["abc", object()])
def test_output_gradients_of_no_kind(given):
    x = tensor(3.0)
    with kg.GradientTape() as tape:
        tape.watch(x)
        y = x * x
    with pytest.raises(ValueError, match="output_gradients must be a tensor, an array or a number. Received"):
        tape.gradient(y, x, output_gradients=given)


def test_chunk_sizes_of_numpy():
    x = tensor([1.0, 2.0, 3.0])
    with kg.GradientTape() as tape:
        tape.watch(x)
        y = x * x
    close(tape.jacobian(y, x, chunk_size=np.int64(2)), np.diag([2.0, 4.0, 6.0]))


def test_jit_of_no_function():
    with pytest.raises(ValueError, match="jit takes a function. Received: 3"):
        kg.jit(3)
