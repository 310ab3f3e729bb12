"""Figures, tables, a report and a live dashboard of ablations. Imports no torch; widgets only when asked for.

Every figure draws exactly one table: ``loss_curves`` draws ``curve_table``, ``effects`` draws ``effect_table``, and so
on. The report (one HTML file) and the dashboard (JupyterLab, or a page of its own) show the same figures.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.dashboards.export import export_figure, export_table, provenance_line
    from workbench.dashboards.figures import (
        best_of,
        cost,
        diagnostic_curves,
        diagnostic_map,
        effects,
        failures,
        frontier,
        importances,
        loss_curves,
        parallel,
        recall_curves,
        recall_map,
        recall_state,
        scaling,
        tuning,
    )
    from workbench.dashboards.report import write_report
    from workbench.dashboards.tables import (
        best_of_table,
        cost_table,
        curve_table,
        diagnostic_table,
        effect_table,
        failure_table,
        frontier_table,
        importance_table,
        overview_table,
        progress_table,
        recall_table,
        scaling_table,
        state_table,
        tuning_table,
    )
    from workbench.dashboards.widget import Dashboard, dashboard

_NAMES = {
    "export": ["export_figure", "export_table", "provenance_line"],
    "figures": [
        "best_of",
        "cost",
        "diagnostic_curves",
        "diagnostic_map",
        "effects",
        "failures",
        "frontier",
        "importances",
        "loss_curves",
        "parallel",
        "recall_curves",
        "recall_map",
        "recall_state",
        "scaling",
        "tuning",
    ],
    "report": ["write_report"],
    "tables": [
        "best_of_table",
        "cost_table",
        "curve_table",
        "diagnostic_table",
        "effect_table",
        "failure_table",
        "frontier_table",
        "importance_table",
        "overview_table",
        "progress_table",
        "recall_table",
        "scaling_table",
        "state_table",
        "tuning_table",
    ],
    "widget": ["Dashboard", "dashboard"],
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "Dashboard",
    "best_of",
    "best_of_table",
    "cost",
    "cost_table",
    "curve_table",
    "dashboard",
    "diagnostic_curves",
    "diagnostic_map",
    "diagnostic_table",
    "effect_table",
    "effects",
    "export_figure",
    "export_table",
    "failure_table",
    "failures",
    "frontier",
    "frontier_table",
    "importance_table",
    "importances",
    "loss_curves",
    "overview_table",
    "parallel",
    "progress_table",
    "provenance_line",
    "recall_curves",
    "recall_map",
    "recall_state",
    "recall_table",
    "scaling",
    "scaling_table",
    "state_table",
    "tuning",
    "tuning_table",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'workbench.dashboards' has no attribute {name!r}")
    return getattr(importlib.import_module(f"workbench.dashboards.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
