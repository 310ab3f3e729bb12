"""Tables drawn as figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from workbench.dashboards import style
from workbench.dashboards.figures.parts import sentence, table_of
from workbench.dashboards.tables import cost_table, failure_table

if TYPE_CHECKING:
    from workbench.dashboards.view import RunView


COST_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "parameters": ("parameters", style.count),
    "non_embedding": ("without embedding", style.count),
    "active": ("active", style.count),
    "flops_per_token": ("forward, per token", style.flops),
    "training_flops": ("training, one run", style.flops),
    "cache_bytes": ("cache, one sequence", style.size),
    "memory_bytes": ("training memory", style.size),
    "tokens": ("tokens, one run", style.count),
    "trials": ("runs", style.count),
    "seconds_per_trial": ("time, one run, estimate", style.duration),
    "measured_seconds": ("time, one run, measured", style.duration),
    "spent_seconds": ("time, all runs so far", style.duration),
    "solved": ("set by the budget", lambda text: text or "–"),
    "residual": ("off budget", style.share),
    "mismatch": ("not matched", lambda text: text or "–"),
}
"""Column of the cost table -> its heading and how its numbers are written."""


def cost(run: RunView) -> go.Figure:
    """What each arm costs, as a table with human numbers."""
    table = cost_table(run)
    if not len(table):
        return sentence("No cost was worked out before launch.")
    heads, columns = ["arm"], [[style.label(arm) for arm in table["arm"]]]
    for name, (head, written) in COST_COLUMNS.items():
        if name in table.columns:
            heads.append(head)
            columns.append([style.label(written(value), 200) for value in table[name]])
    return table_of(heads, columns)


def failures(run: RunView) -> go.Figure:
    """Runs that failed, with the reason."""
    table = failure_table(run)
    if not len(table):
        return sentence("No run has failed.")
    shown = ["arm", "stage", "seed", "status", "step", "reason"]
    columns = [["–" if v is None else style.label(str(v), 400) for v in table[name]] for name in shown]
    return table_of(shown, columns)
