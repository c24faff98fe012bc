"""Threads do not see each other's tapes, and a tape that is gone has left nothing behind."""

import contextlib
import gc
import os
import threading
import weakref

import keras
import numpy as np
import pytest
from keras import ops

import keras_gradtools as kg
from keras_gradtools.keras_state.recording import active_tapes
from tests.cases import close, tensor


def in_threads(*functions):
    """Runs each function in a thread of its own, at the same time, and returns their results in order."""
    results, errors = [None] * len(functions), []

    def run(i):
        try:
            results[i] = functions[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


class TestThreads:
    def test_each_has_its_own_tapes(self):
        """Four threads are inside their tapes at the same time, on shared and on own tensors."""
        shared, v = tensor(3.0), keras.Variable(2.0)
        together = threading.Barrier(4, timeout=60)

        def work(factor):
            def run():
                own = tensor(float(factor))
                with kg.GradientTape() as outer:
                    outer.watch([shared, own])
                    with kg.GradientTape() as tape:
                        tape.watch([shared, own])
                        together.wait()
                        assert len(active_tapes()) == 2
                        y = own * shared * shared * v
                        together.wait()
                    slope = tape.gradient(y, [shared, own, v])
                    together.wait()
                second = outer.gradient(slope[0], [shared, own, v])
                assert active_tapes() == []
                return slope, second

            return run

        for factor, result in enumerate(in_threads(*map(work, range(1, 5))), start=1):
            # y = f x^2 v at x = 3, v = 2
            close(result, ([12 * factor, 18, 9 * factor], [4 * factor, 12, 6 * factor]))

    def test_another_thread_records_nothing_on_this_tape(self):
        x, v = tensor(3.0), keras.Variable(2.0)
        with kg.GradientTape() as tape:
            tape.watch(x)
            (elsewhere,) = in_threads(lambda: x * x * v)
            assert tape.watched_variables() == ()
            y = elsewhere * x
        close(tape.gradient(y, [x, v]), [18, None])

    def test_a_tape_can_be_differentiated_in_another_thread(self):
        x, v = tensor(3.0), keras.Variable(2.0)
        with kg.GradientTape(persistent=True) as tape:
            tape.watch(x)
            y = x * x * v
        gradients = in_threads(*[lambda: tape.gradient(y, [x, v])] * 2)
        close(gradients, [[12, 9], [12, 9]])

    def test_a_thread_that_fails_inside_its_block_harms_nobody(self):
        def fail():
            with kg.GradientTape():
                raise KeyError

        x = tensor(3.0)
        with kg.GradientTape() as tape:
            tape.watch(x)
            with pytest.raises(KeyError):
                in_threads(fail)
            y = x * x
        close(tape.gradient(y, x), 6)

    def test_recording_starts_again_in_every_thread(self):
        """More operations here than there: records that were ordered by a global count would mix them up."""

        def busy():
            y = tensor(1.0)
            with kg.GradientTape() as tape:
                tape.watch(y)
                z = y
                for _ in range(50):
                    z = z * 1.01
            return tape.gradient(z, y)

        x = tensor(3.0)
        with kg.GradientTape() as tape:
            tape.watch(x)
            y = x * x
            (elsewhere,) = in_threads(busy)
            with tape.stop_recording():
                paused = y * x
            z = y * paused
        close([tape.gradient(z, x), elsewhere], [6 * 27, 1.01**50])


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def one_of_each(x, v):
    """Uses every part of a tape on 100 kB of data."""
    with kg.GradientTape() as outer:
        outer.watch(x)
        with kg.GradientTape(persistent=True) as tape:
            tape.watch(x)
            y = x * x * v
            with tape.stop_recording():
                constant = y + x
            y = y * constant
        gradient = tape.gradient(y, x)
    outer.gradient(gradient, [x, v])
    with kg.GradientTape() as unused:
        unused.watch(x)
        _ = x * v


class TestMemory:
    def test_thousands_of_tapes_do_not_add_up(self):
        x, v = tensor(np.ones(25_000)), keras.Variable(2.0)
        for _ in range(50):
            one_of_each(x, v)
        gc.collect()
        objects, resident = len(gc.get_objects()), resident_bytes()
        for _ in range(700):
            one_of_each(x, v)
        gc.collect()
        # 2100 tapes. One object, or one array, left by each pass would be 700 objects, or 70 MB.
        assert len(gc.get_objects()) - objects < 200
        assert resident_bytes() - resident < 25e6

    def test_a_tape_in_a_tape_that_stays_open_does_not_add_up(self):
        x = tensor(3.0)
        with kg.GradientTape():
            for k in range(300):
                if k == 50:
                    gc.collect()
                    objects = len(gc.get_objects())
                with kg.GradientTape() as tape:
                    tape.watch(x)
                    y = x * x
                tape.gradient(y, x)
            gc.collect()
            assert len(gc.get_objects()) - objects < 100

    @pytest.mark.parametrize("left_by", ["drop", "gradient", "reset"])
    def test_what_was_recorded_is_freed(self, left_by):
        x = tensor(np.ones(3))
        tape = kg.GradientTape(persistent=left_by == "drop")
        with tape:
            tape.watch(x)
            hidden = ops.exp(x)
            y = hidden * hidden
            if left_by == "reset":
                tape.reset()
        alive = weakref.ref(hidden)
        close(tape.gradient(y, x), None if left_by == "reset" else 2 * np.exp([2, 2, 2]))
        del hidden, y
        if left_by == "drop":
            del tape
        gc.collect()
        assert alive() is None

    def test_a_tape_itself_is_freed(self):
        x, v = tensor(3.0), keras.Variable(2.0)
        with kg.GradientTape(persistent=True) as tape:
            tape.watch([x, v])
            y = x * v
        close(tape.gradient(y, [x, v]), [2, 3])
        alive = weakref.ref(tape)
        del tape
        gc.collect()
        assert alive() is None
        close(y, 6)

    def test_a_watched_model_is_freed(self):
        model = keras.Sequential([keras.layers.Dense(2, activation="softplus")])
        x = tensor(np.ones((1, 2)))
        for _ in range(3):  # to be compiled and cached, where that is done
            with kg.GradientTape() as tape:
                y = model(x)
            gradient = tape.gradient(y, model.trainable_variables)
        alive = weakref.ref(model)
        del model, tape, y, gradient
        keras.backend.clear_session()
        gc.collect()
        assert alive() is None


def flags(x):
    """What a framework writes on its tensors: torch alone keeps its record there."""
    return {name: getattr(x, name) for name in ("requires_grad", "is_leaf", "grad_fn", "grad") if hasattr(x, name)}


class TestUserTensors:
    @pytest.mark.parametrize("failing", [False, True])
    def test_are_left_as_they_were(self, failing):
        x, v = tensor([3.0, 4.0]), keras.Variable([1.0, 2.0])
        hidden = x * 2.0
        before = flags(x), flags(hidden), flags(v.value)
        with contextlib.suppress(KeyError), kg.GradientTape(persistent=True) as tape:
            tape.watch([x, hidden])
            y = x * hidden * v
            if failing:
                raise KeyError
        assert (flags(x), flags(hidden), flags(v.value)) == before
        close(tape.gradient(y, [x, hidden, v]), [[6, 16], [3, 8], [18, 32]])
        assert (flags(x), flags(hidden), flags(v.value)) == before
        close([x, hidden, v.value], [[3, 4], [6, 8], [1, 2]])

    def test_are_left_as_they_were_by_a_tape_in_a_tape(self):
        x = tensor(3.0)
        before = flags(x)
        with kg.GradientTape() as outer:
            outer.watch(x)
            inside = flags(x)
            with kg.GradientTape() as inner:
                inner.watch(x)
                y = x * x
            assert flags(x) == inside
            slope = inner.gradient(y, x)
        close(outer.gradient(slope, x), 2)
        assert flags(x) == before


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
