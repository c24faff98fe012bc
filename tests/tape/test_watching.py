"""What a tape follows: tensors and variables that it was told of, trainable variables by themselves."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from tests.cases import close, tensor


def variable(x, trainable=True):
    return keras.Variable(np.asarray(x, "float32"), trainable=trainable)


def same_variables(actual, desired):
    """By identity: to compare variables with == would read them."""
    assert list(map(id, actual)) == list(map(id, desired))


def dense(trainable=True):
    layer = keras.layers.Dense(2)
    layer.trainable = trainable
    layer.build((None, 3))
    return layer


X = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
# The gradients of the summed output of a dense layer.
KERNEL, BIAS = np.stack([X.sum(0)] * 2, axis=1), np.array([2.0, 2.0])


def test_a_tensor_is_a_constant_unless_it_is_watched():
    x = tensor(3.0)
    with kg.GradientTape() as tape:
        y = x * x
    assert tape.gradient(y, x) is None


@pytest.mark.parametrize(
    "nest",
    [
        lambda x, y, v: [x, y, v],
        lambda x, y, v: (x, [y, (v,)]),
        lambda x, y, v: {"x": x, "rest": [{"y": y}, v]},
    ],
)
def test_watch_takes_tensors_and_variables_in_any_nesting(nest):
    x, y, v = tensor(2.0), tensor(3.0), variable(5.0, trainable=False)
    with kg.GradientTape() as tape:
        tape.watch(nest(x, y, v))
        z = x * y * v
    close(tape.gradient(z, (x, y, v)), (15, 10, 6))


def test_watching_twice_counts_once():
    x, v = tensor(3.0), variable(3.0)
    with kg.GradientTape() as tape:
        tape.watch([x, v])
        tape.watch(x)
        tape.watch(v)
        y = x * x + v * v
    same_variables(tape.watched_variables(), [v])
    close(tape.gradient(y, [x, v]), [6, 6])


def test_what_was_computed_before_watch_is_a_constant():
    x = tensor(3.0)
    with kg.GradientTape() as tape:
        square = x * x
        tape.watch(x)
        y = square * x
    close(tape.gradient(y, x), 9)


def test_what_was_computed_before_the_block_is_a_constant():
    x, v = tensor(3.0), variable(2.0)
    square, read = x * x, v * 1.0
    with kg.GradientTape() as tape:
        tape.watch(x)
        y = square * x * v * read
    close(tape.gradient(y, [x, v]), [36, 54])


def test_what_is_computed_after_the_block_is_not_recorded():
    x = tensor(3.0)
    with kg.GradientTape(persistent=True) as tape:
        tape.watch(x)
        y = x * x
    z = y * x
    assert tape.gradient(z, x) is None
    close(tape.gradient(y, x), 6)


# On TensorFlow `value` and `convert_to_tensor` hand out the variable itself, to be read when it is used.
@pytest.mark.parametrize("read", [ops.copy, lambda v: v * 1.0], ids=["copy", "operator"])
def test_a_variable_read_before_the_block_is_a_constant(read):
    v, w = variable(3.0), variable(5.0)
    before_v, before_w = read(v), read(w)
    with kg.GradientTape() as tape:
        y = before_v * before_v * before_w * w
    close(tape.gradient(y, [v, w]), [None, 45])


def test_trainable_variables_are_watched_when_they_are_read():
    v, frozen, unread = variable(3.0), variable(5.0, trainable=False), variable(7.0)
    with kg.GradientTape() as tape:
        y = v * v * frozen
    same_variables(tape.watched_variables(), [v])
    close(tape.gradient(y, [v, frozen, unread]), [30, None, None])


def test_watched_variables_are_a_tuple():
    with kg.GradientTape() as tape:
        pass
    assert tape.watched_variables() == ()


def test_watched_variables_come_in_the_order_of_their_first_read():
    a, b, c = (variable(float(i)) for i in range(3))
    with kg.GradientTape() as tape:
        _ = c * a * b * c
    same_variables(tape.watched_variables(), [c, a, b])


@pytest.mark.parametrize("read", ["operator", "ops", "value", "layer"])
def test_every_way_to_read_a_variable_is_seen(read):
    layer = dense()
    v = layer.bias
    v.assign([3.0, 4.0])
    with kg.GradientTape() as tape:
        y = {
            "operator": lambda: v * 1.0,
            "ops": lambda: ops.add(v, 0.0),
            "value": lambda: v.value + 0.0,
            "layer": lambda: layer(tensor(np.zeros((1, 3)))),
        }[read]()
        y = ops.sum(y * y)
    close(tape.gradient(y, v), [6, 8])


def test_a_frozen_variable_can_be_watched():
    v = variable(3.0, trainable=False)
    with kg.GradientTape() as tape:
        tape.watch(v)
        y = v * v
    same_variables(tape.watched_variables(), [v])
    close(tape.gradient(y, v), 6)


@pytest.mark.parametrize("watch_accessed_variables", [True, False])
def test_watch_accessed_variables(watch_accessed_variables):
    v, w = variable(3.0), variable(5.0)
    with kg.GradientTape(watch_accessed_variables=watch_accessed_variables) as tape:
        tape.watch(w)
        y = v * v * w
    same_variables(tape.watched_variables(), [w, v] if watch_accessed_variables else [w])
    close(tape.gradient(y, [v, w]), [30 if watch_accessed_variables else None, 9])


def test_reset_forgets_what_was_watched():
    x, v, frozen = tensor(3.0), variable(2.0), variable(5.0, trainable=False)
    with kg.GradientTape() as tape:
        tape.watch([x, frozen])
        y = x * v * frozen
        tape.reset()
        same_variables(tape.watched_variables(), [])
        z = y * x * frozen * v
    same_variables(tape.watched_variables(), [v])
    close(tape.gradient(z, [x, frozen, v]), [None, None, 450])


class TestFrozenLayers:
    """Keras' current `trainable` counts; TensorFlow's own flag is that of the day the variable was made."""

    def gradients(self, layer):
        with kg.GradientTape() as tape:
            y = ops.sum(layer(tensor(X)))
        return tape.watched_variables(), tape.gradient(y, [layer.kernel, layer.bias])

    def test_frozen_after_build(self):
        layer = dense()
        layer.trainable = False
        watched, gradients = self.gradients(layer)
        same_variables(watched, [])
        close(gradients, [None, None])

    def test_unfrozen_after_build(self):
        layer = dense(trainable=False)
        layer.trainable = True
        watched, gradients = self.gradients(layer)
        assert set(map(id, watched)) == {id(layer.kernel), id(layer.bias)}
        close(gradients, [KERNEL, BIAS])

    def test_frozen_and_unfrozen_again(self):
        layer = dense()
        layer.trainable = False
        self.gradients(layer)
        layer.trainable = True
        close(self.gradients(layer)[1], [KERNEL, BIAS])

    def test_a_variable_that_was_made_frozen(self):
        v = variable(3.0, trainable=False)
        v.trainable = True
        with kg.GradientTape() as tape:
            y = v * v
        same_variables(tape.watched_variables(), [v])
        close(tape.gradient(y, v), 6)

    def test_one_weight_frozen(self):
        layer = dense()
        layer.kernel.trainable = False
        watched, gradients = self.gradients(layer)
        same_variables(watched, [layer.bias])
        close(gradients, [None, BIAS])

    def test_inside_a_model(self):
        frozen = dense()
        model = keras.Sequential([frozen, keras.layers.Dense(1)])
        model.build((None, 3))
        frozen.trainable = False
        with kg.GradientTape() as tape:
            y = ops.sum(model(tensor(X)))
        assert set(map(id, tape.watched_variables())) == set(map(id, model.trainable_variables))
        hidden = ops.convert_to_numpy(frozen(tensor(X))).sum(0)[:, None]
        close(tape.gradient(y, [frozen.kernel, *model.trainable_variables]), [None, hidden, [2]])


class TestAssignment:
    """A gradient refers to the value that was read; torch, which overwrites it in place, says so."""

    @pytest.mark.parametrize("where", ["inside", "after"])
    def test_the_value_that_was_read_counts(self, where, backend):
        v = variable(2.0)
        with kg.GradientTape() as tape:
            y = v * v * v
            if where == "inside":
                v.assign(10.0)
        if where == "after":
            v.assign(10.0)
        if backend == "torch":
            with pytest.raises(RuntimeError, match="inplace operation"):
                tape.gradient(y, v)
        else:
            close(tape.gradient(y, v), 12)
        close(v.value, 10)

    @pytest.mark.parametrize("where", ["inside", "after"])
    def test_assignment_does_no_harm_where_the_value_is_not_needed(self, where):
        v = variable(2.0)
        with kg.GradientTape() as tape:
            y = 3 * v
            if where == "inside":
                v.assign(10.0)
        v.assign(11.0)
        close(tape.gradient(y, v), 3)

    def test_before_the_read(self):
        v = variable(2.0)
        with kg.GradientTape() as tape:
            v.assign(5.0)
            y = v * v
        close(tape.gradient(y, v), 10)

    def test_both_values_count_when_both_were_read(self):
        v, w = variable(2.0), variable(4.0)
        with kg.GradientTape() as tape:
            y = 3 * v
            v.assign_add(w * w)
            z = v * v
            total = y + z
        # 3 for the first read and 2 * 18 for the second; what is assigned is a constant.
        close(tape.gradient(total, [v, w]), [39, None])

    def test_what_is_assigned_is_a_constant(self):
        x, v = tensor(3.0), variable(0.0)
        with kg.GradientTape() as tape:
            tape.watch(x)
            v.assign(x * x)
            y = v * v * x
        close(tape.gradient(y, [x, v]), [81, 54])

    def test_assign_inside_a_paused_tape(self):
        v = variable(2.0)
        with kg.GradientTape() as tape:
            with tape.stop_recording():
                v.assign_sub(1.0)
                paused = v * 10.0
            y = v * paused
        close(tape.gradient(y, v), 10)

    def test_two_variables_that_share_an_array_stay_two(self):
        a, b = variable(5.0), variable(0.0)
        b.assign(a)
        with kg.GradientTape() as tape:
            y = a * a * b
        close(tape.gradient(y, [a, b]), [50, 25])

    def test_a_variable_assigned_from_a_watched_tensor_is_not_the_tensor(self):
        x = tensor(3.0)
        v = variable(0.0)
        v.assign(x)
        with kg.GradientTape() as tape:
            tape.watch(x)
            y = x * v * v
        close(tape.gradient(y, [x, v]), [9, 18])
