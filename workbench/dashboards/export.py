"""Figures and tables as files for a paper: PNG, SVG, PDF, CSV, LaTeX, Markdown. Each carries a line with the provenance
of its numbers.

Images are drawn by Chromium or Chrome through Kaleido; tables need neither.
"""

from __future__ import annotations

import io
import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
import polars as pl

from workbench.config import ConfigError

if TYPE_CHECKING:
    from workbench.dashboards.view import RunView

IMAGES = ("png", "svg", "pdf")
TABLES = ("csv", "tex", "md")
WIDTH, SCALE = 960, 2
"""Width of an image in pixels, and dots of a PNG per pixel."""


def provenance_line(run: RunView) -> str:
    """Where the numbers of ``run`` come from, in one line."""
    provenance = run.provenance()
    names = ("code", "data", "device", "created", "torch")
    parts = [f"{name} {provenance[name]}" for name in names if name in provenance]
    identity = run.identity or provenance.get("ablation", "")
    line = " · ".join([f"{run.name} {identity}".strip(), *parts])
    return " ".join(line.split())  # an archive's line break would end the comment that the line is part of a file as


def export_figure(figure: go.Figure, path: str | Path, provenance: str, width: int = WIDTH) -> Path:
    """``figure`` as .png, .svg or .pdf, dark on white, with ``provenance`` below it.

    Args:
        figure: the figure.
        path: of the file; its folder is created if missing.
        provenance: see :func:`provenance_line`.
        width: pixels.

    Raises:
        ConfigError: for another ending, or when there is no browser to draw it.
    """
    path = _checked(path, IMAGES)
    printed = go.Figure(figure)
    lines = textwrap.wrap(provenance, max(40, width // 6))
    bottom = (figure.layout.margin.b or 56) + 14
    printed.add_annotation(
        text="<br>".join(line.replace("&", "&amp;").replace("<", "&lt;") for line in lines),
        font={"size": 9, "color": "#666"},
        x=0,
        y=0,
        xref="paper",
        yref="paper",
        xanchor="left",
        yanchor="top",
        align="left",
        showarrow=False,
        yshift=-bottom,
    )
    printed.update_layout(
        font={"color": "#222"},
        paper_bgcolor="white",
        plot_bgcolor="white",
        width=width,
        autosize=False,
        height=(figure.layout.height or 400) + 14 + 12 * len(lines),
        margin={"b": bottom + 12 * len(lines)},
    )
    try:
        printed.write_image(path, scale=SCALE)
    except Exception as error:  # Kaleido and its browser fail in many ways, each with a page of advice
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        raise ConfigError.at(
            "path",
            got=f"{path.name}, and no image could be drawn ({reason})",
            expected="Chromium or Chrome, and Kaleido",
            do="Install a browser (or name it in BROWSER_PATH); tables and the HTML report need none.",
        ) from None
    return path


def export_table(table: pl.DataFrame, path: str | Path, provenance: str) -> Path:
    """``table`` as .csv, .tex (a ``tabular`` in booktabs style) or .md, with ``provenance`` as a comment or last line.

    CSV keeps every digit; the others show six.

    Raises:
        ConfigError: for another ending.
    """
    path = _checked(path, TABLES)
    write = {"csv": _csv, "tex": _latex, "md": _markdown}[path.suffix[1:]]
    path.write_text(write(table, provenance), encoding="utf-8")
    return path


def _checked(path: str | Path, kinds: tuple[str, ...]) -> Path:
    path = Path(path)
    if path.suffix[1:] not in kinds:
        raise ConfigError.at("path", got=path.name, expected=f"a file that ends in .{', .'.join(kinds)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


FORMULA = r"^[=@\t\r]|^[+-].*[^0-9.eE+-]"
"""Texts that a spreadsheet would take for a formula."""


def _csv(table: pl.DataFrame, provenance: str) -> str:
    flat = table.with_columns(pl.col(name).cast(pl.String) for name, kind in table.schema.items() if kind.is_nested())
    for name in (name for name, kind in flat.schema.items() if kind == pl.String):
        formula = pl.col(name).str.contains(FORMULA)
        flat = flat.with_columns(pl.when(formula).then("'" + pl.col(name)).otherwise(name).alias(name))
    buffer = io.BytesIO()
    flat.write_csv(buffer)
    return f"# {provenance}\n{buffer.getvalue().decode()}"


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


NUMBER = r"^[+-]?[\d,.]+( ± [\d,.]+)?$|^$"


def _is_numeric(column: pl.Series) -> bool:
    """Whether a column holds numbers, with their uncertainty or without."""
    if column.dtype == pl.String:
        return len(column) > 0 and bool(column.str.contains(NUMBER).all()) and bool((column != "").any())
    return column.dtype.is_numeric()


def _markdown(table: pl.DataFrame, provenance: str) -> str:
    def cells(row: Any) -> str:
        return "| " + " | ".join(_text(value).replace("|", "\\|").replace("\n", " ") for value in row) + " |"

    rule = "|" + "|".join(" ---: " if _is_numeric(column) else " --- " for column in table) + "|"
    return "\n".join([cells(table.columns), rule, *map(cells, table.iter_rows()), "", f"*{provenance}*", ""])


SPECIAL = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "−": r"$-$",
    "±": r"$\pm$",
    "²": r"\textsuperscript{2}",
}


def _latex(table: pl.DataFrame, provenance: str) -> str:
    def cells(row: Any) -> str:
        return " & ".join("".join(SPECIAL.get(c, c) for c in _text(value)) for value in row) + r" \\"

    columns = "".join("r" if _is_numeric(column) else "l" for column in table)
    body = [
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        cells(table.columns),
        r"\midrule",
        *map(cells, table.iter_rows()),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join([f"% {provenance}", "% needs the package booktabs", *body, ""])
