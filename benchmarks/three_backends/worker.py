"""The process of one way. It waits for orders on a connection, and only then computes."""

import math
import multiprocessing.connection
import sys
import time
import warnings

import keras
import numpy as np

import keras_gradtools as kg
from benchmarks import hand_written, measure_backend, models
from benchmarks.three_backends import functions
from benchmarks.three_backends.ways import BY_NAME
from benchmarks.three_backends.works import WORKS

# The calls that compile, and a few more: torch records three training steps, and JAX compiles twice.
FIRST_CALLS, WARM_UPS = 4, 5
# The least time of the calls that are timed together.
BLOCK_SECONDS = 0.02
# In the warning that a function runs in another way than asked for.
NOT_COMPILED = ("eagerly", "one by one")


class NotCompiled(Exception):
    """The work cannot be compiled in this way. The message says why."""


class Worker:
    """The orders, as methods. What they return is sent back."""

    def __init__(self, way):
        self.way, self.block = way, hand_written.module().block
        self.call, self.calls = None, 0
        # What is started with the first program of a process is not part of the first calls of a work.
        square, x = kg.jit(lambda x: keras.ops.sum(x * x), compiler=way.compiler), keras.ops.ones((3,))
        for _ in range(FIRST_CALLS):
            self.block(square(x))

    def prepare(self, number):
        """Compiles a work, and returns the seconds of the first calls and the values."""
        self.call = None
        keras.utils.clear_session()
        work = WORKS[number]
        model = models.build(work.model)
        x, y = models.data(model, work.batch)
        is_step = work.function in functions.STEPS
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if is_step:
                call = functions.prepared_step(work.function, model, x, y, self.way.jit_compile)
            else:
                call = functions.prepared(work.function, model, x, y, self.way.compiler)
            results, start = [], time.perf_counter()
            for _ in range(FIRST_CALLS):
                results.append(call())
                self.block(results[-1])
            seconds = time.perf_counter() - start
            once = min(self._seconds(call) for _ in range(WARM_UPS))
        for warning in caught:
            if any(words in str(warning.message) for words in NOT_COMPILED):
                raise NotCompiled(str(warning.message))
        self.call, self.calls = call, math.ceil(BLOCK_SECONDS / once)
        # A step changes the weights, so that all its results are compared.
        values = keras.tree.flatten(results if is_step else results[-1])
        return {"first_seconds": seconds, "values": [keras.ops.convert_to_numpy(v).astype(np.float64) for v in values]}

    def _seconds(self, call):
        start = time.perf_counter()
        self.block(call())
        return time.perf_counter() - start

    def time(self):
        """The wall-clock and the CPU seconds of a call: those of a block of calls, after one that fills the caches."""
        self.block(self.call())
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(self.calls):
            self.block(self.call())
        return (time.perf_counter() - wall) / self.calls, (time.process_time() - cpu) / self.calls


def main():
    name, uses_one_thread, descriptor = sys.argv[1:]
    connection = multiprocessing.connection.Connection(int(descriptor))
    by_hand = hand_written.module()
    if int(uses_one_thread):
        by_hand.use_one_thread()
    worker = Worker(BY_NAME[name])
    connection.send({"machine": measure_backend.machine(), "device": by_hand.device()})
    while True:
        try:
            order, *arguments = connection.recv()
        except EOFError:
            return
        try:
            reply = getattr(worker, order)(*arguments)
        except NotCompiled as error:
            reply = {"reason": str(error)}
        except Exception as error:
            reply = {"reason": f"{type(error).__name__}: {error}"}
        connection.send(reply)


if __name__ == "__main__":
    main()
