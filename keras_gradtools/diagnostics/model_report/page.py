"""The page of a report: one HTML file with its style and its pictures, for light and dark screens."""

import importlib.resources

from keras_gradtools.diagnostics.model_report import pictures
from keras_gradtools.display import html


def require_jinja2():
    """Returns jinja2. Raises `ImportError` if it is not installed."""
    try:
        import jinja2
    except ImportError as error:
        raise ImportError(
            'A page of `report` is made with jinja2, which is not installed: pip install "keras-gradtools[report]"'
        ) from error
    return jinja2


def page_of(report):
    """The HTML page of a `Report`. Raises `ImportError` if jinja2 is not installed."""
    jinja2 = require_jinja2()
    template = importlib.resources.files(__package__).joinpath("page.html").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    images = {s.name: _images(s.draw) for s in report.sections if s.draw is not None}
    tables = {s.name: [html.table(table) for table in s.tables] for s in report.sections}
    titles = {section.name: section.title for section in report.sections}
    return environment.from_string(template).render(report=report, images=images, tables=tables, titles=titles)


def _images(draw):
    try:
        return pictures.images(draw)
    except Exception:  # the numbers are worth more than the picture
        return {}
