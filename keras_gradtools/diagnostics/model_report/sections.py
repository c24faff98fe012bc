"""A section of a report: what one check measured."""

import dataclasses
from collections.abc import Callable

DONE, NOT_RUN, FAILED = "done", "not run", "failed"


@dataclasses.dataclass
class Section:
    """What one check measured.

    Attributes:
        name: The name of the check, as in the option `checks` of `report`.
        title: The title of the section.
        about: What the check does, in a sentence or two.
        status: `"done"`, `"not run"` or `"failed"`.
        remark: Why it was not run or failed.
        sentences: What was found, in words.
        tables: `display.html.Table`s.
        measured: The numbers that the rules of `findings` read, by name.
        draw: Draws the picture on a matplotlib Figure. None for no picture.
        caption: What the picture shows.
        seconds: How long the check took.
    """

    name: str
    title: str
    about: str
    status: str = DONE
    remark: str = ""
    sentences: list = dataclasses.field(default_factory=list)
    tables: list = dataclasses.field(default_factory=list)
    measured: dict = dataclasses.field(default_factory=dict)
    draw: Callable | None = None
    caption: str = ""
    seconds: float = 0.0
