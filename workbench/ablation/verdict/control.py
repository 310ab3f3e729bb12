"""A control variate: seed noise that shows on the selection split is taken out of the difference on the report split.

The paired difference D_s of a seed on the report split correlates with the same runs' difference X_s on the selection
split. X has an unknown mean, and an estimate of it from the report seeds themselves leaves the mean of D as it is. Runs
of other seeds at the same settings (a pilot) estimate it; they are never measured on the report documents.

Legend: S report seeds; P seeds of the earlier ablation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict
from scipy import special

from workbench.ablation.folder import AblationFolder
from workbench.ablation.verdict.statistics import Floats, Interval
from workbench.config import ConfigError, require
from workbench.results.store import RunFolder
from workbench.status import Stage

__all__ = ["MIN_RUNS", "ControlRuns", "ControlVariate", "control_runs", "control_variate", "same_setting"]

MIN_RUNS = 4
"""Paired seeds that the earlier ablation needs; from fewer the slope is hardly known."""


class ControlRuns(BaseModel):
    """The finished runs of one arm in an earlier ablation, as recorded at launch."""

    model_config = ConfigDict(frozen=True)

    setting: dict[str, Any]
    """Their configuration without its seeds."""
    data: str
    """Fingerprint of their prepared data."""
    selection: dict[int, float]
    """Seed -> metric on the selection split."""
    measured: dict[int, float]
    """Seed -> metric on the split that the earlier ablation measured."""


@dataclass(frozen=True, eq=False)
class ControlVariate:
    """Paired selection differences of one arm, arm − baseline."""

    selection_S: Floats
    """(S,), of the report seeds."""
    selection_P: Floats
    """(P,), of the earlier seeds."""
    measured_P: Floats
    """(P,), the differences that the earlier ablation measured: they give the slope."""

    @property
    def slope(self) -> float:
        """Factor γ of the adjustment: β · P / (S + P), β from a least-squares line through the earlier runs.

        Any γ that does not depend on the report seeds leaves the estimate unbiased; this one has the least variance if
        the split that the earlier ablation measured is like the report split.
        """
        x_P = self.selection_P - self.selection_P.mean()
        if not np.ptp(self.selection_P):
            return 0.0
        beta = float(x_P @ self.measured_P / (x_P @ x_P))
        return beta * len(x_P) / (len(x_P) + len(self.selection_S))

    def interval(self, differences_S: ArrayLike, alpha: float = 0.05) -> Interval:
        """The two-sided interval of the mean difference, adjusted: mean over S of (D − γ X) + γ · mean over P of X.

        Given the slope these are two independent samples with different variances, so t is Welch's. Its degrees of
        freedom are the smaller of S − 1 and P − 1, with which the error rate is at most alpha for normal noise whatever
        the two variances are (Mickey and Brown 1966). The interval's ``sd`` is √S · its standard error, comparable with
        the sd of plain differences.

        Args:
            differences_S: (S,), arm − baseline on the report split, in the order of ``selection_S``; S ≥ 2.
            alpha: error rate; the level of the interval is 1 − alpha.
        """
        differences_S, slope = np.asarray(differences_S, np.float64), self.slope
        adjusted_S, n, p = differences_S - slope * self.selection_S, len(self.selection_S), len(self.selection_P)
        mean = float(adjusted_S.mean() + slope * self.selection_P.mean())
        of_report, of_control = float(adjusted_S.var(ddof=1)) / n, slope**2 * float(self.selection_P.var(ddof=1)) / p
        error = math.sqrt(of_report + of_control)
        if error == 0:
            return Interval(mean, 0.0, n, mean, mean, 1.0)
        df = min(n, p) - 1
        half = float(special.stdtrit(df, 1 - alpha / 2)) * error
        return Interval(
            mean, math.sqrt(n) * error, n, mean - half, mean + half, float(2 * special.stdtr(df, -abs(mean) / error))
        )


def control_runs(folder: AblationFolder, taken: set[int]) -> dict[str, ControlRuns]:
    """Arm -> its runs in the finished ablation in ``folder``, to be recorded at the launch of another.

    Args:
        taken: seeds of the ablation that is launched.

    Raises:
        ConfigError: if there is no finished ablation, if it opened the report split, or if seeds are used twice.
    """
    path, record = "protocol.control_variate", folder.record()
    do = "Run `workbench pilot` with this file first, and name its ablation."
    require(folder.is_finished, path, got=f"{folder.name}, which is not finished", expected="a finished pilot", do=do)
    split = record.config.confirmation.split
    require(split != "report", path, got=f"{folder.name}, measured on the report split", expected="a pilot", do=do)
    shared = sorted(taken & set(record.config.confirmation.seeds))
    require(not shared, path, got=f"seeds {shared} in both ablations", expected="other seeds in the pilot")
    runs: dict[str, dict[str, Any]] = {}
    for run in folder.run_folders(Stage.CONFIRMATION):
        about, result = run.record(), run.result()
        if "report_value" not in result:
            continue
        fields = runs.setdefault(
            about.arm, {"setting": _setting(about.config), "data": about.data, "selection": {}, "measured": {}}
        )
        fields["selection"][about.seed] = result["selection_value"]
        fields["measured"][about.seed] = result["report_value"]
    found = {arm: ControlRuns(**fields) for arm, fields in runs.items()}
    baseline = found.get(record.order[0])
    usable = [
        arm for arm in record.order[1:] if baseline and arm in found and len(_paired(baseline, found[arm])) >= MIN_RUNS
    ]
    if not usable:
        raise ConfigError.at(
            path, got=f"{folder.name}", expected=f"an arm and the baseline on {MIN_RUNS} shared seeds or more", do=do
        )
    return found


def same_setting(runs: ControlRuns, run: RunFolder) -> bool:
    """Whether a run has the configuration, seeds aside, and the data of earlier ``runs``."""
    record = run.record()
    return runs.data == record.data and runs.setting == _setting(record.config)


def control_variate(
    baseline: ControlRuns, arm: ControlRuns, selection: Mapping[int, float], base_selection: Mapping[int, float]
) -> ControlVariate | None:
    """The control variate of an arm; None if the earlier runs share too few seeds.

    Args:
        baseline, arm: earlier runs of both.
        selection, base_selection: seed -> selection value of the report runs, in the order of the report seeds.
    """
    seeds = _paired(baseline, arm)
    if len(seeds) < MIN_RUNS or len(selection) < 2:
        return None
    return ControlVariate(
        np.array([value - base_selection[seed] for seed, value in selection.items()]),
        np.array([arm.selection[seed] - baseline.selection[seed] for seed in seeds]),
        np.array([arm.measured[seed] - baseline.measured[seed] for seed in seeds]),
    )


def _setting(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in ("seed", "seeds")}


def _paired(baseline: ControlRuns, arm: ControlRuns) -> list[int]:
    return sorted(set(baseline.selection) & set(arm.selection))
