"""The pages of the recipes name scripts and parts of them that exist."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = sorted(path for path in (ROOT / "docs" / "recipes").glob("*.md") if path.stem != "index")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_shows_parts_of_its_script(page):
    text = page.read_text("utf-8")
    parts = re.findall(r"literalinclude} (\S+)\n:language: python\n:pyobject: (\w+)", text)
    assert parts and f"python examples/{page.stem}.py" in text
    for script, name in parts:
        tree = ast.parse((page.parent / script).read_text("utf-8"))
        assert name in {node.name for node in tree.body if hasattr(node, "name")}
    (picture,) = re.findall(r"^!\[.+\]\((\S+)\)$", text, re.MULTILINE)
    assert (page.parent / picture).exists()


def test_the_index_lists_every_page():
    text = (ROOT / "docs" / "recipes" / "index.md").read_text("utf-8")
    assert set(re.findall(r"\]\((\w+)\.md\)", text)) == {page.stem for page in PAGES}
    assert re.findall(r"^\w+$", text, re.MULTILINE) == re.findall(r"\]\((\w+)\.md\)", text)
