"""Runs the tests of the tape and of the penalties on the oldest and the newest supported Keras and frameworks.

Each row of the table is installed into a throw-away environment of its own under .venvs/. The oldest
versions are the lower bounds of pyproject.toml; the newest are whatever pip finds.
"""

import argparse
import pathlib
import shutil
import subprocess
import sys
import typing

ROOT = pathlib.Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / ".venvs"


class Row(typing.NamedTuple):
    """One environment: a backend and what pip is to install for it."""

    backend: str
    age: str
    packages: tuple

    @property
    def name(self):
        return f"{self.backend}-{self.age}"


ROWS = (
    Row("tensorflow", "oldest", ("keras==3.10.0", "numpy==1.26.4", "tensorflow==2.18.0")),
    Row("tensorflow", "newest", ("keras", "numpy", "tensorflow")),
    Row("jax", "oldest", ("keras==3.10.0", "jax==0.9.0", "jaxlib==0.9.0")),
    Row("jax", "newest", ("keras", "numpy", "jax")),
    # One torch: the one that the development environment has too, as others may come with gigabytes of CUDA.
    Row("torch", "oldest", ("keras==3.10.0", "torch==2.13.0")),
)


def tests_of_internals():
    """The tests of what knows the insides of Keras or of a framework."""
    patterns = (
        "test_tape*.py",
        "backend/test_*.py",
        "regularization/test_example_losses.py",
        "models/test_input_gradient_regularized.py",
        "layers/test_input_gradient_penalty.py",
    )
    return sorted(path for pattern in patterns for path in (ROOT / "tests").glob(pattern))


def run(row, paths):
    """Installs one row and runs the tests there; returns the versions found and what came of it."""
    folder = ENVIRONMENTS / row.name
    python = folder / "bin" / "python"
    print(f"\n{row.name}: installing {' '.join(row.packages)}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    install = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    if subprocess.run([*install, "-e", f"{ROOT}[{row.backend},test]", *row.packages]).returncode:
        return "", "could not be installed"
    listing = subprocess.run([python, "-m", "pip", "freeze"], check=True, capture_output=True, text=True).stdout
    shown = [line for line in listing.splitlines() if line.split("==")[0] in ("keras", "numpy", row.backend)]
    tests = subprocess.run([python, ROOT / "tests" / "run.py", "--backend", row.backend, *paths])
    return " ".join(shown), "failed" if tests.returncode else "passed"


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", help="test files or folders; those of what knows internals when left out")
    parser.add_argument("--backend", choices=sorted({row.backend for row in ROWS}))
    parser.add_argument("--age", choices=("oldest", "newest"))
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    options = parser.parse_args()
    paths = options.paths or tests_of_internals()

    results = []
    for row in ROWS:
        if options.backend in (None, row.backend) and options.age in (None, row.age):
            results.append((row.name, *run(row, paths)))
            if not options.keep:
                shutil.rmtree(ENVIRONMENTS / row.name)
    print()
    for name, versions, result in results:
        print(f"{name:<18} {result:<8} {versions}")
    return int(any(result != "passed" for *_, result in results))


if __name__ == "__main__":
    sys.exit(main())
