"""The CPU time of a step of L-BFGS, compared with SciPy's by the same gradient: `python -m benchmarks.lbfgs_step`.

Two networks of `benchmarks.pde` with 50 pairs, and a fit of sinc by 61 weights with ten pairs, in double precision on
1,000 points. Our steps are calls of `train_on_batch`, or those of `fit` with --fit. SciPy's L-BFGS-B calls the very
program that computes our gradients, directly, without the checks of an operator. Both take the same number of steps
from the same start, alternately in one process. Prints the medians over the rounds of the ratios of CPU time, for a
step and for an evaluation, and the evaluations of each. CPU time does not depend on what else the machine does.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

import numpy as np

from benchmarks.run import BACKENDS, ROOT, environment_of

STEPS, ROUNDS, WARM_UP = 100, 5, 3
CASES = {"poisson_2d": 50, "helmholtz": 50, "sinc": 10}


def problem_of(name):
    """A model, its points and its targets, with the same weights on every backend."""
    import keras
    from keras import layers

    from benchmarks.pde import networks
    from benchmarks.pde.problems import PROBLEMS

    if name != "sinc":
        model, points = networks.build(next(p for p in PROBLEMS if p.name == name), 1)
        return model, points, np.zeros((len(points), 1))
    model = keras.Sequential([keras.Input((1,)), layers.Dense(20, "tanh"), layers.Dense(1)])
    rng = np.random.default_rng(1)
    for v in model.trainable_variables:
        v.assign(rng.normal(size=v.shape))
    x = np.linspace(-1.0, 1.0, 1000)[:, None]
    return model, x, np.sinc(10.0 * x)


def scipy_run(model, x, y, memory):
    """A function that takes steps of SciPy's L-BFGS-B from the weights, and returns CPU seconds, steps, evaluations."""
    from keras import ops
    from scipy.optimize import minimize

    import keras_gradtools as kg

    hessian = kg.curvature.Hessian(model, "mse", (x, y), batch_size=len(x), verbose=0)
    start = np.concatenate([ops.convert_to_numpy(v).ravel() for v in model.trainable_variables])
    program = hessian.trials().totals

    def fun(weights):
        (loss, gradient), count = program(weights - start)
        return float(loss) / count, ops.convert_to_numpy(gradient) / count

    options = {"maxcor": memory, "maxiter": STEPS, "maxfun": 10**9, "maxls": 50, "ftol": 0.0, "gtol": 0.0}

    def run():
        begin = time.process_time()
        found = minimize(fun, start, jac=True, method="L-BFGS-B", options=options)
        return time.process_time() - begin, found.nit, found.nfev

    return run


def our_run(model, x, y, memory, uses_fit):
    """The same for `kg.optimizers.LBFGS`."""
    from keras import ops

    import keras_gradtools as kg

    trainer, optimizer = kg.models.SecondOrder(model), kg.optimizers.LBFGS(memory=memory)
    trainer.compile(optimizer, "mse")
    optimizer.build(trainer.trainable_variables)
    variables = [*model.trainable_variables, *optimizer.variables]
    initial = [np.array(ops.convert_to_numpy(v)) for v in variables]
    tensors = [ops.convert_to_tensor(a) for a in (x, y)]
    evaluations, take_step = [], optimizer.take_step

    def counted(*args):
        found = take_step(*args)
        evaluations.append(found.attempts)
        return found

    optimizer.take_step = counted

    def restore():
        for v, value in zip(variables, initial, strict=True):
            v.assign(value)
        evaluations.clear()

    def train(steps):
        if uses_fit:
            trainer.fit(x, y, batch_size=len(x), epochs=steps, shuffle=False, verbose=0)
            return
        for _ in range(steps):
            trainer.train_on_batch(*tensors)

    def run():
        restore()
        begin = time.process_time()
        train(STEPS)
        # The start is evaluated, too.
        return time.process_time() - begin, len(evaluations), sum(evaluations) + 1

    train(WARM_UP)
    restore()
    return run


def measure(backend, names, uses_fit):
    import keras_gradtools as kg
    from benchmarks import hand_written

    hand_written.module().use_one_thread()
    for name in names:
        with kg.double_precision():
            problem = problem_of(name)
            ours, theirs = our_run(*problem, CASES[name], uses_fit), scipy_run(*problem, CASES[name])
            ours(), theirs()
            # They take turns in going first.
            pairs = [(ours(), theirs()) if i % 2 else (theirs(), ours())[::-1] for i in range(ROUNDS)]
        by_step = statistics.median(a[0] / a[1] / (b[0] / b[1]) for a, b in pairs)
        by_evaluation = statistics.median(a[0] / a[2] / (b[0] / b[2]) for a, b in pairs)
        a, b = (min(of, key=lambda r: r[0]) for of in zip(*pairs, strict=True))
        print(
            f"{backend:12}{name:12}{1e3 * a[0] / a[1]:10.2f}{1e3 * b[0] / b[1]:10.2f}{by_step:12.2f}"
            f"{by_evaluation:16.2f}{a[2]:12}{b[2]:8}",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lbfgs_step", description=__doc__.splitlines()[0])
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="may be repeated; all three by default")
    parser.add_argument("--case", action="append", choices=CASES, help="may be repeated; all by default")
    parser.add_argument("--fit", action="store_true", help="our steps are those of `fit`")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.case or list(CASES)
    if options.here:
        measure(options.backend[0], names, options.fit)
        return
    print(f"{'':24}{'ms a step':>20}{'ours over SciPy':>28}{'evaluations':>20}")
    print(
        f"{'backend':12}{'case':12}{'ours':>10}{'SciPy':>10}{'a step':>12}{'an evaluation':>16}{'ours':>12}{'SciPy':>8}"
    )
    flags = [word for name in names for word in ("--case", name)] + ["--fit"] * options.fit
    for backend in options.backend or BACKENDS:
        command = [sys.executable, "-m", "benchmarks.lbfgs_step", "--here", "--backend", backend, *flags]
        environment = {**environment_of(backend), "JAX_ENABLE_X64": "1", "PYTHONPATH": os.fspath(ROOT)}
        subprocess.run(command, cwd=ROOT, env=environment, check=True)


if __name__ == "__main__":
    main()
