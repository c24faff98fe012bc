"""Laplacians of networks compared with folx, the forward Laplacian on JAX: `python -m benchmarks.laplacian`.

For tanh networks of three layers of 64 units: the time of a call and of the first call, compiled, with and without the
gradient with respect to the weights. The two are timed in turns in one process, and the medians are compared. folx is
not among the requirements: `pip install folx`.
"""

import os
import time

os.environ.setdefault("KERAS_BACKEND", "jax")

import folx  # type: ignore[import-not-found]  # noqa: E402
import jax  # noqa: E402
import keras  # noqa: E402
import numpy as np  # noqa: E402
from jax import numpy as jnp  # noqa: E402

import keras_gradtools as kg  # noqa: E402

# Dimensions and batch sizes.
SIZES = [(2, 64), (2, 1024), (3, 2048), (10, 256), (10, 2048), (50, 64), (50, 256), (100, 64)]
MOST_ROUNDS = 200
SECONDS = 1.0


def network(dimensions):
    """The model in Keras, and the same function of one point and the weights in plain JAX."""
    hidden = [keras.layers.Dense(64, "tanh") for _ in range(3)]
    model = keras.Sequential([keras.Input((dimensions,)), *hidden, keras.layers.Dense(1)])

    def plain(point, weights):
        *layers, (kernel, bias) = zip(weights[::2], weights[1::2], strict=True)
        for w, b in layers:
            point = jnp.tanh(point @ w + b)
        return point @ kernel + bias

    return model, plain


def compared(dimensions, batch, with_gradient):
    """The seconds of a call and of the first call, of folx and of this package, and their largest difference."""
    model, plain = network(dimensions)
    fun, weights = kg.functionalize(model)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(batch, dimensions)), "float32")

    def by_folx(weights, x):
        laplacian = folx.forward_laplacian(lambda point: plain(point, weights), disable_jit=True)
        return jax.vmap(lambda point: laplacian(point).laplacian)(x)

    def by_package(weights, x):
        return kg.laplacian(lambda x: fun(weights, x))(x)

    programs, first, results = [], [], []
    for laplacian in (by_folx, by_package):
        if with_gradient:
            program = jax.jit(jax.grad(lambda weights, x, f=laplacian: jnp.sum(f(weights, x) ** 2)))
        else:
            program = jax.jit(laplacian)
        seconds, result = timed(program, weights, x)
        programs.append(program)
        first.append(seconds)
        results.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(result)]))
    once = max(timed(programs[0], weights, x)[0], 1e-5)
    rounds = min(max(int(SECONDS / once), 9), MOST_ROUNDS)
    times = np.array([[timed(program, weights, x)[0] for program in programs] for _ in range(rounds)])
    error = np.abs(results[0] - results[1]).max() / np.abs(results[0]).max()
    return np.median(times, axis=0), np.median(times[:, 1] / times[:, 0]), first, error


def timed(program, *args):
    start = time.perf_counter()
    result = jax.block_until_ready(program(*args))
    return time.perf_counter() - start, result


def main():
    print("| dimensions, batch | gradient | folx (ms) | kg (ms) | kg / folx | first call (s), folx, kg | difference |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    compared(2, 64, False)  # what is started only once in a process
    for with_gradient in (False, True):
        for dimensions, batch in SIZES:
            (theirs, ours), ratio, first, error = compared(dimensions, batch, with_gradient)
            print(
                f"| {dimensions}, {batch} | {'yes' if with_gradient else 'no'} | {1e3 * theirs:.3f} | "
                f"{1e3 * ours:.3f} | {ratio:.2f} | {first[0]:.2f}, {first[1]:.2f} | {error:.0e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
