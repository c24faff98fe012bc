"""Runs the tests of what knows internals on the oldest, the newest and the next Keras and frameworks.

Each row of the table is installed into a throw-away environment of its own under .venvs/. The oldest
versions are the lower bounds of pyproject.toml; the newest are whatever pip finds; the next Keras is its nightly.
"""

import argparse
import pathlib
import shutil
import subprocess
import sys
import typing

ROOT = pathlib.Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / ".venvs"


# A bound that names a pre-release allows pre-releases of this one package, and leaves all others stable.
NIGHTLY = "keras-nightly>=3.16.0.dev0"


class Row(typing.NamedTuple):
    """One environment: a backend, what pip is to install for it, and what then takes the place of `keras`."""

    backend: str
    age: str
    packages: tuple
    keras: str | None = None

    @property
    def name(self):
        return f"{self.backend}-{self.age}"


ROWS = (
    Row("tensorflow", "oldest", ("keras==3.10.0", "numpy==1.26.4", "tensorflow==2.18.0")),
    Row("tensorflow", "newest", ("keras", "numpy", "tensorflow")),
    Row("jax", "oldest", ("keras==3.10.0", "jax==0.8.2", "jaxlib==0.8.2")),
    Row("jax", "newest", ("keras", "numpy", "jax")),
    # The newest torch is that of the development environment. Others may come with gigabytes of CUDA, as the oldest
    # does.
    Row("torch", "oldest", ("keras==3.10.0", "torch==2.12.0")),
    Row("torch", "newest", ("keras", "numpy", "torch==2.13.0")),
    Row("tensorflow", "nightly", ("numpy", "tensorflow"), NIGHTLY),
    Row("jax", "nightly", ("numpy", "jax"), NIGHTLY),
    Row("torch", "nightly", ("numpy", "torch==2.13.0"), NIGHTLY),
)


def tests_of_internals():
    """The tests of what knows the insides of Keras or of a framework."""
    patterns = (
        "tape/test_*.py",
        "test_blocks.py",
        "keras_state/test_*.py",
        "backend/**/test_*.py",
        "keras_internals/test_*.py",
        # Layers' calls, frozen statistics, derivatives as layers.
        "diagnostics/test_dead_units.py",
        "diagnostics/test_layer_derivatives.py",
        "transforms/test_models.py",
        "transforms/test_compiled_models.py",
        "test_layer_contract.py",
        "gradient_control/test_*.py",
        "transforms/test_derivative_layers.py",
        "transforms/test_masks.py",
        "input_gradients/test_input_gradient_penalty_layer.py",
        # What `fit` wraps and what wraps `fit`.
        "input_gradients/test_input_gradient_[mr]*.py",
        "attacks/test_adversarial_training.py",
        "training/test_failed_steps.py",
        "training/test_compiled_training.py",
        "second_order/test_second_order_model.py",
        "second_order/test_residuals.py",
        "test_double_precision.py",
        "diagnostics/test_gradient_monitor.py",
        "**/test_distributed*.py",
    )
    return sorted(path for pattern in patterns for path in (ROOT / "tests").glob(pattern))


def run(row, paths):
    """Installs one row and runs the tests there; returns the versions found and what came of it."""
    folder = ENVIRONMENTS / row.name
    python = folder / "bin" / "python"
    print(f"\n{row.name}: installing {' '.join(row.packages)}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    install = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    steps = [[*install, "-e", f"{ROOT}[{row.backend},test]", *row.packages]]
    if row.keras:
        # Both packages are the one folder `keras`: the stable one, which ours depends on, has to be gone before.
        steps += [[python, "-m", "pip", "uninstall", "-qq", "-y", "keras"], [*install, row.keras]]
    if any(subprocess.run(step).returncode for step in steps):
        return "", "could not be installed"
    listing = subprocess.run([python, "-m", "pip", "freeze"], check=True, capture_output=True, text=True).stdout
    shown = [
        line for line in listing.splitlines() if line.split("==")[0] in ("keras", "keras-nightly", "numpy", row.backend)
    ]
    tests = subprocess.run([python, ROOT / "tests" / "run.py", "--backend", row.backend, *paths])
    return " ".join(shown), "failed" if tests.returncode else "passed"


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", help="test files or folders; those of what knows internals when left out")
    parser.add_argument("--backend", choices=sorted({row.backend for row in ROWS}))
    parser.add_argument("--age", choices=sorted({row.age for row in ROWS}))
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
