"""Figures as files for a paper: PNG, SVG, PDF at the width of a column, a page or a slide; and which tables of a panel
are exported. Tables are written by :mod:`workbench.paper`.

Images are drawn by Chromium or Chrome through Kaleido; tables need neither.
"""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import plotly.graph_objects as go
import polars as pl

from workbench.config import ConfigError
from workbench.dashboards.panel import Block, Figure, Grid, Text
from workbench.dashboards.style import TEMPLATE
from workbench.paper import PRINTED, PaperTable, checked_path, write_provenance

IMAGES = ("pdf", "svg", "png")
"""Endings of images."""
Width: TypeAlias = Literal["column", "page", "slide"]


class ImageSize(NamedTuple):
    """The size of an image on paper or on a screen."""

    inches: float
    points: float
    """Of the type."""


SIZES: dict[Width, ImageSize] = {
    "column": ImageSize(3.25, 8),
    "page": ImageSize(6.75, 8),
    "slide": ImageSize(10.0, 14),
}
"""Widths of an image. Journals and conferences have columns of 3.2 to 3.5 inches and ask for type of 8 points or more;
slides are 10 inches wide at 4:3, with larger type (our choice)."""
PIXELS = 96
"""Per inch: CSS, and so SVG and PDF."""
DOTS = 300
"""Of a PNG per inch."""


def export_figure(
    figure: go.Figure, path: str | Path, provenance: str, width: Width = "page", *, stamped: bool = False
) -> Path:
    """``figure`` as .pdf, .svg or .png, dark on white, with type of the same size in every figure.

    Args:
        figure: the figure.
        path: of the file; its folder is created if missing.
        provenance: see :func:`workbench.paper.provenance_line`; written beside the image.
        width: ``column`` (3.25 inches, 8 point type), ``page`` (6.75 inches, 8 point type) or ``slide`` (10 inches, 14
            point type).
        stamped: whether the provenance is also printed below the figure.

    Raises:
        ConfigError: for another ending or width, or when there is no browser to draw it.
    """
    path = checked_path(path, IMAGES)
    if width not in SIZES:
        raise ConfigError.at("width", got=width, expected=" or ".join(SIZES))
    printed = _at_size(figure, SIZES[width])
    if stamped:
        _stamp(printed, provenance)
    try:
        printed.write_image(path, scale=DOTS / PIXELS if path.suffix == ".png" else 1)
    except Exception as error:  # Kaleido and its browser fail in many ways, each with a page of advice
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        raise ConfigError.at(
            "path",
            got=f"{path.name}, and no image could be drawn ({reason})",
            expected="Chromium or Chrome, and Kaleido",
            do="Install a browser (or name it in BROWSER_PATH); tables and the HTML report need none.",
        ) from None
    write_provenance(path, provenance)
    return path


def _at_size(figure: go.Figure, size: ImageSize) -> go.Figure:
    """A copy for paper: type of one size; lines, markers and heights shrink or grow as the type does."""
    type_size = size.points / 72 * PIXELS
    factor = type_size / TEMPLATE.layout.font.size
    plain = _scaled(figure.to_plotly_json(), factor, type_size)
    printed = go.Figure(plain)
    printed.update_layout(
        font={"color": "#222", "size": type_size},
        legend={"font": {"size": type_size}, "title": {"font": {"size": type_size}}},
        paper_bgcolor="white",
        plot_bgcolor="white",
        width=size.inches * PIXELS,
        height=round((figure.layout.height or 400) * factor),
        autosize=False,
        margin={side: margin * factor for side, margin in _margins(figure).items()},
    )
    font = {"size": type_size}
    printed.update_xaxes(title_font=font, tickfont=font)
    printed.update_yaxes(title_font=font, tickfont=font)
    width, height = printed.layout.width, printed.layout.height
    for axis in printed.select_yaxes():
        if axis.title.text:
            axis.title.text = _wrapped(axis.title.text, AXIS_SHARE * height, type_size)
    further = 0
    for axis in printed.select_xaxes():
        if axis.title.text:
            lines = _lines(axis)
            axis.title.text = _wrapped(axis.title.text, AXIS_SHARE * width, type_size)
            further = max(further, _lines(axis) - lines)
    return printed.update_layout(
        height=height + LINE * type_size * further, margin={"r": _right_margin(printed, type_size)}
    )


