"""Makes a class of results show itself: a short `repr`, and a table in notebooks."""

import dataclasses

from keras_gradtools.display import html
from keras_gradtools.display.descriptions import short


def displayed(cls):
    """Decorates a dataclass or a named tuple. Arrays in its `repr` are described, not printed.

    A notebook shows a table of the fields. A class that shows something else has a method `_parts`, which returns a
    list of sentences and `html.Table`s.
    """
    cls.__repr__ = _short_repr
    cls._repr_html_ = _as_html
    return cls


def field_table(result):
    """An `html.Table` with a row for each field."""
    return html.Table([(name, short(getattr(result, name))) for name in _fields(result)])


def _fields(result):
    return getattr(result, "_fields", None) or [field.name for field in dataclasses.fields(result)]


def _short_repr(self):
    return f"{type(self).__name__}({', '.join(f'{name}={short(getattr(self, name))}' for name in _fields(self))})"


def _as_html(self):
    parts = self._parts() if hasattr(self, "_parts") else [field_table(self)]
    return html.fragment(type(self).__name__, parts)
