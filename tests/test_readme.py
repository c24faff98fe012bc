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
DOCS = ROOT / "docs"
# The code of the guide and the recipes runs when the site is built. The blocks on the other pages are fragments, which
# need several devices or another library.
ELSEWHERE = ("guide", "recipes", "from", "distributed.md")


def pages():
    """The README and the pages whose blocks run as they stand."""
    for page in (README, *sorted(DOCS.rglob("*.md"))):
        is_elsewhere = page != README and page.relative_to(DOCS).parts[0] in ELSEWHERE
        if not is_elsewhere and list(blocks(page.read_text(encoding="utf-8"))):
            yield page


def blocks(text):
    """The code of a page, each block behind as many empty lines as keep its line numbers right.

    Each ```python block stands for itself. The cells of a notebook page, ```{code-cell}, are one block.
    """
    cells = ""
    for block in re.finditer(r"^```(python|\{code-cell\}[^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, block.start(2))
        if block[1] == "python":
            yield "\n" * line + block[2]
        else:
            cells += "\n" * (line - cells.count("\n")) + block[2]
    if cells:
        yield cells


def modules():
    """The names of the modules with examples, without the adapters of the backends that are not running."""
    adapters = "keras_gradtools.backend."
    importlib.import_module(adapters + keras.config.backend())
    for module in pkgutil.walk_packages(keras_gradtools.__path__, "keras_gradtools."):
        is_running = not module.name.startswith(adapters) or module.name in sys.modules
        if is_running and ">>> " in importlib.util.find_spec(module.name).loader.get_source(module.name):
            yield module.name


BLOCKS = [(page, block) for page in pages() for block in blocks(page.read_text(encoding="utf-8"))]


def test_examples_are_found():
    assert len(list(modules())) > 50


def test_pages_are_found():
    assert {page.stem for page, _ in BLOCKS} >= {"README", "start", "tape", "penalties", "curvature"}


@pytest.mark.parametrize(
    ("page", "block"),
    BLOCKS,
    ids=[f"{page.stem}-line-{len(block) - len(block.lstrip(chr(10))) + 1}" for page, block in BLOCKS],
)
def test_block_runs(page, block, backend, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_BACKEND", backend)  # restored afterwards, because a page shows how to set it
    exec(compile(block, str(page), "exec"), {"__name__": page.stem})


@pytest.mark.parametrize("name", list(modules()))
def test_docstring_examples_hold(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.testmod(module, optionflags=flags).failed == 0


def test_blocks_are_found_and_keep_their_lines():
    page = "a\n```python\nx = 1\n```\n```bash\nmake\n```\n```python\ny = 2\n```\n"
    assert list(blocks(page)) == ["\n\nx = 1\n", "\n\n\n\n\n\n\n\ny = 2\n"]


def test_cells_of_a_notebook_are_one_block():
    page = "```{code-cell}\nx = 1\n```\ntext\n```{code-cell} ipython3\ny = x\n```\n"
    assert list(blocks(page)) == ["\nx = 1\n\n\n\ny = x\n"]
