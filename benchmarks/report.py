"""Writes docs/benchmarks.md from the results of the last whole runs: `python -m benchmarks.report`."""

import json

from benchmarks import tables
from benchmarks.run import BACKENDS, RESULTS, ROOT

HEAD = """# Benchmarks

What the package costs, measured on the machine that is named under each heading. `make bench` measures the
times again (`make bench BACKEND=jax` on one backend), `.venv/bin/python -m benchmarks.run --memory` the
memory, `.venv/bin/python -m benchmarks.growth` how Jacobians grow, and `.venv/bin/python -m benchmarks.report`
writes this page from benchmarks/results/.

- *Ratio* is our time over that of code written by hand for the framework, as one who knows it well would
  write it, on the very same Keras model; both are checked to give the same values. It is the median over
  *pairs* of runs in one process, one of each in turn, with the quartiles beside it. The first runs, which
  compile, are left out. *Unsure* is said where the target lies within the 95% confidence interval of that
  median.
- *CPU ratio* is the same of the CPU time of the process, which other work on the machine disturbs less.
- *Error* is the largest difference between the two, over the largest entry.
- One thread; the last runs on TensorFlow and JAX went on side by side, on one core each.
- Batches are doubled until the hand-written code takes 5 ms (20 ms where it is one gradient), but for the rows of
  fixed sizes (eager tape on JAX, training steps, the guide's code, kernel Hessian).
- *Compiled* is `kg.jit` against `tf.function` or `jax.jit`; *self-compiled* is a transform that is called as
  it is and compiles itself, against the same; *XLA* is `tf.function(jit_compile=True)` around
  both; *fit* is `train_on_batch` as Keras compiles it. torch runs eagerly: its compiler cannot
  differentiate twice.
- *Batch Jacobian* is compared with one pullback of the whole batch for each output, and *usual code* with
  `vmap(jacrev)`.
- *Exact step* and *finite-difference step* are training steps with an input-gradient penalty, compared with a
  hand-written `train_step` that does the same. *Over plain step* is the price of the penalty: a step of the same model
  without it.
- *Eager tape on JAX* is compared with eager `jax.grad`, once the derivative is compiled: the first run of a
  block differentiates it op by op, the second compiles.
- *Over one gradient*: native is one hand-written gradient by the weights, compiled in the same way (by the
  inputs, for the batch Jacobian), so that the ratio is the cost in gradients. *Linearized* is each product
  after the first at one point.
- *Over the guide's code*: native is the eager code of TensorFlow's guide "Advanced automatic differentiation",
  on its own models. A target of 0.0333 is 30 times faster.
- *Kernel Hessian by pre-activations*: native is the fastest way that was found to get the same matrix by vectorized
  products with it, in chunks.
- *Forward over reverse, over reverse twice*: both are ours; above 1, reverse over reverse is the cheaper way to
  a product with the Hessian. By this the mode was chosen: forward over reverse on JAX, where a convolution's second
  pullback is the expensive one; reverse over reverse on torch, and on TensorFlow, where it matters eagerly alone.
- What the arithmetic comes to, counted in products of matrices: the gradient of a Dense layer inside a network
  takes three, a Hessian product eight, a linearized one six, a Gauss-Newton product five (seven on torch, which has
  no forward mode here); in the first layer two, three, two and three. For the MLP, two square layers behind a
  narrower one, that is 2.5, 1.9 and 1.65 gradients, whoever writes it; the first layer of the wide MLP has most of
  its weights.
- *Per-example gradients* are compared with `vmap` of the gradient (`tf.vectorized_map`, `torch.func.vmap`).
"""


def markdown(head, body):
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def sections():
    for backend in BACKENDS:
        for suffix, what in (("", ""), ("_memory", ": memory"), ("_growth", ": growth")):
            path = RESULTS / f"{backend}{suffix}.json"
            if path.exists():
                result = json.loads(path.read_text())
                yield f"## {backend}{what}\n\n{tables.conditions(result)}"
                for caption, head, body in tables.tables(result):
                    yield f"**{caption[0].upper()}{caption[1:]}**\n\n{markdown(head, body)}"


def main():
    page = ROOT / "docs" / "benchmarks.md"
    page.write_text("\n\n".join([HEAD.rstrip(), *sections()]) + "\n")
    print(f"Wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
