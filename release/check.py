"""Checks a release: builds it, and tests the built wheel in an empty environment for each backend alone.

1. `python -m build` makes the source distribution, and the wheel from it. `twine check --strict` reads both.
2. The wheel holds the package alone. The source distribution holds what `make` needs.
3. For each backend, the wheel is installed with that backend and the extras of README's install line into an empty
   environment under .venvs/, where no other backend is installed. A first start without KERAS_BACKEND finds the only
   one. The code of the README and of the page Start runs there. Each of these steps is timed.
4. The extra `test` is added, and the tests run there, from the source distribution without its package. By default
   these are the files of `TESTS`, which touch every subject, and take a few minutes for each backend.

    make release-check                                       # all three backends
    make release-check BACKEND=torch CONSTRAINTS=cpu.txt     # with a file of constraints for pip, such as torch==2.13.0
    make release-check TESTS=tests                           # all fast tests
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
ENVIRONMENTS = ROOT / ".venvs"
BACKENDS = ("tensorflow", "jax", "torch")
README_EXTRAS = "plots"
TESTS = (
    "tests/test_public_names.py",
    "tests/test_first_errors.py",
    "tests/tape/test_gradient.py",
    "tests/transforms/test_first_order.py",
    "tests/gradient_control/test_every_control.py",
    "tests/curvature/test_damped_solve.py",
    "tests/attacks/test_robustness_report.py",
    "tests/diagnostics/test_dead_units.py",
    "tests/second_order/test_newton_step.py",
    "tests/training",
)
IN_SOURCE = (
    "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "SECURITY.md",
    "benchmarks", "docs", "examples", "keras_gradtools", "pyproject.toml", "release", "requirements-dev.txt",
    "requirements-docs.txt", "tests",
)  # fmt: skip


def build():
    """Builds both distributions into dist/. Returns their paths."""
    shutil.rmtree(DIST, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "build", "--outdir", DIST, ROOT], check=True, stdout=subprocess.DEVNULL)
    (source,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", source, wheel], check=True)
    return source, wheel


def require_contents(source, wheel):
    """Raises `SystemExit` if a distribution lacks a file or has one too many."""
    names = zipfile.ZipFile(wheel).namelist()
    roots = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    if roots != {"keras_gradtools"} or "keras_gradtools/py.typed" not in names:
        raise SystemExit(f"The wheel holds the package alone, with py.typed. Received: {sorted(roots)}.")
    with tarfile.open(source) as archive:
        there = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    missing = set(IN_SOURCE) - there
    if missing:
        raise SystemExit(f"The source distribution lacks {', '.join(sorted(missing))}.")


def unpacked(source, folder):
    """Unpacks the source distribution without the package, so that its tests find the installed one."""
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
    (here,) = folder.iterdir()
    shutil.rmtree(here / "keras_gradtools")
    return here


class Environment:
    """An empty environment with the wheel and one backend."""

    def __init__(self, backend, wheel, constraints):
        self.backend, self._wheel = backend, wheel
        self.folder = ENVIRONMENTS / f"release-{backend}"
        self._options = ["-c", constraints] if constraints else []
        shutil.rmtree(self.folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", self.folder], check=True)

    @property
    def python(self):
        return self.folder / "bin" / "python"

    def install(self, *extras, others=()):
        """Installs the wheel with extras, and other packages. Returns the seconds that it took."""
        started = time.perf_counter()
        command = [self.python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *self._options]
        subprocess.run([*command, f"{self._wheel}[{','.join(extras)}]", *others], check=True)
        return time.perf_counter() - started

    def require_one_backend(self):
        """Raises `SystemExit` if another backend was installed as well."""
        question = f"import importlib.util as u; print([b for b in {BACKENDS!r} if u.find_spec(b)])"
        found = subprocess.run([self.python, "-c", question], check=True, capture_output=True, text=True).stdout.strip()
        if found != str([self.backend]):
            raise SystemExit(f"Only {self.backend} is to be installed. Received: {found}.")

    def passes(self, name, command, folder, **environment):
        """Runs a command in a folder, without the settings of the user. Returns whether it succeeded."""
        started = time.perf_counter()
        clean = {k: v for k, v in os.environ.items() if k not in ("KERAS_BACKEND", "PYTHONPATH")}
        clean |= {"KERAS_HOME": str(self.folder / "keras"), "TF_CPP_MIN_LOG_LEVEL": "2", **environment}
        code = subprocess.run([self.python, *command], cwd=folder, env=clean, stdin=subprocess.DEVNULL).returncode
        print(
            f"{self.backend}: {name} {'failed' if code else 'passed'} in {time.perf_counter() - started:.0f} s",
            flush=True,
        )
        return code == 0


def check(backend, source, wheel, constraints, tests):
    """Checks the wheel on one backend. Returns whether everything passed."""
    environment = Environment(backend, wheel, constraints)
    folder = environment.folder / "release"
    here = unpacked(source, folder)
    seconds = environment.install(backend, README_EXTRAS)
    print(f"{backend}: installed in {seconds:.0f} s", flush=True)
    environment.require_one_backend()
    start = [
        "-c",
        f"import keras_gradtools, keras; assert keras.config.backend() == {backend!r}, keras.config.backend()",
    ]
    first = environment.passes("first start", start, folder)
    environment.install(backend, README_EXTRAS, others=["pytest"])
    shown = True
    for name, page in (("README", "README"), ("Start", "start")):
        code = ["-m", "pytest", "-q", "tests/test_readme.py", "-k", f"{page}-line", "-p", "no:cacheprovider"]
        shown &= environment.passes(name, code, here, KERAS_BACKEND=backend)
    environment.install(backend, README_EXTRAS, "test")
    tested = environment.passes("tests", ["tests/run.py", "--backend", backend, *tests], here)
    environment.require_one_backend()
    return first and shown and tested


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tests", nargs="*", default=TESTS, help="test files or folders")
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="may be repeated; default: all three")
    parser.add_argument("--constraints", type=pathlib.Path, help="a file of constraints for pip")
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    options = parser.parse_args()
    constraints = options.constraints and options.constraints.resolve()

    source, wheel = build()
    require_contents(source, wheel)
    results = {}
    for backend in options.backend or BACKENDS:
        results[backend] = check(backend, source, wheel, constraints, options.tests)
        if not options.keep:
            shutil.rmtree(ENVIRONMENTS / f"release-{backend}")
    print(f"\n{wheel.name}: " + ", ".join(f"{name} {'passed' if ok else 'FAILED'}" for name, ok in results.items()))
    return int(not all(results.values()))


if __name__ == "__main__":
    sys.exit(main())
