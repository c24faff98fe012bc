"""The ways to train. Each takes a `Training` and trains until its clock raises `OutOfTime`, or no step is possible."""

import contextlib
import time

import keras
import numpy as np
from keras import ops

import keras_gradtools as kg
from benchmarks.pde.clock import OutOfTime
from keras_gradtools.training.current_weights import sync_weights

MEMORY, STEPS_AT_ONCE, WARM_UP = 50, 25, 3
RATES = (1e-3, 3e-3, 1e-2)


class Training:
    """A model, its points, and a clock."""

    def __init__(self, model, points, clock, rate):
        self.model, self.points, self.clock, self.rate = model, points, clock, rate
        self.targets = np.zeros((len(points), 1))

    def weights(self):
        return [np.array(ops.convert_to_numpy(v)) for v in self.model.trainable_variables]

    def set_weights(self, values):
        for v, value in zip(self.model.trainable_variables, values, strict=True):
            v.assign(value)

    def split(self, flat):
        shapes = [v.shape for v in self.model.trainable_variables]
        ends = np.cumsum([int(np.prod(s)) for s in shapes])[:-1]
        return [part.reshape(s) for part, s in zip(np.split(flat, ends), shapes, strict=True)]


def adam(training):
    """Adam on all points, with a cosine decay to zero at the end of the time."""
    # Keras has no steps_per_execution on torch.
    at_once = 1 if keras.backend.backend() == "torch" else STEPS_AT_ONCE
    trainer = kg.models.CompiledTraining(training.model) if at_once == 1 else training.model
    x, y = (np.concatenate([a] * at_once) for a in (training.points, training.targets))
    initial, clock = training.weights(), training.clock

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            clock.tick(self.weights, at_once)

        def weights(self):
            # On JAX, `fit` holds them elsewhere.
            sync_weights(trainer, training.model)
            return training.weights()

    def fit(schedule, epochs, callbacks=()):
        options = {} if at_once == 1 else {"steps_per_execution": at_once, "jit_compile": True}
        trainer.compile(keras.optimizers.Adam(schedule), "mse", **options)
        run = {"batch_size": len(training.points), "shuffle": False, "verbose": 0}
        # Compiles, and then starts again.
        trainer.fit(x, y, epochs=2, **run)
        training.set_weights(initial)
        trainer.optimizer.iterations.assign(0)
        for v in trainer.optimizer.variables:
            if len(v.shape):
                v.assign(np.zeros(v.shape))
        clock.start()
        trainer.fit(x, y, epochs=epochs, callbacks=list(callbacks), **run)

    # The schedule needs the number of steps that fit into the time.
    trial = 4 if at_once > 1 else 40
    fit(training.rate, trial)
    begin = time.process_time()
    trainer.fit(x, y, epochs=trial, batch_size=len(training.points), shuffle=False, verbose=0)
    a_step = (time.process_time() - begin) / (trial * at_once)
    training.set_weights(initial)
    steps = max(int((clock.limit - clock.spent) / a_step), 1)
    fit(keras.optimizers.schedules.CosineDecay(training.rate, steps), 10**9, [Watch()])


def by(make):
    """Training by one of `kg.optimizers`."""

    def train(training):
        x, y = (ops.convert_to_tensor(a) for a in (training.points, training.targets))
        trainer, optimizer = kg.models.SecondOrder(training.model), make()
        trainer.compile(optimizer, "mse")
        optimizer.build(trainer.trainable_variables)
        variables = [*training.model.trainable_variables, *optimizer.variables]
        initial = [np.array(ops.convert_to_numpy(v)) for v in variables]
        # Compiles, and then starts again.
        for _ in range(WARM_UP):
            trainer.train_on_batch(x, y)
        for v, value in zip(variables, initial, strict=True):
            v.assign(value)
        training.clock.start()
        failed = 0
        while failed < 5:
            trainer.train_on_batch(x, y)
            failed = failed + 1 if trainer.last_step.step is None else 0
            training.clock.tick(training.weights)

    return train


def flat_function(training):
    """The loss and its gradient as a function of a flat vector, compiled, and the start."""
    hessian = kg.curvature.Hessian(
        training.model, "mse", (training.points, training.targets), batch_size=len(training.points), verbose=0
    )
    start = np.concatenate([w.ravel() for w in training.weights()])
    for _ in range(2):
        hessian.loss_and_gradient(np.zeros_like(start))
    return lambda x: hessian.loss_and_gradient(x - start), start


def scipy_lbfgs(training):
    """L-BFGS-B of SciPy. It is started again where it ends by itself before the time does."""
    from scipy.optimize import minimize

    fun, x = flat_function(training)
    options = {"maxcor": MEMORY, "maxiter": 10**9, "maxfun": 10**9, "maxls": 50, "ftol": 0.0, "gtol": 0.0}
    training.clock.start()
    while True:
        found = minimize(
            fun, x, jac=True, method="L-BFGS-B", options=options,
            callback=lambda x: training.clock.tick(lambda: training.split(x)),
        )  # fmt: skip
        if found.nit < 2:
            return
        x = found.x


def torch_lbfgs(training):
    """`torch.optim.LBFGS` with its strong Wolfe line search, on a flat vector."""
    import torch

    fun, start = flat_function(training)
    x = torch.tensor(start, requires_grad=True)
    options = {"history_size": MEMORY, "tolerance_grad": 0.0, "tolerance_change": 0.0, "max_iter": 1, "max_eval": 50}
    optimizer = torch.optim.LBFGS([x], line_search_fn="strong_wolfe", **options)
    known: dict = {}

    def closure():
        # A call of `step` evaluates its start, which the former one has done at the end of its line search.
        at = x.detach().numpy().copy()
        if at.tobytes() not in known:
            known.update({at.tobytes(): fun(at)})
        loss, gradient = known[at.tobytes()]
        x.grad = torch.tensor(gradient)
        return torch.tensor(loss, dtype=x.dtype)

    training.clock.start()
    failed = 0
    while failed < 5:
        before = x.detach().clone()
        for at in list(known)[:-50]:
            del known[at]
        optimizer.step(closure)
        failed = failed + 1 if torch.equal(before, x.detach()) else 0
        training.clock.tick(lambda: training.split(x.detach().numpy()))


METHODS = {
    "Adam": adam,
    "Adam, then SciPy's L-BFGS": scipy_lbfgs,
    "Adam, then torch.optim.LBFGS": torch_lbfgs,
    "Adam, then LBFGS": by(lambda: kg.optimizers.LBFGS(memory=MEMORY)),
    'Adam, then BFGS("ssbroyden")': by(lambda: kg.optimizers.BFGS("ssbroyden", scales_first=True)),
    "Adam, then LevenbergMarquardt": by(lambda: kg.optimizers.LevenbergMarquardt(geodesic_acceleration=True)),
    "Adam, then NewtonCG": by(lambda: kg.optimizers.NewtonCG()),
}


def methods_on(backend):
    return [m for m in METHODS if backend == "torch" or "torch" not in m]


def run(method, training):
    with contextlib.suppress(OutOfTime):
        METHODS[method](training)
