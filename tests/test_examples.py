"""The examples run on the backend of this process, print the numbers that they should, and leave their pictures."""

import ast
import contextlib
import io
import pathlib
import runpy
import sys

import keras
import numpy as np
import pytest
from matplotlib import pyplot

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"
GUIDE = EXAMPLES / "advanced_autodiff.py"

# What the guide prints, in its order, under its headings.
SECTIONS = {
    "Stop recording": ["dz/dx: 4.0", "dz/dy: None"],
    "Reset/start recording from scratch": ["dz/dx: 4.0", "dz/dy: None"],
    "Stop gradient flow with precision": ["dz/dx: 4.0", "dz/dy: None"],
    "Custom gradients": ["clipped: 2.0"],
    "Custom gradients in SavedModel": ["clipped, after loading: 2.0", "the same in a functional model: 2.0"],
    "Multiple tapes": ["dys/dx0: 1.0", "dys/dx1: 0.25"],
    "Higher-order gradients": ["dy_dx: 3.0", "d2y_dx2: 6.0"],
    "Example: Input gradient regularization": ["shapes: [(5, 10), (10,)]"],
    "Jacobians: Scalar source": ["y.shape: (201,)", "dy_dx.shape: (201,)"],
    "Jacobians: Tensor source": ["y.shape: (7, 10)", "j.shape: (7, 10, 5, 10)", "g.shape: (5, 10)"],
    "Example: Hessian": ["h.shape: (5, 8, 5, 8)", "h_mat.shape: (40, 40)"],
    "The full Hessian across multiple variables": ["h_mat.shape: (102, 102)"],
    "Batch Jacobian": ["j.shape: (7, 6, 7, 5)", "j_sum.shape: (7, 6, 5)", "jb.shape: (7, 6, 5)"],
    "Batch Jacobian: where examples are not independent": ["j.shape: (7, 6, 7, 5)", "jb.shape: (7, 6, 5)"],
}
PICTURES = ("scalar_source", "hessian", "full_hessian", "slice", "patches", "batch_normalization", "side_by_side")


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    """The folder and the paragraphs that the guide's example leaves, each paragraph as its lines."""
    out, printed = tmp_path_factory.mktemp("guide") / "out", io.StringIO()
    pyplot.close("all")
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(GUIDE))["main"](["--out", str(out)])
    return out, [paragraph.splitlines() for paragraph in printed.getvalue().split("\n\n")]


def test_guide_keeps_its_order(guide):
    _, (first, *sections, last) = guide
    assert first == [f"Advanced automatic differentiation, {keras.config.backend()}"]
    assert [heading for heading, *_ in sections] == list(SECTIONS)
    assert "Pictures: guide_*.png" in " ".join(last)


@pytest.mark.parametrize("heading", SECTIONS)
def test_guide_prints_its_numbers(guide, heading):
    _, paragraphs = guide
    (printed,) = (lines for first, *lines in paragraphs if first == heading)
    assert [line for line in printed if line in SECTIONS[heading]] == SECTIONS[heading]


@pytest.mark.parametrize("heading", ["Example: Hessian", "The full Hessian across multiple variables"])
def test_guide_newton_step_lowers_the_loss(guide, heading):
    _, paragraphs = guide
    (printed,) = (lines for first, *lines in paragraphs if first == heading)
    (loss,) = (line.removeprefix("loss: ") for line in printed if line.startswith("loss: "))
    before, after = map(float, loss.split(" -> "))
    assert after < 0.5 * before


def test_guide_leaves_its_pictures_and_no_others(guide):
    out, _ = guide
    assert sorted(path.name for path in out.iterdir()) == sorted(f"guide_{name}.png" for name in PICTURES)


@pytest.mark.parametrize("name", PICTURES)
def test_guide_pictures_show_something(guide, name):
    out, _ = guide
    picture = pyplot.imread(out / f"guide_{name}.png")[..., :3]
    assert min(picture.shape[:2]) >= 600
    assert picture.std() > 0.05
    # Without the colour bar, which has colours even where nothing is drawn.
    drawn = picture[:, : int(0.8 * picture.shape[1])]
    assert np.mean(np.ptp(drawn, axis=-1) > 0.2) > 0.005


def test_guide_leaves_no_figure_open(guide):
    assert pyplot.get_fignums() == []


# How a model is distributed is the framework's own: its launchers are what that script is about.
ONE_SCRIPT = [path for path in sorted(EXAMPLES.glob("*.py")) if path.name != "distributed.py"]


@pytest.mark.parametrize("path", ONE_SCRIPT, ids=lambda path: path.name)
def test_examples_name_no_framework(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    assert "keras_gradtools" in imported
    assert not imported & {"tensorflow", "tf_keras", "jax", "torch"}


@pytest.fixture
def without_extras(monkeypatch):
    """Packages that Keras does not need itself cannot be imported."""
    for name in ("matplotlib", "rich", "sklearn", "tensorboardX"):
        for module in [name, *(loaded for loaded in sys.modules if loaded.startswith(f"{name}."))]:
            monkeypatch.setitem(sys.modules, module, None)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_explain_themselves_without_their_packages(path, without_extras, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(path), run_name="__main__")
    assert stopped.value.code == 0
    assert "usage" in capsys.readouterr().out


@pytest.mark.parametrize("path", ONE_SCRIPT, ids=lambda path: path.name)
def test_examples_say_which_package_is_missing(path, without_extras, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [path.name])
    with pytest.raises(SystemExit, match=r"matplotlib|sklearn") as stopped:
        runpy.run_path(str(path), run_name="__main__")
    assert 'pip install "keras-gradtools[examples]"' in stopped.value.code