def _right_margin(figure: go.Figure, type_size: float) -> float:
    """Pixels to the right of the plot, for texts to the right of its last points."""
    letter, margin = LETTER * type_size, figure.layout.margin
    beside = [trace.text for trace in figure.select_traces({"type": "scatter", "textposition": "middle right"})]
    texts = [str(text) for each in beside for text in ([each] if each is None or isinstance(each, str) else each)]
    ticks = [len(str(text)) for axis in figure.select_yaxes() for text in axis.ticktext or ()]
    left = max(margin.l, letter * max(ticks, default=0) + 3 * type_size)
    longest = letter * max(map(len, texts), default=0)
    missing = longest - TEXT_SHARE * (figure.layout.width - left)
    return float(max(margin.r, missing / (1 - TEXT_SHARE)))


def _lines(axis: Any) -> int:
    """Lines of an axis's title."""
    return axis.title.text.count("<br>") + 1


AXIS_SHARE = 0.72
"""Share of an image's side that the title of its axis may fill."""
TEXT_SHARE = 0.15
"""Share of a plot's width that figures leave for texts to the right of their points."""
LINE = 1.3
"""Distance of two lines relative to the size of the type, in Plotly."""
LETTER = 0.52
"""Width of a letter relative to the size of the type, the mean over a text."""


def _wrapped(text: str, length: float, type_size: float) -> str:
    """A text of Plotly in lines of so many pixels at most; spans, which set a size of their own, are dropped."""
    number = max(12, int(length / (LETTER * type_size)))
    lines = re.sub(r"</?span[^>]*>", "", text).split("<br>")
    return "<br>".join(part for line in lines for part in textwrap.wrap(line, number, break_long_words=False))


def _margins(figure: go.Figure) -> dict[str, float]:
    default, own = TEMPLATE.layout.margin, figure.layout.margin
    sides = {side: own[side] if own[side] is not None else default[side] for side in ("l", "r", "t", "b")}
    return {side: float(value) for side, value in sides.items()}


def _scaled(value: Any, factor: float, type_size: float, name: str = "") -> Any:
    """Plain data of a figure with fonts of ``type_size`` pixels; markers, lines and shifts times ``factor``."""
    if isinstance(value, dict):
        if name.endswith("font") and "size" in value:
            return {**value, "size": type_size}
        return {key: _scaled(item, factor, type_size, _child(name, key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_scaled(item, factor, type_size, name) for item in value]
    if isinstance(value, str):
        return re.sub(r"font-size: ?[\d.]+px", f"font-size:{type_size:g}px", value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value * factor if name in SCALED and is_number else value


SCALED = {"line.width", "marker.size", "error_x.thickness", "error_y.thickness", "error_x.width", "error_y.width"}
SCALED |= {"annotations.xshift", "annotations.yshift", "title.standoff"}
"""Lengths in pixels, by the ends of their paths."""


def _child(name: str, key: str) -> str:
    return f"{name.rpartition('.')[2]}.{key}" if name else key


def _stamp(figure: go.Figure, provenance: str) -> None:
    """Print the provenance below a figure."""
    layout = figure.layout
    type_size, size = layout.font.size, 0.75 * layout.font.size
    number = int(layout.width / (1.15 * LETTER * size))  # hashes and digits are wider than the mean letter
    lines = textwrap.wrap(provenance, max(20, number))
    stamp = LINE * size * (len(lines) + 0.5)
    titles = [_lines(axis) for axis in figure.select_xaxes() if axis.title.text]
    below = max(layout.margin.b, (3.8 + LINE * max(titles, default=0)) * type_size)  # ticks and title of the axis
    height = layout.height + stamp + below - layout.margin.b
    figure.update_layout(
        title={
            "text": "<br>".join(html.escape(line, quote=False) for line in lines),
            "font": {"size": size, "color": "#666"},
            "x": 0,
            "y": stamp / height,
            "xref": "container",
            "yref": "container",
            "xanchor": "left",
            "yanchor": "top",
            "pad": {"l": size},
        },
        height=height,
        margin={"b": below + stamp},
    )


def exported_tables(blocks: Sequence[Block], kind: str) -> dict[str, PaperTable | pl.DataFrame]:
    """Name -> table, of what a panel shows: as LaTeX and Markdown its tables as they are on screen, or the numbers of
    its figures if it has no table; as CSV and Parquet all numbers."""
    shown = [block for block in blocks if not isinstance(block, Text)]
    if kind not in PRINTED:
        return {block.name: block.table for block in shown}
    grids = [block for block in shown if isinstance(block, Grid)]
    if grids:
        return {block.name: block.printed for block in grids if block.rows}
    return {block.name: block.table for block in shown if isinstance(block, Figure) and len(block.table)}
