"""Writes docs/benchmarks.md from the results of the last whole runs: `python -m benchmarks.report`."""

import json

from benchmarks import tables
from benchmarks.run import BACKENDS, RESULTS, ROOT

HEAD = """# Benchmarks

What the package costs, measured on the machine that is named under each heading. `make bench` measures the
times again (`make bench BACKEND=jax` on one backend), `.venv/bin/python -m benchmarks.run --memory` the
memory, and `.venv/bin/python -m benchmarks.report` writes this page from benchmarks/results/.

- *Ratio* is our time over that of code written by hand for the framework, as one who knows it well would
  write it, on the very same Keras model; both are checked to give the same values. It is the median over
  *pairs* of runs in one process, one of each in turn, with the quartiles beside it. The first runs, which
  compile, are left out. *Unsure* is said where the target lies within the 95% confidence interval of that
  median.
- *CPU ratio* is the same of the CPU time of the process, which other work on the machine disturbs less.
- One thread. Batches are doubled until the hand-written code takes 5 ms, but for the rows of fixed sizes
  (eager tape on JAX, training steps).
- *Compiled* is `kg.jit` against `tf.function` or `jax.jit`; *XLA* is `tf.function(jit_compile=True)` around
  both; *fit* is `train_on_batch` as Keras compiles it. torch runs eagerly: its compiler cannot
  differentiate twice.
- *Batch Jacobian* is compared with one pullback of the whole batch for each output, and *usual code* with
  `vmap(jacrev)`.
- *Regularized step* is compared with double backward in a hand-written `train_step`. *Over plain step* is
  the price of the penalty: a step of the same model without it.
- *Eager tape on JAX* is compared with eager `jax.grad`, once the derivative is compiled: the first run of a
  block differentiates it op by op, the second compiles.
"""


def markdown(head, body):
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def sections():
    for backend in BACKENDS:
        for suffix in ("", "_memory"):
            path = RESULTS / f"{backend}{suffix}.json"
            if path.exists():
                result = json.loads(path.read_text())
                what = ": memory" if suffix else ""
                yield f"## {backend}{what}\n\n{tables.conditions(result)}"
                for caption, head, body in tables.tables(result):
                    yield f"**{caption[0].upper()}{caption[1:]}**\n\n{markdown(head, body)}"


def main():
    page = ROOT / "docs" / "benchmarks.md"
    page.write_text("\n\n".join([HEAD.rstrip(), *sections()]) + "\n")
    print(f"Wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
