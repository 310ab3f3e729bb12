"""Importance of hyperparameters."""

from __future__ import annotations

import json
import math
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
import polars as pl

from workbench.dashboards import style
from workbench.dashboards.figures.parts import arm_trace, error_bars, figure_of, legend, nothing_tuned
from workbench.dashboards.panel import FigurePanel, PanelConfig, panels
from workbench.dashboards.snapshot import Snapshot
from workbench.status import Stage, Status

MIN_TRIALS = 6
"""Finished trials that an arm needs for importances."""
RESAMPLES = 100
TARGET_QUANTILE = 0.25
"""The best quarter of the trials is compared with all of them (our choice): with Optuna's best tenth, two of twenty
trials would decide, and a field that explains nearly everything could rarely be told from noise."""


@panels.register
class Importances(FigurePanel):
    """Which hyperparameters mattered in tuning?"""

    class Config(PanelConfig):
        kind: Literal["importances"] = "importances"

    title = "importances"
    tab = "Tuning"
    order = 52
    note = (
        "PED-ANOVA within each arm: the part of a field's share that exceeds what permuted values have in the mean. A "
        "bar that ends before its grey mark, the 95 % quantile of permuted values, cannot be told from noise. Error "
        "bars hold 90 % of a bootstrap over trials."
    )

    def table(self, run: Snapshot) -> pl.DataFrame:
        return importance_table(run)

    def figure(self, run: Snapshot, table: pl.DataFrame) -> go.Figure:
        bars, labels = [], style.labels(table["hyperparameter"])
        for arm, look in style.arm_styles(run).items():
            rows = table.filter(pl.col("arm") == arm)
            bars.append(
                go.Bar(
                    y=[labels[name] for name in rows["hyperparameter"]],
                    x=rows["importance"].to_list(),
                    orientation="h",
                    marker={"color": look.colour},
                    customdata=rows["trials"].to_list(),
                    error_x=error_bars(rows, "importance", thickness=1, color=style.INK),
                    hovertemplate="%{x:.0%} of %{y} (%{customdata} trials)",
                    **arm_trace(run, arm),
                )
            )
            bars.append(
                go.Scatter(
                    y=[labels[name] for name in rows["hyperparameter"]],
                    x=rows["null_high"].to_list(),
                    mode="markers",
                    marker={"symbol": "line-ns", "size": 16, "line": {"width": 2, "color": "gray"}},
                    hovertemplate="95 % of permuted values: %{x:.0%}",
                    **{**arm_trace(run, arm), "showlegend": False},
                )
            )
        missing = nothing_tuned(run, f"Importances need {MIN_TRIALS} finished trials of an arm.")
        figure = figure_of(bars, "" if len(table) else missing)
        figure.update_xaxes(title_text="importance (share above noise)", tickformat=".0%", range=[0, 1.02])
        figure.update_yaxes(title_text="hyperparameter")
        return figure.update_layout(legend=legend(run.arms), barmode="group")


def importance_table(run: Snapshot) -> pl.DataFrame:
    """Importance of each hyperparameter in each arm's tuning: Optuna's PED-ANOVA (Watanabe et al. 2023), as shares of
    the sum over fields, less the mean share that the field has with permuted selection values (ours): a field without
    influence has about 0, not the whole because it is the only one.

    low and high are the middle 90 % over a bootstrap of the trials, null_high the 95 % quantile over permutations, on
    the same scale; p the share of permutations in which the field has at least as much (seeded: the same trials give
    the same numbers). Columns: arm, hyperparameter, importance, low, high, null_high, p, trials. Arms with fewer than 6
    finished trials have no row.
    """
    schema = {
        "arm": pl.String,
        "hyperparameter": pl.String,
        "importance": pl.Float64,
        "low": pl.Float64,
        "high": pl.Float64,
        "null_high": pl.Float64,
        "p": pl.Float64,
        "trials": pl.Int64,
    }
    rows = []
    done = run.runs().filter((pl.col("stage") == Stage.TUNING) & (pl.col("status") == Status.DONE))
    for arm in run.arms:
        trials = done.filter(pl.col("arm") == arm).drop_nulls("selection_value")
        rows += [(arm, *row) for row in _rows(tuple(trials.select("hyperparameters", "selection_value").iter_rows()))]
    return pl.DataFrame(rows, schema=schema, orient="row")


@lru_cache
def _rows(finished: tuple[tuple[str, float], ...]) -> list[tuple[Any, ...]]:
    """Rows of :func:`importance_table` of one arm, without its name. Slow, so the same trials are analysed once.

    Args:
        finished: setting, as JSON, and selection value of each trial.
    """
    trials = [(json.loads(setting), value) for setting, value in finished]
    names = sorted({name for setting, _ in trials for name in setting})
    if len(trials) < MIN_TRIALS or not names:
        return []
    raw, random = _importances(trials, names), np.random.default_rng(0)
    settings, values = zip(*trials)
    null = np.array([_importances(list(zip(settings, random.permutation(values))), names) for _ in range(RESAMPLES)])
    resampled = np.array(
        [
            _importances([trials[i] for i in random.integers(0, len(trials), len(trials))], names)
            for _ in range(RESAMPLES)
        ]
    )
    total, noise = raw.sum() or math.nan, null.mean(0)
    importance = np.maximum(raw - noise, 0) / total
    low, high = np.quantile(np.maximum(resampled - noise, 0) / total, (0.05, 0.95), axis=0).clip(0, 1)
    null_high = np.maximum(np.quantile(null, 0.95, axis=0) - noise, 0) / total
    p = (1 + (null >= raw).sum(0)) / (1 + RESAMPLES)
    columns = zip(names, importance, low, high, null_high, p)
    return [(name, *map(float, numbers), len(trials)) for name, *numbers in columns]


def _importances(trials: list[tuple[dict[str, Any], float]], names: list[str]) -> np.ndarray:
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
        importances = optuna.importance.PedAnovaImportanceEvaluator(
            target_quantile=TARGET_QUANTILE, evaluate_on_local=False
        ).evaluate(study)
    return np.array([importances.get(name, 0.0) for name in names])
