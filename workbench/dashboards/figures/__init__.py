"""The figures. Each draws exactly its table in :mod:`workbench.dashboards.tables`, and says so calmly when it is empty.

The number of traces of ``loss_curves`` and ``effects`` depends on the arms alone, so that a live view only exchanges
their data.
"""

from workbench.dashboards.figures.curves import loss_curves
from workbench.dashboards.figures.forest import effects
from workbench.dashboards.figures.listings import COST_COLUMNS, cost, failures
from workbench.dashboards.figures.mechanisms import diagnostic_curves, diagnostic_map
from workbench.dashboards.figures.recall import recall_curves, recall_map, recall_state
from workbench.dashboards.figures.tradeoffs import BEYOND, SPENT_TITLES, frontier, scaling
from workbench.dashboards.figures.trials import best_of, importances, parallel, tuning

__all__ = [
    "BEYOND",
    "COST_COLUMNS",
    "SPENT_TITLES",
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
]
