"""The sources of the site agree with the package. The site itself is built by `make docs`."""

import inspect
import json
import pathlib
import re
import types

import keras_gradtools as kg

DOCS = pathlib.Path(__file__).resolve().parent.parent / "docs"


def listed_names():
    """The names in the ```{names} blocks of all pages, with repetitions."""
    for page in sorted((DOCS / "reference").glob("*.md")):
        for module, names in re.findall(r"^```\{names\} *([\w.]*)\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S):
            yield from (f"{module}.{name}" if module else name for name in names.split())


def names_of(module):
    """The names in `__all__`, or the functions that the module itself defines."""
    if hasattr(module, "__all__"):
        return module.__all__
    return [
        name
        for name, found in vars(module).items()
        if inspect.isfunction(found) and found.__module__ == module.__name__ and not name.startswith("_")
    ]


def public_names():
    for name in kg.__all__:
        found = getattr(kg, name)
        if isinstance(found, types.ModuleType):
            yield from (f"{name}.{inner}" for inner in names_of(found))
        else:
            yield name


def test_every_public_name_is_in_the_reference_once():
    assert sorted(listed_names()) == sorted(public_names())


def test_the_version_switcher_lists_this_version():
    versions = json.loads((DOCS / "versions.json").read_text("utf-8"))
    assert kg.__version__ in [entry["version"] for entry in versions]


def test_links_of_the_readme_lead_to_files():
    text = (DOCS.parent / "README.md").read_text("utf-8")
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    assert len(targets) > 10
    assert [target for target in targets if not (DOCS.parent / target).exists()] == []
