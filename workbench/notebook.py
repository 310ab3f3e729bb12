"""HTML that a notebook shows for an object: tables that wrap at words and fit the page of a notebook.

The styles are inline and inherit the colours of the page, light or dark.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["WIDTH", "details", "paragraph", "table"]

WIDTH = 848
"""Pixels of a notebook's output in JupyterLab on a screen of 1280 pixels: nothing is wider."""
SHORT = 24
"""Texts of up to so many characters stay on one line."""
_CELL = "padding:2px 14px 2px 0;vertical-align:top;text-align:{align};white-space:{space};overflow-wrap:break-word"
_LINE = "border-bottom:1px solid rgba(128,128,128,.3)"


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int] = (), note: str = "") -> str:
    """A table; texts are escaped.

    Args:
        titles: of the columns.
        rows: texts of the cells.
        numeric: columns that are aligned to the right and not wrapped.
        note: a sentence above.
    """

    def line(texts: Sequence[str], tag: str) -> str:
        cells = []
        for i, text in enumerate(texts):
            is_number = i in numeric
            space = "nowrap" if tag == "td" and (is_number or len(text) <= SHORT) else "normal"
            style = _CELL.format(align="right" if is_number else "left", space=space)
            weight = ";font-weight:500" if tag == "th" else ""
            cells.append(f'<{tag} style="{style}{weight};{_LINE};background:none">{escape(text)}</{tag}>')
        return f'<tr style="background:none">{"".join(cells)}</tr>'

    head, body = line(titles, "th"), "".join(line(row, "td") for row in rows)
    above = paragraph(note) if note else ""
    return (
        f'{above}<div style="max-width:{WIDTH}px;overflow-x:auto"><table style="border-collapse:collapse;margin:4px 0;'
        f'font-size:13px"><thead>{head}</thead><tbody>{body}</tbody></table></div>'
    )


def paragraph(text: str, *, strong: bool = False, faint: bool = False) -> str:
    """A paragraph; the text is escaped."""
    style = ("font-weight:600;font-size:15px;" if strong else "") + ("opacity:.75;" if faint else "")
    return f'<p style="max-width:{WIDTH}px;margin:4px 0;{style}">{escape(text)}</p>'


def details(title: str, lines: Iterable[str]) -> str:
    """Sentences that the reader unfolds; empty without any."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    if not items:
        return ""
    return f'<details style="max-width:{WIDTH}px"><summary>{escape(title)}</summary><ul>{items}</ul></details>'
