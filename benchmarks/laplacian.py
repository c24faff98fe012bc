"""Laplacians of networks compared with folx on JAX, and with torch-jet on torch: `python -m benchmarks.laplacian`.

For tanh networks of three layers of 64 units. The two are timed in turns in one process, and the medians are compared.

- `--backend jax`: folx, the forward Laplacian. The time of a call and of the first call, compiled, with and without the
  gradient with respect to the weights. folx is not among the requirements: `pip install folx`.
- `--backend torch`: the collapsed Taylor mode of torch-jet, where its repository is in PYTHONPATH, and second
  derivatives by nesting `torch.func`. One thread. `--compiled` compares inductor's code instead of recorded operations.
  Writes benchmarks/results/torch_laplacian.json or torch_laplacian_compiled.json.
"""

import argparse
import json
import os
import time

import numpy as np

from benchmarks.run import RESULTS

# Dimensions and batch sizes.
SIZES = {
    "jax": [(2, 64), (2, 1024), (3, 2048), (10, 256), (10, 2048), (50, 64), (50, 256), (100, 64)],
    "torch": [(d, batch) for d in (2, 10, 50, 100) for batch in (64, 1024)],
}
MOST_ROUNDS = 200
SECONDS = 1.0


def network(dimensions):
    import keras

    keras.utils.set_random_seed(0)
    hidden = [keras.layers.Dense(64, "tanh") for _ in range(3)]
    return keras.Sequential([keras.Input((dimensions,)), *hidden, keras.layers.Dense(1)])


def points(batch, dimensions):
    return np.random.default_rng(0).normal(size=(batch, dimensions)).astype("float32")


def against_folx(dimensions, batch, with_gradient):
    """The seconds of a call and of the first call, of folx and of this package, and their largest difference."""
    import folx  # type: ignore[import-not-found]
    import jax
    from jax import numpy as jnp

    import keras_gradtools as kg

    def plain(point, weights):
        *layers, (kernel, bias) = zip(weights[::2], weights[1::2], strict=True)
        for w, b in layers:
            point = jnp.tanh(point @ w + b)
        return point @ kernel + bias

    def by_folx(weights, x):
        laplacian = folx.forward_laplacian(lambda point: plain(point, weights), disable_jit=True)
        return jax.vmap(lambda point: laplacian(point).laplacian)(x)

    def by_package(weights, x):
        return kg.laplacian(lambda x: fun(weights, x))(x)

    def timed(program):
        start = time.perf_counter()
        result = jax.block_until_ready(program(weights, x))
        return time.perf_counter() - start, result

    fun, weights = kg.functionalize(network(dimensions))
    x = jnp.asarray(points(batch, dimensions))
    programs, first, results = [], [], []
    for laplacian in (by_folx, by_package):
        if with_gradient:
            program = jax.jit(jax.grad(lambda weights, x, f=laplacian: jnp.sum(f(weights, x) ** 2)))
        else:
            program = jax.jit(laplacian)
        seconds, result = timed(program)
        programs.append(program)
        first.append(seconds)
        results.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(result)]))
    once = max(timed(programs[0])[0], 1e-5)
    rounds = min(max(int(SECONDS / once), 9), MOST_ROUNDS)
    times = np.array([[timed(program)[0] for program in programs] for _ in range(rounds)])
    error = np.abs(results[0] - results[1]).max() / np.abs(results[0]).max()
    return np.median(times, axis=0), np.median(times[:, 1] / times[:, 0]), first, error


