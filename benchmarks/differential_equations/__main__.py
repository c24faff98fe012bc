"""The examples of differential equations with nested gradients, and in one pass.

For each example, the CPU time until the relative error is below 1e-3: with derivatives that are gradients of gradients,
as users write them without `kg.layers.Laplacian` and `PartialDerivatives`, and with these layers. The training is the
same, so that both take the same steps, and the losses of the first steps must agree. The steps are counted in a run
with the layers. The time of a step is the median of blocks of steps of both ways, which are timed in turns in one
process, on one thread. CPU time does not depend on what else the machine does. The first calls, which compile, are
apart.

    (nothing)   measures what is missing on JAX, then writes the tables. Each example has a process of its own, and its
                result is saved after each phase in benchmarks/results/BACKEND_differential_equations.json
    --example   measures this example, even if there is a result
    --report    only writes the tables in docs/differential_equations.md
"""

import argparse
import subprocess
import sys

from benchmarks.differential_equations import report
from benchmarks.run import BACKENDS, ROOT, environment_of


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.differential_equations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="may be repeated; JAX by default")
    parser.add_argument("--example", action="append", choices=tuple(report.EXAMPLES), help="may be repeated")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    backends = options.backend or ["jax"]
    if options.here:
        from benchmarks.differential_equations import measuring

        name = options.example[0]
        return measuring.measure(name, lambda result: report.save(backends[0], name, result))
    for backend in () if options.report else backends:
        for name in options.example or report.missing(backend):
            command = [sys.executable, "-m", "benchmarks.differential_equations", "--here", f"--example={name}"]
            command.append(f"--backend={backend}")
            subprocess.run(command, cwd=ROOT, env=environment_of(backend), check=True)
    report.write()


if __name__ == "__main__":
    main()
