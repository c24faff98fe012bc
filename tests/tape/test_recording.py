"""What a tape records, and when: pauses, resets, several tapes at once."""

import contextlib
import itertools

import keras
import pytest
from keras import ops

import keras_gradtools as kg
from keras_gradtools.keras_state.recording import active_tapes
from tests.cases import close, tensor


def watching(x, **options):
    """A tape that is entered and watches x, for the tests that leave it by hand."""
    tape = kg.GradientTape(**options)
    tape.__enter__()
    tape.watch(x)
    return tape


class TestStopRecording:
    def test_what_is_computed_inside_is_a_constant(self):
        x, v = tensor(3.0), keras.Variable(2.0)
        with kg.GradientTape() as tape:
            tape.watch(x)
            before = x * x
            with tape.stop_recording():
                inside = x * x * v
            after = x * v
            y = before + inside * x + after
        close(tape.gradient(y, [x, v]), [6 + 18 + 2, 3])

    def test_only_this_tape_pauses(self):
        x = tensor(3.0)
        with kg.GradientTape() as outer, kg.GradientTape() as inner:
            outer.watch(x)
            inner.watch(x)
            with inner.stop_recording():
                square = x * x
            y = square * x
        close(inner.gradient(y, x), 9)
        close(outer.gradient(y, x), 27)

    def test_of_the_outer_tape(self):
        x = tensor(3.0)
        with kg.GradientTape() as outer, kg.GradientTape() as inner:
            outer.watch(x)
            inner.watch(x)
            with outer.stop_recording():
                square = x * x
            y = square * x
        close(inner.gradient(y, x), 27)
        close(outer.gradient(y, x), 9)

    def test_a_variable_read_inside_is_not_watched(self):
        v = keras.Variable(2.0)
        with kg.GradientTape() as tape, tape.stop_recording():
            _ = v * 1.0
        assert tape.watched_variables() == ()

    def test_what_is_watched_inside_is_followed_afterwards(self):
        x = tensor(3.0)
        with kg.GradientTape() as tape:
            with tape.stop_recording():
                tape.watch(x)
            y = x * x
        close(tape.gradient(y, x), 6)

    def test_gradient_inside(self):
        x = tensor(3.0)
        with kg.GradientTape(persistent=True) as tape:
            tape.watch(x)
            y = x * x * x
            with tape.stop_recording():
                slope = tape.gradient(y, x)
            z = slope * x
        close(slope, 27)
        close(tape.gradient(z, x), 27)

    def test_after_an_exception_inside_recording_goes_on(self):
        x = tensor(3.0)
        with kg.GradientTape() as tape:
            tape.watch(x)
            with contextlib.suppress(KeyError), tape.stop_recording():
                raise KeyError
            y = x * x
        close(tape.gradient(y, x), 6)


class TestReset:
    def test_what_was_computed_before_is_a_constant(self):
        x, v = tensor(3.0), keras.Variable(2.0)
        with kg.GradientTape() as tape:
            tape.watch(x)
            before = x * x * v
            tape.reset()
            tape.watch(x)
            y = before * x * v
        close(tape.gradient(y, [x, v]), [36, 54])

    def test_only_this_tape_forgets(self):
        x = tensor(3.0)
        with kg.GradientTape() as outer, kg.GradientTape() as inner:
            outer.watch(x)
            inner.watch(x)
            y = x * x
            inner.reset()
        close(inner.gradient(y, x), None)
        close(outer.gradient(y, x), 6)

    def test_makes_a_used_tape_fresh(self):
        x = tensor(3.0)
        with kg.GradientTape() as tape:
            tape.watch(x)
            close(tape.gradient(x * x, x), 6)
            tape.reset()
            tape.watch(x)
            y = x * x * x
        close(tape.gradient(y, x), 27)

    def test_inside_a_pause(self):
        x = tensor(3.0)
        with kg.GradientTape() as tape:
            tape.watch(x)
            with tape.stop_recording():
                tape.reset()
                tape.watch(x)
                square = x * x
            y = square * x
        close(tape.gradient(y, x), 9)


