"""What the index is told about the package, and that its files agree on it."""

import importlib.util
import pathlib
import re
import sys
import tomllib
import types

import pytest

import keras_gradtools as kg

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
HOME = "https://example.org/owner/keras_gradtools"


@pytest.fixture(scope="module")
def metadata():
    """The hook of the build, without hatchling, which only builds have."""
    stub = types.ModuleType("hatchling.metadata.plugin.interface")
    stub.MetadataHookInterface = object
    spec = importlib.util.spec_from_file_location("release_metadata", ROOT / "release" / "metadata.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, stub.__name__, stub)
        spec.loader.exec_module(module)
    return module


PAGE = """See [the page](docs/a.md), [a part](docs/a.md#part), [there](#here) and [Keras](https://keras.io).
![a picture](docs/a.png)
```python
x = y[0](z)
```
[after](b.md)
"""


def test_links_are_absolute_with_a_home(metadata):
    text = metadata.rendered(PAGE, HOME, "v1.2.3")
    at = f"{HOME}/blob/v1.2.3"
    assert f"[the page]({at}/docs/a.md), [a part]({at}/docs/a.md#part), [there](#here) and [Keras](https:" in text
    assert f"![a picture]({HOME}/raw/v1.2.3/docs/a.png)" in text and f"[after]({at}/b.md)" in text
    assert "x = y[0](z)" in text
    assert set(metadata.urls(HOME)) == {"Homepage", "Documentation", "Changelog", "Source", "Issues"}


def test_links_are_their_text_without_a_home(metadata):
    text = metadata.rendered(PAGE, "", "v1.2.3")
    assert "See the page, a part, [there](#here) and [Keras](https://keras.io)." in text
    assert "a.png" not in text and "x = y[0](z)" in text and metadata.urls("") == {}


def test_the_readme_has_no_relative_link_left(metadata):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for home in ("", HOME):
        targets = re.findall(r"\]\(([^)]+)\)", "".join(metadata.CODE.split(metadata.rendered(readme, home, "v1"))[::2]))
        assert all(target.startswith(("http", "#")) for target in targets), targets


def test_the_files_agree_on_the_version():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    (version,) = re.findall(r"^version: (.*)$", citation, re.MULTILINE)
    (date,) = re.findall(r'^date-released: "(.*)"$', citation, re.MULTILINE)
    assert version == kg.__version__
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", changes, re.MULTILINE)[:2] == ["[Unreleased]", f"[{version}] - {date}"]


def test_every_extra_that_is_named_exists():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    files = [*pages, *(path for folder in ("keras_gradtools", "examples") for path in (ROOT / folder).rglob("*.py"))]
    named = {
        extra
        for path in files
        for extras in re.findall(r"keras-gradtools\[([\w,]+)\]", path.read_text(encoding="utf-8"))
        for extra in extras.split(",")
    }
    assert {"plots", "solvers", "tensorboard"} <= named <= set(PROJECT["optional-dependencies"])
