"""What the frameworks themselves get wrong, without this package: `python -m tests.atlas.upstream`.

Each report is the smallest input that shows it, in code of the framework and Keras alone. One process for each
framework tries its reports, and docs/upstream.md is written from what came of them; one that is mended says so.
"""

import importlib
import json
import os
import pathlib
import subprocess
import sys
import typing

import numpy as np

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "upstream.md"
FRAMEWORKS = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
HEAD = """# Wrong derivatives in the frameworks

TensorFlow, JAX, PyTorch and Keras themselves silently give wrong derivatives in some cases. Each row shows such a case
with a small input, computed without this package. In the tapes and transforms of this package, `keras.ops` and Keras'
layers give the right derivatives, unless [limits.md](limits.md) says otherwise. An operation of the framework that you
call directly may keep the wrong one. `python -m tests.atlas.upstream` computes all rows again and writes this page.
"""


class Report(typing.NamedTuple):
    """One defect: what is differentiated where, how the framework does it, and what is right."""

    what: str
    compute: typing.Callable[[], typing.Any]
    expected: float


def differences(fun, order, h=0.02):
    """A derivative at 0 of a function in NumPy, by central differences in double precision."""
    nodes = np.arange(-4, 5)
    unit = np.eye(9)[order] * np.prod(np.arange(1, order + 1))
    weights = np.linalg.solve(np.vander(nodes.astype(float), increasing=True).T, unit)
    return float(sum(w * fun(h * n) for w, n in zip(weights, nodes, strict=True)) / h**order)


def line(t):
    """A row of three numbers on a line."""
    return np.array([1.0, 2.0, 4.0]) + t * np.array([1.0, -1.0, 0.5])


def cube_of_normalized(t, epsilon):
    """The sum of cubes of a normalized row on a line."""
    x = line(t)
    return np.sum(((x - x.mean()) / np.sqrt(x.var() + epsilon)) ** 3)


def tried(framework):
    """The reports of one framework with what they give here, and the versions."""
    import keras

    module = importlib.import_module(f"tests.atlas.upstream_{framework}")
    found = []
    for report in module.REPORTS:
        given = report.compute()
        got = np.nan if given is None else float(np.asarray(given))
        is_right = bool(abs(got - report.expected) <= 1e-3 * abs(report.expected) + 1e-6)
        found.append((report.what, "None" if given is None else f"{got:.6g}", f"{report.expected:.6g}", is_right))
    return [f"{FRAMEWORKS[framework]} {module.VERSION}, Keras {keras.__version__}", found]


def main():
    """The command line: without an argument, all frameworks and the page."""
    if len(sys.argv) > 1:
        print(json.dumps(tried(sys.argv[1])))
        return
    lines = [HEAD]
    for framework in FRAMEWORKS:
        run = subprocess.run(
            [sys.executable, "-m", "tests.atlas.upstream", framework],
            env={**os.environ, "KERAS_BACKEND": framework},
            stdout=subprocess.PIPE,
            check=True,
        )
        versions, found = json.loads(run.stdout.splitlines()[-1])
        lines += [f"## {versions}", "", "| | gives | right is |", "| --- | --- | --- |"]
        lines += [f"| {what}{' (mended by now)' if ok else ''} | {got} | {right} |" for what, got, right, ok in found]
        lines.append("")
    PAGE.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
