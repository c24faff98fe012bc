"""Everything that README.md and the docstrings show runs, on the backend of this process."""

import doctest
import importlib.util
import pathlib
import pkgutil
import re
import sys

import keras
import pytest

import keras_gradtools

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
# Pages whose blocks run as they stand.
PAGES = [README, *(ROOT / "docs" / f"{name}.md" for name in ("curvature", "second_order", "diagnostics"))]


def python_blocks(text):
    """The ```python blocks of a page, each behind as many empty lines as keep its line numbers right."""
    for block in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield "\n" * text.count("\n", 0, block.start(1)) + block[1]


def modules():
    """The names of the modules with examples, without the adapters of the backends that are not running."""
    adapters = "keras_gradtools.backend."
    importlib.import_module(adapters + keras.config.backend())
    for module in pkgutil.walk_packages(keras_gradtools.__path__, "keras_gradtools."):
        is_running = not module.name.startswith(adapters) or module.name in sys.modules
        if is_running and ">>> " in importlib.util.find_spec(module.name).loader.get_source(module.name):
            yield module.name


BLOCKS = [(page, block) for page in PAGES for block in python_blocks(page.read_text(encoding="utf-8"))]


def test_examples_are_found():
    assert len(list(modules())) > 50


def test_every_page_has_blocks():
    assert {page for page, _ in BLOCKS} == set(PAGES)


@pytest.mark.parametrize(
    ("page", "block"),
    BLOCKS,
    ids=[f"{page.stem}-line-{len(block) - len(block.lstrip(chr(10))) + 1}" for page, block in BLOCKS],
)
def test_block_runs(page, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(page), "exec"), {"__name__": page.stem})


@pytest.mark.parametrize("name", list(modules()))
def test_docstring_examples_hold(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.testmod(module, optionflags=flags).failed == 0


def test_blocks_are_found_and_keep_their_lines():
    page = "a\n```python\nx = 1\n```\n```bash\nmake\n```\n```python\ny = 2\n```\n"
    assert list(python_blocks(page)) == ["\n\nx = 1\n", "\n\n\n\n\n\n\n\ny = 2\n"]