def folx_table():
    print("| dimensions, batch | gradient | folx (ms) | kg (ms) | kg / folx | first call (s), folx, kg | difference |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    against_folx(2, 64, False)  # what is started only once in a process
    for with_gradient in (False, True):
        for dimensions, batch in SIZES["jax"]:
            (theirs, ours), ratio, first, error = against_folx(dimensions, batch, with_gradient)
            print(
                f"| {dimensions}, {batch} | {'yes' if with_gradient else 'no'} | {1e3 * theirs:.3f} | "
                f"{1e3 * ours:.3f} | {ratio:.2f} | {first[0]:.2f}, {first[1]:.2f} | {error:.0e} |",
                flush=True,
            )


def torch_candidates(dimensions, batch, is_compiled):
    """Functions without arguments: the Laplacian by this package, by torch-jet, and by nested derivatives."""
    import torch
    from jet.laplacian import laplacian  # type: ignore[import-not-found]
    from jet.simplify import simplify  # type: ignore[import-not-found]

    import keras_gradtools as kg

    model = network(dimensions)
    weights = [v.value.detach() for v in model.trainable_variables]
    layers = []
    for kernel, bias in zip(weights[::2], weights[1::2], strict=True):
        layer = torch.nn.Linear(*kernel.shape)
        layer.weight.data, layer.bias.data = kernel.T.contiguous(), bias
        layers += [layer, torch.nn.Tanh()]
    plain = torch.nn.Sequential(*layers[:-1])
    x = torch.from_numpy(points(batch, dimensions))
    mock = torch.zeros(dimensions)
    whole = laplacian(plain, mock)
    collapsed = torch.func.vmap(simplify(lambda point: whole(point)[2], mock, pull_sum=True))

    def trace(point):
        return torch.func.hessian(lambda point: plain(point)[0])(point).trace()[None]

    candidates = [kg.laplacian(model), collapsed, torch.func.vmap(trace)]
    if is_compiled:
        # Inductor takes minutes for the nested derivatives.
        candidates = [kg.jit(lambda x: kg.laplacian(model)(x), compiler="inductor"), torch.compile(collapsed)]

    def run(fun):
        def call():
            with torch.no_grad():
                return fun(x)

        return call

    return [run(fun) for fun in candidates]


def against_torch_jet(dimensions, batch, is_compiled):
    """The milliseconds and the ratios of CPU times, as a row of the results."""
    from benchmarks import timing

    ours, *others = torch_candidates(dimensions, batch, is_compiled)
    for _ in range(4):
        found = ours().detach().numpy()
    row: dict = {"dimensions": dimensions, "batch": batch}
    for name, theirs in zip(("torch_jet", "nested"), others, strict=False):
        expected = [theirs() for _ in range(3)][-1].detach().numpy()
        difference = float(np.abs(found - expected).max() / np.abs(expected).max())
        if difference > 1e-5:
            raise AssertionError(f"The values differ by {difference:.1e} from those of {name}.")
        compared = timing.compare(ours, theirs, lambda result: result, for_seconds=SECONDS)
        row |= {
            f"kg_ms_beside_{name}": round(compared.ours_ms, 3),
            f"{name}_ms": round(compared.theirs_ms, 3),
            f"over_{name}": round(compared.cpu_ratio, 2),
        }
    return row


def torch_table(is_compiled):
    import torch

    torch.set_num_threads(1)
    rows = []
    print("| dimensions, batch | kg (ms) | torch-jet (ms) | kg / torch-jet | kg / nested |")
    print("| --- | --- | --- | --- | --- |")
    for size in SIZES["torch"]:
        row = against_torch_jet(*size, is_compiled)
        rows.append(row)
        print(
            f"| {row['dimensions']}, {row['batch']} | {row['kg_ms_beside_torch_jet']} | {row['torch_jet_ms']} | "
            f"{row['over_torch_jet']} | {row.get('over_nested', '')} |",
            flush=True,
        )
    name = "torch_laplacian_compiled.json" if is_compiled else "torch_laplacian.json"
    (RESULTS / name).write_text(json.dumps(rows, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=tuple(SIZES), default=os.environ.get("KERAS_BACKEND", "jax"))
    parser.add_argument("--compiled", action="store_true", help="on torch: by inductor")
    options = parser.parse_args()
    os.environ["KERAS_BACKEND"] = options.backend
    if options.backend == "jax":
        folx_table()
    else:
        torch_table(options.compiled)


if __name__ == "__main__":
    main()
