"""Real signals at random moments leave nothing behind: no tape, flag, mode, trace, scope or half a step."""

import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_gradtools as kg
from keras_gradtools.curvature import Hessian
from tests.interrupts import GRAPH_MODE, left_behind

SIGNALS = 300
# What an interrupt may leave in JAX's and TensorFlow's own caches of what they compile: see docs/limits.md.
BROKEN_CACHES = ("Recursively calling <weakref", "Input Parameters:")
# On torch, Keras' optimizers switch the grad mode off for an update, and an interrupt may leave it so. In a plain Keras
# model's `train_on_batch`, 2 to 3 of 1,000 interrupts do.
BY_KERAS_OPTIMIZERS = ("steps", "fit")
RNG = np.random.default_rng(11)
X = RNG.normal(size=(8, 3)).astype("float32")
Y = RNG.normal(size=(8, 1)).astype("float32")


class Timer:
    """Raises KeyboardInterrupt out of a signal, once, some time after a call has begun, if it is still running."""

    def __init__(self):
        self._armed = False
        # Whether a cache of the framework's was left unusable, by an earlier interrupt inside of its own code.
        self.broken = False
        signal.signal(signal.SIGALRM, self._handle)

    def _handle(self, number, frame):
        if self._armed:
            self._armed = False
            raise KeyboardInterrupt

    def interrupts(self, run, seconds):
        """Whether `run()` was interrupted."""
        try:
            self._armed = True
            signal.setitimer(signal.ITIMER_REAL, seconds)
            run()
            self._armed = False
        except BaseException as error:
            # Not always KeyboardInterrupt: Python's own locks make errors of it.
            if not self._armed:
                return True
            self._armed = False
            if not any(words in str(error) for words in BROKEN_CACHES):
                raise
            self.broken = True
        return False


def model():
    inner = [layers.Dense(4, "tanh"), layers.BatchNormalization(), layers.Dropout(0.1, seed=1)]
    made = keras.Sequential([keras.Input((3,)), *inner, layers.Dense(1)])
    made.compile("adam", "mse")
    return made


class Work:
    """Each method is something that is interrupted; `check` looks at what an interrupt of it may have left."""

    def __init__(self):
        self.x, self.v = ops.convert_to_tensor(X), keras.Variable(X)
        self.model = model()
        self.hessian = Hessian(self.model, "mse", (X, Y), verbose=0)
        self.offset = np.ones(self.hessian.shape[0], "float32")
        self.regularized = kg.models.InputGradientRegularized(model(), 0.1, method="exact")
        self.regularized.compile("adam", "mse")
        self.second_order = kg.models.SecondOrder(model())
        self.second_order.compile(kg.optimizers.NewtonCG(max_iterations=2), "mse")
        self.jitted = kg.jit(kg.grad(self.fun))

    def fun(self, x):
        return ops.sum(ops.tanh(x * self.v) * x)

    def tape(self):
        with kg.GradientTape() as tape:
            tape.watch(self.x)
            y = self.fun(self.x)
            with tape.stop_recording():
                self.fun(self.x)
        tape.gradient(y, [self.x, self.v])

    def nested_tapes(self):
        with kg.GradientTape() as outer:
            outer.watch(self.x)
            with kg.GradientTape() as inner:
                inner.watch(self.x)
                y = self.fun(self.x)
            dy = inner.gradient(y, self.x)
        outer.gradient(dy, [self.x, self.v])

    def jacobian_of_a_tape(self):
        with kg.GradientTape() as tape:
            tape.watch(self.x)
            y = ops.tanh(self.x * self.v) * self.x
        tape.batch_jacobian(y, self.x)

    def transforms(self):
        kg.grad(self.fun)(self.x)
        kg.jvp(self.fun, (self.x,), (self.x,))
        kg.hvp(self.fun, (self.x,), (self.x,))

    def hessian_of_a_function(self):
        kg.hessian(lambda x: ops.sum(ops.tanh(x) * x))(self.x[0])

    def penalty(self):
        kg.regularization.input_gradient_penalty(self.model, self.x, target="outputs", frozen_statistics=True)

    def layers_seen(self):
        kg.diagnostics.batch_independence(self.model, self.x)

    def compiled(self):
        self.jitted(self.x)

    def moves(self):
        for sign in (1, -1):
            self.hessian.move(sign * self.offset)

    def steps(self):
        self.regularized.train_on_batch(X, Y)

    def second_order_steps(self):
        self.second_order.fit(X, Y, batch_size=8, verbose=0)

    def fit(self):
        self.regularized.fit(X, Y, batch_size=4, verbose=0)


def switch_gradients_on():
    import torch

    torch.set_grad_enabled(True)


def leave_graph_mode():
    from tensorflow.python.eager import context

    context.context()._thread_local_data.is_eager = True


def made_anew(work):
    """As the limits say it is cured."""
    if keras.config.backend() == "jax":
        import jax

        jax.clear_caches()
    work.__init__()


WORK = [name for name in vars(Work) if not name.startswith("_") and name != "fun"]


@pytest.mark.slow
@pytest.mark.parametrize("name", WORK)
def test_signals_leave_nothing_behind(name):
    # In processes of their own: an interrupt can corrupt TensorFlow's memory, as it does in Keras' own `fit`.
    for _ in range(3):
        done = subprocess.run([sys.executable, "-m", "tests.test_interrupts", name], capture_output=True, text=True)
        has_crashed = done.returncode in (-signal.SIGSEGV, -signal.SIGABRT) and keras.config.backend() == "tensorflow"
        if not has_crashed:
            break
    if has_crashed:
        pytest.skip("TensorFlow crashes under this many interrupts, in Keras' own training as well")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def interrupt(name):
    work, timer = Work(), Timer()
    run = getattr(work, name)
    keras_call = layers.Layer.__call__
    for _ in range(3):
        run()
    seconds = _seconds(run)
    hit = 0
    for i in range(SIGNALS):
        models = [work.model, work.regularized, work.second_order]
        moved = [ops.convert_to_numpy(v).copy() for v in work.hessian.variables]
        hit += timer.interrupts(run, RNG.uniform(1e-5, seconds))
        if name in BY_KERAS_OPTIMIZERS and left_behind() == ["grad mode"]:
            switch_gradients_on()
        if left_behind() == [GRAPH_MODE]:
            # Left by an interrupt while a `tf.function` is traced, as in plain TensorFlow.
            leave_graph_mode()
        assert not left_behind(), f"signal {i}: {left_behind()}"
        if timer.broken:
            made_anew(work)
            timer.broken = False
            continue
        assert not getattr(work.x, "requires_grad", False)
        assert layers.Layer.__call__ is keras_call
        assert all(part._trainable for m in models for part in m._flatten_layers())
        assert all(np.isfinite(w).all() for m in models for w in m.get_weights())
        if name == "moves":
            now = [ops.convert_to_numpy(v) for v in work.hessian.variables]
            steps = {float(np.round(np.mean(b - a), 2)) for a, b in zip(moved, now, strict=True)}
            assert len(steps) == 1, f"signal {i} left half a step: {steps}"
    assert hit > SIGNALS // 10
    gradient = kg.grad(lambda x: ops.sum(x * x))(work.x)
    np.testing.assert_allclose(ops.convert_to_numpy(gradient), 2 * X, rtol=1e-6)
    run()
    print(f"{name}: {hit} interrupts, nothing left behind")


def _seconds(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    interrupt(sys.argv[1])
