"""Importance of hyperparameters."""

from __future__ import annotations

import json
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
import polars as pl

from workbench.dashboards import style
from workbench.dashboards.figures.parts import arm_trace, figure_of, legend, nothing_tuned
from workbench.dashboards.panel import FigurePanel, PanelConfig, panels
from workbench.dashboards.snapshot import Snapshot
from workbench.status import Stage, Status

MIN_TRIALS = 6
"""Finished trials that an arm needs for importances."""
RESAMPLES = 100


@panels.register
class Importances(FigurePanel):
    """Which hyperparameters mattered in tuning?"""

    class Config(PanelConfig):
        kind: Literal["importances"] = "importances"

    title = "importances"
    tab = "Tuning"
    order = 52
    note = "PED-ANOVA within each arm; error bars hold 90 % of a bootstrap over trials."

    def table(self, run: Snapshot) -> pl.DataFrame:
        return importance_table(run)

    def figure(self, run: Snapshot, table: pl.DataFrame) -> go.Figure:
        bars = []
        for arm, look in style.arm_styles(run).items():
            rows = table.filter(pl.col("arm") == arm)
            value = rows["importance"]
            bars.append(
                go.Bar(
                    y=[style.label(name) for name in rows["hyperparameter"]],
                    x=value.to_list(),
                    orientation="h",
                    marker={"color": look.colour},
                    customdata=rows["trials"].to_list(),
                    error_x={
                        "type": "data",
                        "symmetric": False,
                        "array": (rows["high"] - value).clip(0).to_list(),
                        "arrayminus": (value - rows["low"]).clip(0).to_list(),
                        "thickness": 1,
                        "color": style.INK,
                    },
                    hovertemplate="%{x:.0%} of %{y} (%{customdata} trials)",
                    **arm_trace(run, arm),
                )
            )
        missing = nothing_tuned(run, f"Importances need {MIN_TRIALS} finished trials of an arm.")
        figure = figure_of(bars, "" if len(table) else missing)
        figure.update_xaxes(title_text="importance (share)", tickformat=".0%", range=[0, 1.02])
        figure.update_yaxes(title_text="hyperparameter")
        return figure.update_layout(legend=legend(run.arms), barmode="group")


def importance_table(run: Snapshot) -> pl.DataFrame:
    """Importance of each hyperparameter in each arm's tuning: Optuna's PED-ANOVA (Watanabe et al. 2023), as shares of
    1, with the middle 90 % over a bootstrap of the trials (seeded: the same trials give the same numbers).

    Columns: arm, hyperparameter, importance, low, high, trials. Arms with fewer than 6 finished trials have no row.
    """
    schema = {
        "arm": pl.String,
        "hyperparameter": pl.String,
        "importance": pl.Float64,
        "low": pl.Float64,
        "high": pl.Float64,
        "trials": pl.Int64,
    }
    rows = []
    done = run.runs().filter((pl.col("stage") == Stage.TUNING) & (pl.col("status") == Status.DONE))
    for arm in run.arms:
        trials = [
            (json.loads(row["hyperparameters"]), row["selection_value"])
            for row in done.filter(pl.col("arm") == arm).iter_rows(named=True)
            if row["selection_value"] is not None
        ]
        names = sorted({name for settings, _ in trials for name in settings})
        if len(trials) < MIN_TRIALS or not names:
            continue
        values, random = _importances(trials, names), np.random.default_rng(0)
        samples = [
            _importances([trials[i] for i in random.integers(0, len(trials), len(trials))], names)
            for _ in range(RESAMPLES)
        ]
        low, high = np.nanquantile(np.array(samples), (0.05, 0.95), axis=0)
        rows += [(arm, name, *map(float, numbers), len(trials)) for name, *numbers in zip(names, values, low, high)]
    return pl.DataFrame(rows, schema=schema, orient="row")


def _importances(trials: list[tuple[dict[str, Any], float]], names: list[str]) -> list[float]:
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    spaces: dict[str, BaseDistribution] = {}
    for name in names:
        values = [settings[name] for settings, _ in trials]
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            low, high = min(values), max(values)
            if low != high:
                spaces[name] = FloatDistribution(low, high, log=low > 0 and high / low > 5)
        else:
            spaces[name] = CategoricalDistribution(sorted(set(values), key=str))
    importances: dict[str, float] = {}
    if spaces and len({value for _, value in trials}) > 1:
        study = optuna.create_study()
        for settings, value in trials:
            params = {name: settings[name] for name in spaces}
            study.add_trial(optuna.trial.create_trial(params=params, distributions=spaces, value=value))
        importances = optuna.importance.PedAnovaImportanceEvaluator(evaluate_on_local=False).evaluate(study)
    total = sum(importances.values())
    return [importances.get(name, 0.0) / total if total else float("nan") for name in names]
