"""What a reader has chosen of a table: the rows that satisfy a filter, and columns."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from workbench.config import ConfigError
from workbench.dashboards.panel import Grid, Row
from workbench.results.filters import Filter

__all__ = ["chosen_rows_and_columns"]


def chosen_rows_and_columns(grid: Grid, query: str = "", shown: Collection[str] | None = None) -> Grid:
    """A table as the reader wants it.

    A row with rows below it is kept with those that satisfy the filter; where none does but the row itself, with all.

    Args:
        grid: the whole table.
        query: a filter; where it has a mistake, the table is whole and states it.
        shown: titles of the columns to show; default those that are not hidden.
    """
    if shown is not None:
        grid = replace(grid, columns=[column._replace(hidden=column.title not in shown) for column in grid.columns])
    if not query.strip():
        return grid
    total = len(grid.rows)
    titles = [column.title for column in grid.columns]
    columns = dict.fromkeys(name for row in _all(grid.rows) for name in _values(row, titles))
    try:
        found = Filter.parse(query, columns)
    except ConfigError as error:
        return replace(grid, query=query, problem=str(error).strip(), total=total)
    kept: list[tuple[int, Row]] = []
    for place, row in enumerate(grid.rows):
        itself = _matches(found, row, titles)
        below = [child for child in row.children if _matches(found, child, titles)]
        if itself or below:
            row = row._replace(children=below or row.children, unfolded=not itself)
            kept.append((place, row))
    is_parallel = len(grid.table) == total
    table = grid.table[[place for place, _ in kept]] if is_parallel else grid.table
    return replace(grid, rows=[row for _, row in kept], table=table, query=query, total=total)


def _all(rows: Iterable[Row]) -> Iterable[Row]:
    for row in rows:
        yield row
        yield from row.children


def _values(row: Row, titles: list[str]) -> Mapping[str, Any]:
    if row.values:
        return row.values
    cells = zip(titles, row.cells)
    return {
        title: cell if isinstance(cell, str) or cell.value is None else cell.value for title, cell in cells if title
    }


def _matches(found: Filter, row: Row, titles: list[str]) -> bool:
    text = " ".join(cell if isinstance(cell, str) else cell.text for cell in row.cells)
    return found.matches(_values(row, titles), text)
