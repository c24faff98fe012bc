"""The guide's notebooks and the lines of plain TensorFlow, JAX or torch beside them run, and give what they say.

A statement with `# -> value` behind it or on the next line is compared with that value, and one with `# -> raises Name`
must raise an error of that class.
"""

import ast
import linecache
import math
import pathlib
import re

import keras
import numpy as np
import pytest
from matplotlib import pyplot

GUIDE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "guide"
PAGES = sorted(path.stem for path in (GUIDE / "en").glob("*.md") if path.stem != "index")
FRAMEWORKS = ["tensorflow", "jax", "torch"]


def cells(text):
    """The code of a notebook's cells, without their options."""
    found = re.findall(r"^```\{code-cell\} ipython3\n(?::\w+:[^\n]*\n)*(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [code.lstrip("\n") for code in found]


def tab_sets(text):
    """For each set of tabs, a dict from its frameworks to their code."""
    for tabs in re.findall(r"^`````\{tab-set\}\n(.*?)^`````$", text, re.MULTILINE | re.DOTALL):
        items = re.findall(r"^````\{tab-item\} [^\n]+\n:sync: (\w+)\n(.*?)^````$", tabs, re.MULTILINE | re.DOTALL)
        yield {name: "\n".join(re.findall(r"^```python\n(.*?)^```$", item, re.M | re.S)) for name, item in items}


def text_of(page, language="en"):
    return (GUIDE / language / f"{page}.md").read_text(encoding="utf-8")


def run(blocks, name):
    """Runs blocks of code one after the other, as one program, and checks the values that they name."""
    namespace = {"__name__": "__main__"}
    for number, code in enumerate(blocks):
        file = f"<{name}, block {number}>"
        lines = code.splitlines()
        # Compilers read the source of functions.
        linecache.cache[file] = len(code), None, code.splitlines(True), file
        for statement in ast.parse(code).body:
            last, following = [*lines, ""][statement.end_lineno - 1 :][:2]
            expected = last.partition("  # -> ")[2] or following.removeprefix("# -> ") * following.startswith("# -> ")
            where = f"{file}: {lines[statement.lineno - 1]}"
            if expected.startswith("raises "):
                with pytest.raises(Exception) as raised:
                    exec(compile(ast.Module([statement], []), file, "exec"), namespace)
                assert raised.type.__name__ == expected.removeprefix("raises "), where
            elif expected:
                assert isinstance(statement, ast.Expr), f"not an expression: {where}"
                value = eval(compile(ast.Expression(statement.value), file, "eval"), namespace)
                assert_same(value, eval(expected, {"nan": math.nan, "inf": math.inf}), where)
            else:
                exec(compile(ast.Module([statement], []), file, "exec"), namespace)


def assert_same(actual, expected, where):
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key in expected:
            assert_same(actual[key], expected[key], where)
    elif isinstance(expected, (tuple, list)):
        assert len(actual) == len(expected), where
        for a, e in zip(actual, expected, strict=True):
            assert_same(a, e, where)
    elif expected is None or isinstance(expected, (bool, str)):
        assert (bool(actual) if isinstance(expected, bool) else actual) == expected, f"{actual!r}: {where}"
    else:
        actual = np.asarray(keras.ops.convert_to_numpy(actual), "float64")
        assert actual.size == 1, where
        assert actual.item() == pytest.approx(expected, rel=1e-3, abs=1e-6, nan_ok=True), where


@pytest.fixture(autouse=True)
def in_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    pyplot.close("all")


@pytest.mark.parametrize("page", PAGES)
def test_cells_give_what_they_say(page):
    blocks = cells(text_of(page))
    assert "".join(blocks).count("# -> ") >= 3
    run(blocks, page)


TABS = [(page, number) for page in PAGES for number, _ in enumerate(tab_sets(text_of(page)))]


@pytest.mark.parametrize(("page", "number"), TABS)
def test_tabs_give_what_they_say(page, number, backend):
    tabs = list(tab_sets(text_of(page)))[number]
    assert list(tabs) == FRAMEWORKS
    assert all("# -> " in code for code in tabs.values())
    run([tabs[backend]], f"{page}, tabs {number}")


@pytest.mark.parametrize("page", [*PAGES, "index"])
def test_japanese_pages_have_the_same_code(page):
    english, japanese = text_of(page), text_of(page, "ja")
    assert cells(japanese) == cells(english)
    assert list(tab_sets(japanese)) == list(tab_sets(english))
    # The same headings, pictures and links, so that no part is missing.
    for pattern in (r"^#+ ", r"\]\((?!http)[^)]*\)", r"^\|", r"\$\$"):
        assert len(re.findall(pattern, japanese, re.M)) == len(re.findall(pattern, english, re.M)), pattern


def test_both_languages_have_the_same_pages():
    assert sorted(path.stem for path in (GUIDE / "ja").glob("*.md")) == sorted([*PAGES, "index"])


def test_every_page_is_in_the_index():
    for language in ("en", "ja"):
        assert set(PAGES) <= set(re.findall(r"^(\w+)$", text_of("index", language), re.MULTILINE))


def test_a_wrong_value_is_found():
    run(["x = 2.0\n", "x * x  # -> 4.0\nint('a')  # -> raises ValueError\n"], "right")
    for wrong in ("2.0 * 2.0  # -> 4.1", "[1.0]  # -> [1.0, 2.0]", "1.0  # -> nan", "1 < 2  # -> False"):
        with pytest.raises(AssertionError):
            run([wrong], "wrong")
