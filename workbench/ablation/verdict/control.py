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

from workbench.ablation.folder import AblationFolder, ControlRuns, LaunchRecord
from workbench.ablation.verdict.hypotheses import TTest
from workbench.ablation.verdict.statistics import Floats
from workbench.config import ConfigError, require
from workbench.results.store import RunFolder
from workbench.status import Stage

__all__ = [
    "MIN_RUNS",
    "AdjustedTTest",
    "ControlVariate",
    "control_runs",
    "control_variate",
    "control_variates",
    "sentences",
]

MIN_RUNS = 4
"""Paired seeds that the earlier ablation needs; from fewer the slope is hardly known."""


@dataclass(frozen=True, eq=False)
class ControlVariate:
    """Paired selection differences of one arm, arm − baseline."""

    selection: Mapping[int, float]
    """Report seed -> selection difference."""
    selection_P: Floats
    """(P,), of the earlier seeds."""
    measured_P: Floats
    """(P,), the differences that the earlier ablation measured: they give the slope."""

    def slope(self, seeds: int) -> float:
        """Factor γ of the adjustment: β · P / (S + P), β from a least-squares line through the earlier runs.

        Any γ that does not depend on the report seeds leaves the estimate unbiased; this one has the least variance if
        the split that the earlier ablation measured is like the report split.

        Args:
            seeds: report seeds S.
        """
        x_P = self.selection_P - self.selection_P.mean()
        if not np.ptp(self.selection_P):
            return 0.0
        beta = float(x_P @ self.measured_P / (x_P @ x_P))
        return beta * len(x_P) / (len(x_P) + seeds)

    def estimate(self, differences: Mapping[int, float]) -> tuple[float, float, int]:
        """The adjusted mean difference, mean over S of (D − γ X) + γ · mean over P of X, with its standard error and
        degrees of freedom.

        Given the slope these are two independent samples with different variances, so the error is Welch's. With the
        smaller of S − 1 and P − 1 degrees of freedom the error rate of t is at most its level for normal noise whatever
        the two variances are (Mickey and Brown 1966).

        Args:
            differences: report seed -> arm − baseline on the report split, at least two.
        """
        n, earlier = len(differences), len(self.selection_P)
        slope = self.slope(n)
        adjusted_S = np.array([value - slope * self.selection[seed] for seed, value in differences.items()])
        variance = adjusted_S.var(ddof=1) / n + slope**2 * self.selection_P.var(ddof=1) / earlier
        mean = float(adjusted_S.mean() + slope * self.selection_P.mean())
        return mean, math.sqrt(variance), min(n, earlier) - 1 if slope else n - 1


class AdjustedTTest(TTest):
    """The t-test of a difference that a control variate adjusts.

    Args:
        differences: report seed -> arm − baseline.
        control: of the arm.
    """

    def __init__(self, differences: Mapping[int, float], control: ControlVariate):
        super().__init__(list(differences.values()))
        if self.decides:
            self.mean, self.error, self.df = control.estimate(differences)


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


def control_variates(record: LaunchRecord, runs: Mapping[str, Mapping[int, RunFolder]]) -> dict[str, ControlVariate]:
    """Arm -> its control variate, of arms whose setting and data, like the baseline's, are those of the earlier runs.

    Args:
        runs: arm -> report seed -> its finished run.
    """
    earlier, (baseline, *arms) = record.control, record.order
    same = {arm for arm in earlier if runs.get(arm) and all(_matches(earlier[arm], run) for run in runs[arm].values())}
    if baseline not in same:
        return {}
    selection = {arm: {seed: run.result()["selection_value"] for seed, run in runs[arm].items()} for arm in same}
    found = {
        arm: control_variate(earlier[baseline], earlier[arm], selection[arm], selection[baseline])
        for arm in arms
        if arm in same
    }
    return {arm: control for arm, control in found.items() if control is not None}


def sentences(record: LaunchRecord, controls: Mapping[str, ControlVariate | None]) -> list[str]:
    """Which arms a declared control variate adjusts, for the head of a verdict."""
    name, lines = record.config.protocol.control_variate, []
    for arm in record.order[1:] if name is not None else ():
        if control := controls.get(arm):
            pairs = len(control.selection_P)
            lines.append(f"{arm}: adjusted by the selection differences of {pairs} earlier pairs of runs ({name}).")
        else:
            lines.append(
                f"{arm}: not adjusted, since {name} has no {MIN_RUNS} pairs of runs at the confirmed settings."
            )
    return lines


def control_variate(
    baseline: ControlRuns, arm: ControlRuns, selection: Mapping[int, float], base_selection: Mapping[int, float]
) -> ControlVariate | None:
    """The control variate of an arm; None if the earlier runs share too few seeds.

    Args:
        baseline, arm: earlier runs of both.
        selection, base_selection: report seed -> selection value.
    """
    seeds = _paired(baseline, arm)
    if len(seeds) < MIN_RUNS:
        return None
    return ControlVariate(
        {seed: value - base_selection[seed] for seed, value in selection.items() if seed in base_selection},
        np.array([arm.selection[seed] - baseline.selection[seed] for seed in seeds]),
        np.array([arm.measured[seed] - baseline.measured[seed] for seed in seeds]),
    )


def _matches(earlier: ControlRuns, run: RunFolder) -> bool:
    record = run.record()
    return earlier.data == record.data and earlier.setting == _setting(record.config)


def _setting(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in ("seed", "seeds")}


def _paired(baseline: ControlRuns, arm: ControlRuns) -> list[int]:
    return sorted(set(baseline.selection) & set(arm.selection))
