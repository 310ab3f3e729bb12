"""How well each arm was tuned, and what that allows a verdict to claim.

A verdict compares settings. It extends to the architectures, as tuned in their spaces, only where another search would
hardly have found better settings. The rule is ours; for the baseline and for the arm alike:

- something was tuned, and every tuned field was tried at three values or more, with three finished trials a field;
- no chosen value is at the edge of what was tried (:func:`workbench.ablation.search.optimum.edges`);
- the choice rests on three tuning seeds or more (``tuning.repeats``), so that it is not the luck of one;
- the tuning gap, the fitted value of the chosen setting above the arm's fitted optimum, is known and the upper end of
  its interval is at most the smallest difference of interest; where none is declared, the setting is interpolated.

Otherwise the row of the verdict carries a reservation. The tuning gaps are stated beside it: a difference of their size
may be one of tuning. benchmarks/tuning_claims.py measures how often a claim that the rule allows is false.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from workbench.ablation.folder import AblationFolder, LaunchRecord
from workbench.ablation.search.optimum import Edge, Gap, Setting, best, edges, fit_surface, gather
from workbench.formatting import distinct_ends
from workbench.status import Stage, Status

__all__ = ["NO_CLAIM", "Effort", "efforts", "reservations"]

MIN_VALUES = 3
"""Values of each field, and finished trials per field, from which on a claim may extend to an architecture."""
MIN_SEEDS = 3
"""Tuning seeds from which on it may."""
NO_CLAIM = "No claim about the architectures"
"""How the reservation begins that keeps a claim from extending to them."""


@dataclass(frozen=True)
class Effort:
    """The search of one arm and its outcome."""

    arm: str
    setting: Mapping[str, Any]
    """The chosen values, by dotted field; empty if nothing was tuned."""
    values: Mapping[str, int]
    """Field -> different values among finished trials."""
    trials: int
    """Different settings whose trial finished."""
    seeds: int
    """Tuning seeds that the choice rests on."""
    interpolated: bool
    edges: tuple[Edge, ...]
    gap: Gap | None
    """None where the trials do not determine a fit."""

    def limits(self, effect: float | None) -> list[str]:
        """Why a verdict about the arm's setting does not extend to its architecture, the number of tuning seeds aside;
        empty if it does.

        Args:
            effect: smallest difference of interest.
        """
        if not self.setting:
            return [f"{self.arm} was not tuned"]
        found = [f"{self.arm} at {edge}" for edge in self.edges]
        ends = distinct_ends([name.split(".") for name in self.values], ".")
        few = [name.replace("_", " ") for name, count in zip(ends, self.values.values()) if count < MIN_VALUES]
        if few:
            found.append(f"{self.arm} with fewer than {MIN_VALUES} values of {', '.join(few)} tried")
        elif self.trials < MIN_VALUES * len(self.values):
            found.append(f"{self.arm} with {self.trials} trials for {len(self.values)} fields")
        gap = None if self.gap is None else self.gap.value if self.gap.high is None else self.gap.high
        if gap is None:
            found.append(f"{self.arm} with an unknown tuning gap")
        elif (effect is None and not self.interpolated) or (effect is not None and gap > effect):
            found.append(f"{self.arm} with a tuning gap of up to {gap:.3f}")
        return found


def efforts(folder: AblationFolder, record: LaunchRecord) -> dict[str, Effort]:
    """Arm -> its search, for arms with a chosen setting."""
    choices = folder.choices()
    runs = folder.runs().filter(pl.col("stage").is_in([Stage.TUNING, Stage.REPEAT]))
    found = {}
    for arm in record.order:
        choice = choices.get(arm)
        if choice is None or choice.failed is not None:
            continue
        settings = _settings(runs.filter(pl.col("arm") == arm))
        space = {name: choice for name, choice in record.space(arm).items() if name in choices[arm].hyperparameters}
        finished = [setting for setting in settings if any(map(math.isfinite, setting.values.values()))]
        near = best(settings, record.config.tuning.seeds[: choice.seeds])
        surface = None if near is None else fit_surface(settings, space, near)
        found[arm] = Effort(
            arm=arm,
            setting=choice.hyperparameters,
            values={name: len({repr(setting.hyperparameters.get(name)) for setting in finished}) for name in space},
            trials=len(finished),
            seeds=choice.seeds,
            interpolated=choice.interpolated,
            edges=tuple(edges(settings, space, choice.hyperparameters)),
            gap=None if surface is None else surface.gap(choice.hyperparameters),
        )
    return found


def _settings(runs: pl.DataFrame) -> list[Setting]:
    """The settings of one arm's trials and repeats, trials first."""
    observations = []
    for row in runs.sort("stage", "run", descending=[True, False]).iter_rows(named=True):
        value = row["selection_value"] if row["status"] == Status.DONE else math.inf
        if row["status"] in (Status.DONE, Status.DIVERGED, Status.PRUNED) and value is not None:
            observations.append((json.loads(row["hyperparameters"] or "{}"), row["seed"], value, row["run"]))
    return gather(observations)


def reservations(folder: AblationFolder, record: LaunchRecord) -> dict[str, list[str]]:
    """Arm, without the baseline -> sentences that limit the claim about it: what keeps it from being one about
    architectures, and the tuning gaps of the two settings."""
    found, unit = efforts(folder, record), record.metric.unit
    baseline = found.get(record.order[0])
    if baseline is None:
        return {}
    sentences: dict[str, list[str]] = {}
    for arm in record.order[1:]:
        if arm not in found:
            continue
        pair = baseline, found[arm]
        limits = [limit for effort in pair for limit in effort.limits(record.config.protocol.effect)]
        seeds = min((effort.seeds for effort in pair if effort.setting), default=MIN_SEEDS)
        if seeds < MIN_SEEDS:
            limits.append(f"settings chosen on {seeds} tuning seed{'s' * (seeds > 1)}")
        sentences[arm] = [f"{NO_CLAIM}: {'; '.join(limits)}."] if limits else []
        gaps = [f"{_span(effort.gap)} {unit} for {effort.arm}" for effort in pair if effort.gap is not None]
        if gaps:
            sentences[arm].append(f"Tuning gap, fitted on the selection split: about {', '.join(gaps)}.")
    return sentences


def _span(gap: Gap) -> str:
    span = "" if gap.low is None or gap.high is None else f" ({gap.low:.3f} to {gap.high:.3f})"
    return f"{gap.value:.3f}{span}"
