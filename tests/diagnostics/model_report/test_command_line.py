"""The command and its page: what it writes, and one clear line for what it cannot use."""

import dataclasses
import html.parser
import pathlib
import re
import sys

import keras
import numpy as np
import pytest
from keras import layers

import keras_gradtools as kg
from keras_gradtools.diagnostics.model_report.command_line import main
from tests.diagnostics.model_report import models
from tests.diagnostics.model_report.models import X, Y

VOID = {"meta", "img", "source", "br", "hr", "link", "input"}


@pytest.fixture
def folder(tmp_path):
    models.dead().save(tmp_path / "model.keras")
    np.savez(tmp_path / "data.npz", x=X, y=Y)
    return tmp_path


def run(folder, *options, model="model.keras", data="data.npz"):
    output = folder / "report.html"
    return main(["report", str(folder / model), str(folder / data), "-o", str(output), *options]), output


class Page(html.parser.HTMLParser):
    """The text, the tags with their attributes, and whether every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.fast_on("torch")
def test_a_page(folder, capsys):
    code, output = run(folder, "--checks", "values", "gradients", "jacobian")
    out = capsys.readouterr()
    assert code == 0 and "Most units of a layer are dead." in out.out and f"Wrote {output}" in out.out
    page = Page(output.read_text("utf-8"))
    # The findings come before the sections.
    assert page.text.index("Most units of a layer are dead.") < page.text.index("Computes the gradient of the loss")
    assert "prefers-color-scheme: dark" in page.text
    links = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "srcset", "href")]
    assert links and all(link.startswith(("data:image/svg+xml;base64,", "#")) for link in links)
    targets = {attrs.get("id") for _, attrs in page.tags}
    assert all(link[1:] in targets for link in links if link.startswith("#"))
    pictures = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(pictures) == 2 and all(attrs["alt"] for attrs in pictures)
    assert not re.search(r"https?://(?!www\.w3\.org)", re.sub(r"base64,[^\"]*", "", output.read_text("utf-8")))
    assert "script" not in {tag for tag, _ in page.tags}


def test_names_are_escaped(tmp_path):
    found = kg.diagnostics.report(models.good(), (X, Y), checks=["gradients"], verbose=0)
    # Keras on TensorFlow cannot call a model of this name.
    found = dataclasses.replace(found, model="<b>x")
    found.save(tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text("utf-8"))
    assert "<b>x" in page.text and "b" not in {tag for tag, _ in page.tags}


def test_without_matplotlib(tmp_path, monkeypatch):
    found = kg.diagnostics.report(models.good(), (X, Y), checks=["gradients"], verbose=0)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found.save(tmp_path / "r.html")
    assert "matplotlib is not installed" in (tmp_path / "r.html").read_text("utf-8")


def test_a_picture_that_cannot_be_drawn(tmp_path):
    def fails(figure):
        raise ValueError("limits")

    found = kg.diagnostics.report(models.good(), (X, Y), checks=["gradients"], verbose=0)
    found.sections[0].draw = fails
    found.save(tmp_path / "r.html")
    assert "cannot draw these numbers" in (tmp_path / "r.html").read_text("utf-8")


def test_without_jinja2(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert run(folder)[0] == 2
    assert 'pip install "keras-gradtools[report]"' in capsys.readouterr().err


@pytest.mark.parametrize("path", [None, 3])
def test_save_refuses(path):
    found = kg.diagnostics.report(models.good(), (X, Y), checks=["values"], verbose=0)
    with pytest.raises(ValueError, match="Report.save expects a path as `path`"):
        found.save(path)


def test_several_inputs_and_weights_by_name(tmp_path):
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    model = keras.Model({"a": a, "b": b}, layers.Dense(1)(layers.Concatenate()([a, b])))
    model.compile("sgd", "mse")
    model.save(tmp_path / "model.keras")
    np.savez(tmp_path / "data.npz", a=X, b=X, y=X[:, :1], sample_weight=np.ones(12))
    assert run(tmp_path, "--checks", "values", "--quiet")[0] == 0


def test_inputs_alone(folder, capsys):
    np.savez(folder / "data.npz", x=X)
    assert run(folder, "--checks", "values", "gradients", "--quiet")[0] == 0
    assert "no labels" in capsys.readouterr().out


def test_custom_objects_of_a_module(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_layers_of_the_report.py").write_text(
        "import keras\n@keras.saving.register_keras_serializable('mine')\n"
        "class Doubled(keras.layers.Layer):\n    def call(self, x):\n        return 2 * x\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    import my_layers_of_the_report

    models.compiled("m", my_layers_of_the_report.Doubled(), layers.Dense(2)).save("model.keras")
    np.savez("data.npz", x=X, y=Y)
    registered = keras.saving.get_custom_objects()
    kept = registered.pop("mine>Doubled")
    monkeypatch.delitem(sys.modules, "my_layers_of_the_report")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(tmp_path)])
    assert run(tmp_path)[0] == 2
    assert "custom objects: name the module that registers them with --import" in capsys.readouterr().err
    assert run(tmp_path, "--import", "my_layers_of_the_report", "--checks", "values", "-q")[0] == 0
    registered["mine>Doubled"] = kept


def saved(folder, make):
    make(folder)
    return {}


def nan_weights(folder):
    model = models.good()
    model.set_weights([w * np.nan for w in model.get_weights()])
    model.save(folder / "model.keras")


def with_lambda(folder):
    models.compiled("m", layers.Lambda(lambda x: x), layers.Dense(2)).save(folder / "model.keras")


REFUSED = {
    "no model": (lambda f: (f / "model.keras").unlink(), "MODEL must be a .keras file. Received: .*not a file"),
    "no data": (lambda f: (f / "data.npz").unlink(), "DATA must be a .npz file. Received: .*not a file"),
    "not a zip": (lambda f: (f / "model.keras").write_text("abc"), "MODEL must be a .keras file, which can be loaded"),
    "not an npz": (lambda f: (f / "data.npz").write_text("abc"), "is not an .npz file of numbers"),
    "objects": (lambda f: np.savez(f / "data.npz", x=np.array([{}] * 3)), "is not an .npz file of numbers"),
    "labels alone": (lambda f: np.savez(f / "data.npz", y=Y), r"must have the inputs as `x`.*Received: the arrays"),
    "shapes": (lambda f: np.savez(f / "data.npz", x=X[:, :3], y=Y), r"of the shapes .*Received: `x` of the shapes"),
    "lengths": (lambda f: np.savez(f / "data.npz", x=X, y=Y[:5]), "one number of examples"),
    "NaN": (lambda f: np.savez(f / "data.npz", x=X * np.nan, y=Y), "NaN or infinity in `x`"),
    "NaN in weights": (nan_weights, r"NaN or infinity in \S*out/kernel"),
    "code": (with_lambda, "contains code, such as a Lambda layer, which this command does not run"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_one_line_and_exit_code_2(folder, capsys, name):
    prepare, message = REFUSED[name]
    prepare(folder)
    code, output = run(folder, "--quiet")
    err = capsys.readouterr().err
    assert code == 2 and not output.exists()
    assert err.startswith("keras-gradtools: ") and err.count("\n") == 1 and re.search(message, err), err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--loss", "abc"], "expects a `loss`"),
        (["--examples", "0"], "as `examples`"),
        (["--clip", "1", "0"], "as `clip`"),
        (["-o", "/no/such/folder/r.html"], "cannot be written"),
        (["--import", "no_such_module_here"], "--import no_such_module_here failed"),
    ],
)
def test_options_are_refused(folder, capsys, options, message):
    assert run(folder, *options)[0] == 2
    assert message in capsys.readouterr().err


def test_an_h5_file_is_refused(folder, capsys):
    models.good().save(folder / "model.h5")
    assert run(folder, model="model.h5")[0] == 2
    assert "without running code" in capsys.readouterr().err


def test_no_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2 and "COMMAND" in capsys.readouterr().err


def test_the_installed_command():
    import tomllib

    project = tomllib.loads((pathlib.Path(kg.__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["scripts"] == {"keras-gradtools": "keras_gradtools.__main__:main"}
    from keras_gradtools.__main__ import main as entry

    assert entry is main
