"""Display names of arms in what is shown. Tables as data, keys of rows and files keep the names of the arms
in the file."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import plotly.graph_objects as go

from workbench.ablation.verdict.verdict import Verdict
from workbench.dashboards import style
from workbench.paper import PaperTable

__all__ = ["named_figure", "named_table", "named_verdict"]


def named_verdict(verdict: Verdict, names: Mapping[str, str]) -> Verdict:
    """A verdict whose rows, and so its summary, have display names; its sentences keep the names of the arms in
    the file."""
    rows = tuple(replace(row, arm=names.get(row.arm, row.arm)) for row in verdict.rows)
    return replace(verdict, rows=rows, baseline=names.get(verdict.baseline, verdict.baseline))


def named_figure(figure: go.Figure, names: Mapping[str, str]) -> go.Figure:
    """A figure with display names: in its legend, ticks, titles of plots, and quoted in titles of axes."""
    changed = {arm: name for arm, name in names.items() if name != arm}
    return _figure(figure, changed) if changed else figure


def named_table(table: PaperTable, names: Mapping[str, str]) -> PaperTable:
    """A table of a paper with display names."""
    changed = {arm: name for arm, name in names.items() if name != arm}
    return _paper(table, changed) if changed else table


def _paper(table: PaperTable, names: Mapping[str, str]) -> PaperTable:
    columns = [column._replace(title=names.get(column.title, column.title)) for column in table.columns]
    arms = [i for i, column in enumerate(table.columns) if column.title == "arm"]
    rows = [
        [c._replace(text=names.get(c.text, c.text)) if i in arms else c for i, c in enumerate(row)]
        for row in table.rows
    ]
    pattern = "|".join(map(re.escape, names))
    caption = re.sub(rf"(difference to )({pattern})(?=[ ,.])", lambda found: found[1] + names[found[2]], table.caption)
    return replace(table, columns=columns, rows=rows, caption=caption)


def _figure(figure: go.Figure, names: Mapping[str, str]) -> go.Figure:
    labels = {style.label(arm): style.label(name) for arm, name in names.items()}
    quoted = {f"“{old}”": f"“{new}”" for old, new in labels.items()}
    figure = copy.deepcopy(figure)
    for trace in figure.data:
        for old, new in labels.items():
            name = trace.name or ""
            if name == old or (name.startswith(f"{old} (") and str(trace.legendgroup or "").startswith("arm ")):
                trace.name = new + name[len(old) :]
                break
        for axis in ("x", "y"):  # categories
            values = getattr(trace, axis, None)
            if values is not None and len(values) and any(isinstance(v, str) and v in labels for v in values):
                setattr(trace, axis, [labels.get(v, v) for v in values])
    for axis in [*figure.select_xaxes(), *figure.select_yaxes()]:
        if axis.ticktext:
            axis.ticktext = [labels.get(text, text) for text in axis.ticktext]
        if axis.title.text:
            axis.title.text = _replaced(axis.title.text, quoted)
    for annotation in figure.layout.annotations:
        annotation.text = labels.get(annotation.text, _replaced(annotation.text or "", quoted))
    return figure


def _replaced(text: str, words: Mapping[str, Any]) -> str:
    for old, new in words.items():
        text = text.replace(old, new)
    return text
