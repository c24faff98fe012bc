"""Tries the models of the zoo, cell by cell, and goes on where it stopped: `python -m tests.zoo.run`.

Each cell is a model and a check (see `tests/zoo/checks.py`); what was found is a line of
`tests/zoo/results/BACKEND.jsonl`. The models of keras_hub need `pip install "keras-gradtools[zoo]"`.
"""

import argparse
import json
import os
import pathlib
import select
import subprocess
import sys
import time

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
ROOT = RESULTS.parents[2]
BACKENDS = ("torch", "tensorflow", "jax")
STARTING = 300
# A process keeps what was compiled; a new one begins without.
MOST_CELLS = 90


class Worker:
    """One process for one backend, started when it is needed, and again after a cell that took too long."""

    def __init__(self, backend):
        self._backend, self._process, self._cells, self._shared_by = backend, None, 0, None

    def ask(self, cell, timeout, shared_by=None, runs_long=False):
        """The answer of the process; a `timeout` or a `crash` in its place.

        Consecutive cells with equal `shared_by` share a process. If the cell `runs_long`, its programs take longer to
        run than to compile.
        """
        if self._process is None or self._cells >= MOST_CELLS or self._shared_by != shared_by:
            self.stop()
            self._shared_by = shared_by
            self._start(runs_long)
        self._cells += 1
        start = time.monotonic()
        self._process.stdin.write(json.dumps(cell) + "\n")
        self._process.stdin.flush()
        line = self._line(timeout)
        if line:
            return json.loads(line)
        seconds = round(time.monotonic() - start, 2)
        status = "crash" if line == "" else "timeout"
        text = "the process died" if line == "" else f"stopped after {timeout} s"
        self.stop()
        return {"model": cell[0], "check": cell[1], "status": status, "seconds": seconds, "text": text}

    def _start(self, runs_long):
        environment = os.environ | {"KERAS_BACKEND": self._backend, "OMP_NUM_THREADS": "1"}
        # Some models mix integers of 32 and 64 bits then: try them with JAX_ENABLE_X64=0.
        environment.setdefault("JAX_ENABLE_X64", "1")
        environment["TF_CPP_MIN_LOG_LEVEL"] = "3"
        if self._backend == "jax":
            flags = ["--xla_cpu_use_fusion_emitters=false"]
            if not runs_long:
                flags.append("--xla_backend_optimization_level=0")
            environment.setdefault("XLA_FLAGS", " ".join(flags))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.zoo.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        self._cells = 0
        if not self._line(STARTING):
            self.stop()
            raise SystemExit(f"The process for {self._backend} does not start: python -m tests.zoo.worker says why.")

    def _line(self, timeout):
        """A line, "" where the process has ended, None where it took too long."""
        ready, _, _ = select.select([self._process.stdout], [], [], timeout)
        return self._process.stdout.readline() if ready else None

    def stop(self):
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def known(backend):
    """What was found before, by cell; the last line of a cell counts."""
    path = RESULTS / f"{backend}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {(found["model"], found["check"]): found for found in map(json.loads, lines)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="all three by default")
    parser.add_argument("--model", action="append", help="some models; all by default")
    parser.add_argument("--check", action="append", help="some checks; all by default")
    parser.add_argument("--group", action="append", help="examples, keras_hub or keras.applications")
    parser.add_argument("--again", action="store_true", help="cells that were tried before, too")
    parser.add_argument("--timeout", type=int, default=120, help="seconds for a cell")
    options = parser.parse_args()
    # Only the names are needed here, and the process that tries them has a backend of its own.
    os.environ.setdefault("KERAS_BACKEND", (options.backend or BACKENDS)[0])
    from tests.zoo.catalogue import GROUPS
    from tests.zoo.checks import CHECKS, IN_DOUBLE

    groups = {name: models for name, models in GROUPS.items() if not options.group or name in options.group}
    models = [name for group in groups.values() for name in group if not options.model or name in options.model]
    checks = [check for check in CHECKS if not options.check or check in options.check]
    RESULTS.mkdir(exist_ok=True)
    for backend in options.backend or BACKENDS:
        before, worker = {} if options.again else known(backend), Worker(backend)
        for cell in [(m, c) for m in models for c in checks if (m, c) not in before]:
            # What is compiled for several large models may not fit into memory. Their convolutions in double precision
            # are slow without optimization. Two training steps in single precision take longer to optimize than to run.
            is_large = cell[0] in GROUPS["keras.applications"]
            runs_long = is_large and cell[1] in IN_DOUBLE
            shared_by = (cell[0], runs_long) if is_large else None
            found = worker.ask(cell, options.timeout, shared_by, runs_long)
            with open(RESULTS / f"{backend}.jsonl", "a") as file:
                file.write(json.dumps(found) + "\n")
            print(f"{backend:11}{cell[0]:28}{cell[1]:20}{found['status']:9}{found['seconds']:7.1f} s", flush=True)
        worker.stop()


if __name__ == "__main__":
    main()
