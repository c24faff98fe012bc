"""The reference of the site lists every public name once. The site itself is built by `make docs`."""

import inspect
import pathlib
import re
import types

import keras_gradtools as kg

REFERENCE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "reference"


def listed_names():
    """The names in the ```{names} blocks of all pages, with repetitions."""
    for page in sorted(REFERENCE.glob("*.md")):
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
