"""Tables as they are printed in a paper, and the one writer of tables as files: LaTeX, Markdown, CSV, Parquet.

LaTeX and Markdown are to be read: rounded texts, the best in bold, a caption, at most :data:`MAX_PRINTED` rows. CSV and
Parquet have the numbers behind them, every digit. The provenance is a comment, a last line, or a file beside the data.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import polars as pl

from workbench.config import ConfigError, require
from workbench.files import write_json

__all__ = ["TABLES", "PaperCell", "PaperColumn", "PaperTable", "checked_path", "export_table", "provenance_line"]

PRINTED = ("tex", "md")
"""Endings of tables to be read."""
TABLES = ("csv", "parquet", *PRINTED)
"""Endings of tables."""
MAX_PRINTED = 200
"""Rows from which on a table is data, not something to print (our choice)."""


class PaperColumn(NamedTuple):
    """A column of a :class:`PaperTable`."""

    title: str
    numeric: bool = False
    """Whether it is aligned to the right."""


class PaperCell(NamedTuple):
    """A cell of a :class:`PaperTable`."""

    text: str
    bold: bool = False


@dataclass(frozen=True)
class PaperTable:
    """A table as it is printed, with the numbers behind it."""

    columns: Sequence[PaperColumn]
    rows: Sequence[Sequence[PaperCell]]
    data: pl.DataFrame
    """The same content as numbers."""
    caption: str = ""
    """Sentences; without them LaTeX is a ``tabular`` alone, not a float."""
    label: str = ""
    """What LaTeX refers to: ``tab:<label>``."""


class Sourced(Protocol):
    """What has a provenance: any run."""

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> str: ...

    def provenance(self) -> Mapping[str, str]: ...


def provenance_line(run: Sourced) -> str:
    """Where the numbers of ``run`` come from, in one line."""
    provenance = run.provenance()
    names = ("code", "data", "device", "created", "torch")
    parts = [f"{name} {provenance[name]}" for name in names if name in provenance]
    identity = run.identity or provenance.get("ablation", "")
    line = " · ".join([f"{run.name} {identity}".strip(), *parts])
    return " ".join(line.split())  # an archive's line break would end the comment that the line is part of a file as


def checked_path(path: str | Path, kinds: Sequence[str]) -> Path:
    """``path``, whose folder is created.

    Raises:
        ConfigError: unless it ends in one of ``kinds``.
    """
    path = Path(path)
    if path.suffix[1:] not in kinds:
        raise ConfigError.at("path", got=path.name, expected=f"a file that ends in .{', .'.join(kinds)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_provenance(path: Path, provenance: str, caption: str = "") -> None:
    """Write ``<path>.provenance.json`` beside a file that cannot carry its provenance."""
    write_json(path.with_name(f"{path.name}.provenance.json"), {"provenance": provenance, "caption": caption})


def export_table(table: PaperTable | pl.DataFrame, path: str | Path, provenance: str) -> Path:
    """Write a table as .tex (booktabs), .md, .csv or .parquet.

    Args:
        table: the table. The numbers of a frame are printed with four digits.
        path: of the file; its folder is created if missing.
        provenance: see :func:`provenance_line`; a comment of .tex, the last line of .md, in a JSON file beside the
            others, which hold data alone.

    Raises:
        ConfigError: for another ending, or for LaTeX or Markdown of no rows or more than :data:`MAX_PRINTED`.
    """
    path = checked_path(path, TABLES)
    kind = path.suffix[1:]
    paper = table if isinstance(table, PaperTable) else _printed(table)
    if kind in PRINTED:
        require(
            0 < len(paper.rows) <= MAX_PRINTED,
            "table",
            got=f"{len(paper.rows):,} rows",
            expected=f"1 to {MAX_PRINTED} rows to print",
            do="Export CSV or Parquet." if paper.rows else "",
        )
        write = _latex if kind == "tex" else _markdown
        path.write_text(write(paper, provenance), encoding="utf-8")
        return path
    if kind == "csv":
        path.write_bytes(_csv(paper.data))
    else:
        paper.data.write_parquet(path)
    write_provenance(path, provenance, paper.caption)
    return path


NUMBER = r"^[+−-]?[\d,.]+( ± [\d,.]+)?$|^$"


def _printed(table: pl.DataFrame) -> PaperTable:
    columns = [PaperColumn(column.name, _is_numeric(column)) for column in table]
    return PaperTable(columns, [[PaperCell(_text(value)) for value in row] for row in table.iter_rows()], table)


def _is_numeric(column: pl.Series) -> bool:
    """Whether a column holds numbers, with their uncertainty or without."""
    if column.dtype == pl.String:
        return len(column) > 0 and bool(column.str.contains(NUMBER).all()) and bool((column != "").any())
    return column.dtype.is_numeric()


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


FORMULA = r"^[=@\t\r]|^[+-].*[^0-9.eE+-]"
"""Texts that a spreadsheet would take for a formula."""


def _json(value: Any) -> str | None:
    if value is None:
        return None
    return json.dumps(value.to_list() if isinstance(value, pl.Series) else value, ensure_ascii=False, default=str)


def _csv(table: pl.DataFrame) -> bytes:
    nested = [name for name, kind in table.schema.items() if kind.is_nested()]
    flat = table.with_columns(pl.Series(name, list(map(_json, table[name])), pl.String) for name in nested)
    for name in (name for name, kind in flat.schema.items() if kind == pl.String):
        formula = pl.col(name).str.contains(FORMULA)
        flat = flat.with_columns(pl.when(formula).then("'" + pl.col(name)).otherwise(name).alias(name))
    buffer = io.BytesIO()
    flat.write_csv(buffer)
    return buffer.getvalue()


def _markdown(table: PaperTable, provenance: str) -> str:
    def cells(texts: Sequence[str]) -> str:
        return "| " + " | ".join(texts) + " |"

    def escaped(text: str) -> str:
        return text.replace("|", "\\|").replace("\n", " ")

    rule = "|" + "|".join(" ---: " if column.numeric else " --- " for column in table.columns) + "|"
    rows = [[f"**{escaped(cell.text)}**" if cell.bold else escaped(cell.text) for cell in row] for row in table.rows]
    head = [escaped(table.caption), ""] if table.caption else []
    titles = [escaped(column.title) for column in table.columns]
    return "\n".join([*head, cells(titles), rule, *map(cells, rows), "", f"*{provenance}*", ""])


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
    "<": "$<$",
    ">": "$>$",
    "–": "--",
    "−": r"$-$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "Δ": r"$\Delta$",
    "α": r"$\alpha$",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "²": r"\textsuperscript{2}",
}


def _latex(table: PaperTable, provenance: str) -> str:
    def escaped(text: str) -> str:
        return "".join(SPECIAL.get(character, character) for character in text)

    def cells(texts: Sequence[str]) -> str:
        return " & ".join(texts) + r" \\"

    rows = [
        [rf"\textbf{{{escaped(cell.text)}}}" if cell.bold else escaped(cell.text) for cell in row] for row in table.rows
    ]
    tabular = [
        rf"\begin{{tabular}}{{{''.join('r' if column.numeric else 'l' for column in table.columns)}}}",
        r"\toprule",
        cells([escaped(column.title) for column in table.columns]),
        r"\midrule",
        *map(cells, rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    if table.caption:
        label = re.sub(r"[^A-Za-z0-9.:-]+", "-", table.label)
        head = [r"\begin{table}[t]", r"\centering", rf"\caption{{{escaped(table.caption)}}}", rf"\label{{tab:{label}}}"]
        tabular = [*head, *tabular, r"\end{table}"]
    return "\n".join([f"% {provenance}", "% needs the package booktabs", *tabular, ""])