class TestSeveralTapes:
    def test_side_by_side(self):
        x = tensor(3.0)
        with kg.GradientTape() as one, kg.GradientTape() as other:
            one.watch(x)
            other.watch(x)
            y, z = x * x, x * x * x
        close([one.gradient(y, x), other.gradient(z, x)], [6, 27])

    def test_one_does_not_follow_what_another_watches(self):
        x, y = tensor(3.0), tensor(2.0)
        with kg.GradientTape() as one, kg.GradientTape() as other:
            one.watch(x)
            other.watch(y)
            z = x * x * y
        close([one.gradient(z, [x, y]), other.gradient(z, [x, y])], [[12, None], [None, 9]])

    @pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
    def test_left_in_any_order(self, order):
        x = tensor(2.0)
        tapes = [watching(x) for _ in range(3)]
        powers = [x]
        for i in order:
            powers.append(powers[-1] * x)
            tapes[i].__exit__(None, None, None)
        assert active_tapes() == []
        for last, i in enumerate(order, start=1):
            # The tape knows the powers up to the last one before it was left; a sum of k x^(k-1).
            expected = sum(k * 2.0 ** (k - 1) for k in range(2, last + 2))
            close(tapes[i].gradient(powers[1:], x), expected)

    def test_one_after_the_other(self):
        x = tensor(3.0)
        with kg.GradientTape() as one:
            one.watch(x)
            y = x * x
        with kg.GradientTape() as other:
            other.watch([x, y])
            z = y * x
        close(one.gradient(y, x), 6)
        close(other.gradient(z, [x, y]), [9, 3])

    @pytest.mark.parametrize("persistent", [False, True])
    def test_re_entered_goes_on(self, persistent):
        x = tensor(3.0)
        with kg.GradientTape(persistent=persistent) as tape:
            tape.watch(x)
            square = x * x
        unrecorded = x * x
        with tape:
            y = square * x + unrecorded
        close(tape.gradient(y, x), 27)

    def test_re_entered_after_its_gradient(self):
        """A persistent tape goes on; another one, whose record is used up, starts again."""
        x = tensor(3.0)
        results = []
        for persistent in (True, False):
            with kg.GradientTape(persistent=persistent) as tape:
                tape.watch(x)
                square = x * x
            close(tape.gradient(square, x), 6)
            with tape:
                tape.watch(x)
                y = square * x
            results.append(tape.gradient(y, x))
        close(results, [27, 9])

    def test_entered_inside_itself(self):
        x = tensor(3.0)
        with kg.GradientTape() as tape:
            tape.watch(x)
            with pytest.raises(ValueError, match="already recording"), tape:
                pass
            y = x * x
        close(tape.gradient(y, x), 6)


class TestExceptions:
    @pytest.mark.parametrize("depth", [1, 3])
    @pytest.mark.parametrize("paused", [False, True])
    def test_no_trace_is_left(self, depth, paused):
        x = tensor(3.0)
        with pytest.raises(KeyError), contextlib.ExitStack() as stack:
            for _ in range(depth):
                tape = stack.enter_context(kg.GradientTape())
                tape.watch(x)
            if paused:
                stack.enter_context(tape.stop_recording())
            _ = x * x
            raise KeyError
        assert active_tapes() == []
        y = x * x
        close(y, 9)
        close(tape.gradient(y, x), None)

    def test_what_was_recorded_before_it_can_be_differentiated(self):
        x = tensor(3.0)
        with contextlib.suppress(KeyError), kg.GradientTape() as tape:
            tape.watch(x)
            y = x * x
            raise KeyError
        close(tape.gradient(y, x), 6)

    def test_an_error_of_the_framework(self):
        x = tensor([3.0, 4.0])
        with pytest.raises(Exception, match="."), kg.GradientTape() as tape:
            tape.watch(x)
            ops.matmul(ops.ones((2, 3)), ops.reshape(x, (1, 2)))
        assert active_tapes() == []
        close(x * x, [9, 16])


class TestUsedUp:
    @pytest.mark.parametrize("method", ["gradient", "jacobian", "jvp"])
    def test_a_second_call_is_refused(self, method):
        x = tensor([3.0])
        with kg.GradientTape() as tape:
            tape.watch(x)
            y = x * x
        close(tape.gradient(y, x), [6])
        with pytest.raises(RuntimeError, match="already been used.*persistent=True"):
            getattr(tape, method)(y, x, *([tensor([1.0])] if method == "jvp" else []))

    def test_a_call_inside_its_own_block_is_not_recorded(self):
        x = tensor(3.0)
        with kg.GradientTape() as outer:
            outer.watch(x)
            with kg.GradientTape() as tape:
                tape.watch(x)
                slope = tape.gradient(x * x * x, x)
        close(slope, 27)
        close(outer.gradient(slope, x), 18)

    def test_a_persistent_tape_records_its_own_calls(self):
        x = tensor(2.0)
        with kg.GradientTape(persistent=True) as tape:
            tape.watch(x)
            y = x**4
            first = tape.gradient(y, x)
            second = tape.gradient(first, x)
            third = tape.gradient(second, x)
        close([first, second, third, tape.gradient(third, x)], [32, 48, 48, 24], rtol=1e-4)


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
