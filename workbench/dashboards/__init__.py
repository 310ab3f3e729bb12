"""Figures, tables, a report and a live dashboard of one ablation. Imports no torch; widgets only when asked for.

Every figure draws exactly one table: ``loss_curves`` draws ``curve_table``, ``effects`` draws ``effect_table``, and so
on. The report (one HTML file) and the dashboard (JupyterLab) show the same figures.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.dashboards.figures import cost, effects, failures, loss_curves, recall_curves, recall_map, tuning
    from workbench.dashboards.report import write_report
    from workbench.dashboards.tables import (
        cost_table,
        curve_table,
        effect_table,
        failure_table,
        progress_table,
        recall_table,
        tuning_table,
    )
    from workbench.dashboards.widget import Dashboard, dashboard

_HOMES = {
    "Dashboard": "widget", "dashboard": "widget", "write_report": "report",
    "cost": "figures", "effects": "figures", "failures": "figures", "loss_curves": "figures", "tuning": "figures",
    "recall_curves": "figures", "recall_map": "figures", "recall_table": "tables",
    "cost_table": "tables", "curve_table": "tables", "effect_table": "tables", "failure_table": "tables",
    "progress_table": "tables", "tuning_table": "tables",
}  # fmt: skip

__all__ = [
    "Dashboard", "cost", "cost_table", "curve_table", "dashboard", "effect_table", "effects", "failure_table",
    "failures", "loss_curves", "progress_table", "recall_curves", "recall_map", "recall_table", "tuning", "tuning_table", "write_report",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'workbench.dashboards' has no attribute {name!r}")
    return getattr(importlib.import_module(f"workbench.dashboards.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
