"""Runs the tests once for each backend, in one process each, and sums the results up.

Keras fixes its backend, and JAX its precision, when they are imported, so that neither can change
inside a process: the `float64` tests of JAX have a fourth process, with JAX_ENABLE_X64=1.
"""

import argparse
import concurrent.futures
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
import typing
import xml.etree.ElementTree

ROOT = pathlib.Path(__file__).resolve().parent.parent
BACKENDS = ("tensorflow", "jax", "torch")
NO_TESTS_COLLECTED = 5

# The processes share the cores: each framework would otherwise start a thread for every core. On JAX most of the time
# goes into compiling programs that run a few times, much of it into making them fast.
FEW_THREADS = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false --xla_backend_optimization_level=0",
}
# TensorFlow 2.18 aborts where it meets these.
FOR_JAX = " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
# Many tests come to the same programs: compiled once, for this run alone.
JAX_CACHE = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
# Programs are written down for the compiler without the stack trace of each operation.
JAX_LOCATIONS = {"JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0"}

_printing = threading.Lock()


class Job(typing.NamedTuple):
    """One pytest process."""

    name: str
    backend: str
    marker: str
    environment: dict


class Outcome(typing.NamedTuple):
    """What one pytest process came to."""

    name: str
    passed: int
    failed: int
    skipped: int
    seconds: float
    note: str


def jobs_for(backends, slow):
    """The processes to run: one for each backend, and one more for double precision on JAX."""
    speed = "slow" if slow else "not slow"
    jobs = []
    for backend in backends:
        if backend == "jax":
            # Left out here rather than skipped, since the next process runs them.
            jobs.append(Job("jax", "jax", f"{speed} and not float64", {"JAX_ENABLE_X64": "0"}))
            jobs.append(Job("jax float64", "jax", f"{speed} and float64", {"JAX_ENABLE_X64": "1"}))
        else:
            jobs.append(Job(backend, backend, speed, {}))
    return jobs


def run(job, paths):
    """Runs one process: its progress is printed as it comes, everything else in one piece at its end."""
    environment = {"TF_CPP_MIN_LOG_LEVEL": "2", **FEW_THREADS, **JAX_CACHE, **JAX_LOCATIONS, **os.environ}
    if job.backend == "jax" and "XLA_FLAGS" not in os.environ:
        environment["XLA_FLAGS"] += FOR_JAX
    environment |= {"KERAS_BACKEND": job.backend, "PYTHONUNBUFFERED": "1", **job.environment}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        environment = {"JAX_COMPILATION_CACHE_DIR": str(pathlib.Path(folder, "jax")), **environment}
        report = pathlib.Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-m", job.marker, f"--junit-xml={report}"]
        # One cache each: processes that end together would overwrite one another's list of failures.
        command += ["-o", f"cache_dir=.pytest_cache/{job.name.replace(' ', '-')}", *paths]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        rest = []
        for line in process.stdout:
            if line.rstrip().endswith("%]"):
                show(job, [line])
            else:
                rest.append(line)
        code = process.wait()
        outcome = read_report(job, report, code, time.perf_counter() - started)
    show(job, rest)
    return outcome


def show(job, lines):
    """Prints lines under the name of their process, not torn apart by those of another one."""
    with _printing:
        for line in lines:
            print(f"[{job.name}] {line}".rstrip(), flush=True)


def read_report(job, report, code, seconds):
    """Reads pytest's counts. A process that ended without them, in a crash say, counts as one failure."""
    if not report.exists():
        return Outcome(job.name, 0, 1, 0, seconds, f"ended without a report, exit status {code}")
    suite = xml.etree.ElementTree.parse(report).getroot().find("testsuite")
    tests, failures, errors, skipped = (int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped"))
    failed = failures + errors
    note = "no such tests" if code == NO_TESTS_COLLECTED else ""
    if code not in (0, NO_TESTS_COLLECTED) and not failed:
        failed, note = 1, f"exit status {code}"
    return Outcome(job.name, max(tests - failures - errors - skipped, 0), failed, skipped, seconds, note)


def summarize(outcomes):
    """Prints a row for each process and the totals; returns the exit status."""
    print(f"\n{'':<14}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}")
    for outcome in outcomes:
        counts = f"{outcome.passed:>8}{outcome.failed:>8}{outcome.skipped:>9}{outcome.seconds:>9.1f}"
        print(f"{outcome.name:<14}{counts}  {outcome.note}".rstrip())
    passed, failed, skipped = (sum(outcome[column] for outcome in outcomes) for column in (1, 2, 3))
    # A run without a single test has shown nothing.
    status = 1 if failed or not passed + skipped else 0
    print(f"\n{passed} passed, {failed} failed, {skipped} skipped", flush=True)
    return status


def main(arguments=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", help="test files or folders; all tests when left out")
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="may be repeated; all three when left out")
    parser.add_argument("--slow", action="store_true", help="run the tests marked slow, and no others")
    parser.add_argument("--jobs", type=int, default=3, help="how many processes run at a time (default: 3)")
    options = parser.parse_args(arguments)

    jobs = jobs_for(options.backend or BACKENDS, options.slow)
    print(f"Running the tests: {', '.join(job.name for job in jobs)}; {options.jobs} at a time", flush=True)
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        outcomes = list(pool.map(lambda job: run(job, options.paths), jobs))
    return summarize(outcomes)


if __name__ == "__main__":
    sys.exit(main())
