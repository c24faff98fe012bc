"""HTML of headings, sentences and tables. All text is escaped, and colors follow those of the page."""

import html
from typing import NamedTuple

# Text has the color of the page, and lines are half transparent, so that both show on light and on dark pages.
_STYLE = """<style>
.kg-result{--kg-line:rgba(128,128,128,.4);--kg-shade:rgba(128,128,128,.12);max-width:60em;line-height:1.4}
.kg-result table{border-collapse:collapse;margin:.4em 0}
.kg-result th,.kg-result td{border:1px solid var(--kg-line);padding:.2em .6em;text-align:left;vertical-align:top}
.kg-result thead th{background:var(--kg-shade)}
.kg-result td{font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.kg-result p{margin:.3em 0}
</style>"""


class Table(NamedTuple):
    """Rows of cells. The first cell of each row names it."""

    rows: list
    header: tuple = ()


def fragment(title, parts):
    """A part of a page: a title, and below it the `parts`, which are sentences and `Table`s."""
    inside = "".join(table(part) if isinstance(part, Table) else paragraph(part) for part in parts)
    return f'{_STYLE}<div class="kg-result"><strong>{html.escape(title)}</strong>{inside}</div>'


def paragraph(text):
    """A paragraph for each line of a text."""
    return "".join(f"<p>{html.escape(line)}</p>" for line in str(text).splitlines() if line.strip())


def table(given):
    """A table, with the first cell of each row as its heading."""
    header = "".join(f'<th scope="col">{html.escape(str(cell))}</th>' for cell in given.header)
    head = f"<thead><tr>{header}</tr></thead>" if header else ""
    return f"<table>{head}<tbody>{''.join(map(_row, given.rows))}</tbody></table>"


def _row(cells):
    first, *others = (html.escape(str(cell)) for cell in cells)
    return f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in others)}</tr>'
