"""Figures, tables, a report and a live dashboard of ablations. Importing it loads neither torch nor widgets.

Everything shown is a panel (:mod:`workbench.dashboards.panel`): ``figure(run, "curves", x="flops")`` draws its figure,
``table(run, "curves")`` is the table behind it. The dashboard (in JupyterLab, or as a page of its own) and the report
(one HTML file) show the same panels.
"""

# ruff: noqa: F401

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.lazy import attach

if TYPE_CHECKING:
    from workbench.dashboards.export import export_figure
    from workbench.dashboards.live.widget import Dashboard, dashboard
    from workbench.dashboards.panel import figure, paper_table, table
    from workbench.dashboards.panels.compare import saved_view
    from workbench.dashboards.report.render import write_report
    from workbench.dashboards.view import RunView, SingleRuns
    from workbench.paper import export_table, provenance_line

__getattr__, __dir__, __all__ = attach(__name__, __file__)
