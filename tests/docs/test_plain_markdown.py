"""Pages of the guide as downloadable notebooks: no tabs and no links to files that are not there."""

import importlib.util
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
GUIDE = sorted(path for path in (ROOT / "docs" / "guide").rglob("*.md") if path.stem != "index")


@pytest.fixture(scope="module")
def plain_markdown():
    spec = importlib.util.spec_from_file_location("plain_markdown", ROOT / "docs" / "_ext" / "plain_markdown.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.plain_markdown


PAGE = """# Title

## Section

See [the other
page](other.md#part) and [the site](https://example.org).

````{tab-set}
:sync-group: backend

```{tab-item} JAX
:sync: jax

Text.

~~~python
a = [f](x)
~~~
```
```{tab-item} torch
:sync: torch
More.
```
````
After.
"""


def test_tabs_stand_one_below_the_other(plain_markdown):
    assert plain_markdown(PAGE.replace("~~~", "`````")) == (
        "# Title\n\n## Section\n\nSee the other\npage and [the site](https://example.org).\n\n**JAX**\n\nText.\n\n"
        "`````python\na = [f](x)\n`````\n\n**torch**\n\nMore.\n\nAfter."
    )


def test_fences_of_colons(plain_markdown):
    text = plain_markdown("::::{tab-set}\n\n:::{tab-item} JAX\n:sync: jax\n\nText.\n:::\n::::\n\nAfter.\n")
    assert text == "**JAX**\n\nText.\n\nAfter."


@pytest.mark.parametrize("page", GUIDE, ids=lambda page: f"{page.parent.stem}-{page.stem}")
def test_pages_of_the_guide(plain_markdown, page):
    source = page.read_text("utf-8")
    text = plain_markdown(source)
    assert "{tab-" not in text and ":sync" not in text and ".md)" not in text
    # Nothing else is lost: neither a line of code nor a heading.
    code = re.findall(r"^```python\n(.*?)^```$", source, re.MULTILINE | re.DOTALL)
    assert code and all(block in text for block in code)
    assert text.count("\n#") == source.count("\n#") and text.count("\n**") >= source.count("{tab-item}") > 0
