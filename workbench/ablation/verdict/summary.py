"""The short form of a verdict: a headline, a badge per arm, and what to run next.

It is data. The terminal, notebooks, the dashboard and the report show the same sentences.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from workbench.ablation.estimate import RunTimes
from workbench.ablation.folder import AblationFolder, LaunchRecord
from workbench.ablation.spec.protocol import FEW_SEEDS
from workbench.ablation.verdict import wording
from workbench.ablation.verdict.effort import NO_CLAIM
from workbench.ablation.verdict.statistics import (
    MIN_SEEDS,
    POWER,
    detectable_difference,
    seeds_for_equivalence,
    seeds_needed,
)
from workbench.ablation.verdict.verdict import ArmVerdict, Verdict
from workbench.config import expand_dotted
from workbench.formatting import MINUS, count, duration
from workbench.status import Stage

__all__ = ["Badge", "Launched", "NextStep", "Summary", "deciding_interval", "summarise"]

MAX_NAMES = 3
"""A headline names at most so many arms of one word, and counts more."""
MAX_SEEDS = 30
"""Above this, more seeds are not what to run next."""
LONGER = 4
"""Factor of training tokens of the suggested longer run."""


@dataclass(frozen=True)
class Badge:
    """An arm and its word."""

    arm: str
    word: str
    """One of :data:`workbench.ablation.verdict.verdict.WORDS`."""
    value: str
    """The difference to the baseline; of the baseline its value with its unit."""


@dataclass(frozen=True)
class NextStep:
    """Something to run, or to look at."""

    text: str
    command: str = ""
    """For a shell; empty where there is nothing to run."""


@dataclass(frozen=True)
class Summary:
    """A verdict in short."""

    headline: str
    badges: tuple[Badge, ...]
    caution: str
    """Why the verdict is exploratory, or makes no claim about architectures; empty if neither."""
    steps: tuple[NextStep, ...]
    failed: bool
    """Whether no arm could be compared with the baseline because runs failed."""

    def __str__(self) -> str:
        lines = [self.headline, *([self.caution] if self.caution else []), ""]
        arms, words = (max(map(len, column)) for column in zip(*((b.arm, b.word) for b in self.badges)))
        lines += [f"  {badge.arm:<{arms}}  {badge.word:<{words}}  {badge.value}".rstrip() for badge in self.badges]
        if self.steps:
            lines += ["", "Next:"]
        for step in self.steps:
            lines += [f"- {step.text}", *([f"  {step.command}"] if step.command else [])]
        return "\n".join(lines)


@dataclass(frozen=True)
class Launched:
    """What of a launched ablation decides what can be run next."""

    folder: str
    """As a command names it."""
    name: str
    seeds: tuple[int, ...]
    effect: float | None
    """Smallest difference of interest."""
    tokens: int | None
    """Training tokens of a run, where they are one field for all arms."""
    tokens_per_seed: int
    """Training tokens of one seed of every arm."""
    seconds_per_seed: float | None
    """Their wall time on one worker; None if it is unknown."""
    obstacle: str
    """Why no seeds can be added; empty if they can."""
    anytime: bool
    """Whether its design may add seeds without becoming exploratory."""

    @classmethod
    def of(cls, folder: AblationFolder, record: LaunchRecord) -> Self:
        """That of the ablation in ``folder``."""
        config = record.config
        stopping = config.protocol.stopping
        base, *changes = (expand_dotted(part).get("training", {}) for part in (config.base, *config.arms.values()))
        one_field = not any("tokens" in change for change in changes) and "training.tokens" not in config.budget.free
        times = RunTimes(folder.runs(), record.cost)
        seconds = [times.of(arm, Stage.CONFIRMATION) for arm in record.order]
        obstacle = "an archive" if folder.is_archived else "a group-sequential design" if stopping.looks else ""
        obstacle = obstacle or ("a study of noise components" if config.confirmation.components else "")
        path = folder.path.resolve()
        return cls(
            folder=str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path),
            name=config.name,
            seeds=config.confirmation.seeds,
            effect=config.protocol.effect,
            tokens=base.get("tokens") if one_field else None,
            tokens_per_seed=sum(row.get("tokens") or 0 for row in record.cost),
            seconds_per_seed=None if None in seconds or not seconds else sum(filter(None, seconds)),
            obstacle=obstacle,
            anytime=stopping.anytime,
        )


def summarise(verdict: Verdict, launched: Launched | None = None) -> Summary:
    """The verdict in short.

    Args:
        verdict: with at least one row.
        launched: the ablation; without it there are no commands and no number of seeds to add.
    """
    baseline, *arms = verdict.rows
    return Summary(
        headline=_headline(verdict, baseline, arms),
        badges=tuple(_badge(row, verdict.unit) for row in verdict.rows),
        caution=_caution(verdict),
        steps=tuple(_steps(verdict, arms, launched)),
        failed=baseline.value is None or (bool(arms) and all(row.difference is None for row in arms)),
    )


def deciding_interval(row: ArmVerdict) -> tuple[float | None, float | None]:
    """The interval that agrees with the word about an arm: the simultaneous one; where there is none (another metric
    than the primary one, archives of earlier versions), that over all looks, else that of one comparison."""
    for low, high in (
        (row.simultaneous_low, row.simultaneous_high),
        (row.repeated_low, row.repeated_high),
        (row.low, row.high),
    ):
        if low is not None or high is not None:
            return low, high
    return None, None


# -- headline --------------------------------------------------------------------------------------------------------


def _headline(verdict: Verdict, baseline: ArmVerdict, arms: Sequence[ArmVerdict]) -> str:
    """The outcome in one sentence."""
    if all(row.value is None for row in verdict.rows):
        return "Every run failed: no arm was measured."
    if baseline.value is None:
        return f"The baseline, {baseline.arm}, failed on every seed: no arm can be judged."
    if not arms:
        value = f"{baseline.value:.{wording.decimals(baseline.value_sd)}f} {_unit(verdict)}"
        return f"{baseline.arm} has {value}; there is no second arm to compare."
    if all(row.difference is None for row in arms):
        return f"{_named(arms)} failed on every seed: nothing can be compared with {baseline.arm}."
    by_word = {word: [row for row in arms if row.verdict == word] for word in ("better", "worse")}
    none_better = by_word["worse"] and not by_word["better"] and len(arms) > 1
    clauses: list[str] = []
    for word, rows in by_word.items():
        if rows:
            than = "" if none_better else f" than {verdict.baseline}"
            clauses.append(_claim(word, rows, verdict, than, is_first=not clauses))
    if equivalent := [row for row in arms if row.verdict == "equivalent"]:
        to = "" if clauses else f" to {verdict.baseline}"
        clauses.append(
            f"{_named(equivalent)} {_is(equivalent)} equivalent{to} within ±{verdict.margin:g} {_unit(verdict)}"
        )
    if undecided := [row for row in arms if row.verdict == "undecided"]:
        clauses.append(_undecided(undecided, verdict, is_first=not clauses))
    if failed := [row for row in arms if row.verdict == "failed"]:
        clauses.append(f"{_named(failed)} failed")
    lead = f"No arm is better than {verdict.baseline}: " if none_better else ""
    return f"{lead}{'; '.join(clauses)}."


def _claim(word: str, rows: Sequence[ArmVerdict], verdict: Verdict, than: str, is_first: bool) -> str:
    """ "kda is better than gdn by 0.02 bits per byte (95 % interval 0.01 to 0.03, p = 0.01, 5 paired seeds)"."""
    if not is_first:
        return f"{_named(rows)} {_is(rows)} {word}"
    most = max(rows, key=lambda row: abs(row.difference or 0.0))
    amount, interval = _amount(most, verdict)
    which = f", {most.arm} most, by" if len(rows) > 1 else " by"
    return f"{_named(rows)} {_is(rows)} {word}{than}{which} {amount}{interval}"


def _amount(row: ArmVerdict, verdict: Verdict) -> tuple[str, str]:
    """The size of a difference, and in brackets how certain it is: of a claim the interval of this comparison and the p
    that decides, otherwise the interval that decides."""
    assert row.difference is not None
    claimed = row.verdict in ("better", "worse")
    single = (row.low, row.high) if row.level is None else (row.repeated_low, row.repeated_high)
    low, high = single if claimed else deciding_interval(row)
    places = wording.decimals(None if low is None or high is None else (high - low) / 2, row.difference)
    over = len(verdict.pairs) or len(verdict.rows) - 1
    together = f" over all {over} comparisons" if over > 1 else ""
    certain = []
    if low is not None and high is not None:
        sign = -1 if row.verdict == "better" else 1
        span = wording.interval_text(min(sign * low, sign * high), max(sign * low, sign * high), places)
        all_hold = together if not claimed and row.simultaneous_low is not None else ""
        certain.append(f"{wording.percent(1 - verdict.alpha)} interval{all_hold} {span}")
    if claimed and row.p_holm is not None:
        certain.append(f"p {wording.equals(row.p_holm)}{together}")
    certain.append(f"{row.seeds} paired seed{'s' * (row.seeds != 1)}")
    shown = f"{abs(row.difference):.{places}f}" if claimed else f"{row.difference:+z.{places}f}"
    return f"{shown} {_unit(verdict)}", f" ({', '.join(certain)})"


def _undecided(rows: Sequence[ArmVerdict], verdict: Verdict, is_first: bool) -> str:
    """What was not shown, and what could have been."""
    seeds = min(row.seeds for row in rows)
    if not is_first:
        return f"{_named(rows)} {_is(rows)} undecided"
    if seeds < MIN_SEEDS:
        few = f"{seeds} paired seed{'s' * (seeds != 1)}"
        what = f"{rows[0].arm} against {verdict.baseline}" if len(rows) == 1 else f"{len(rows)} arms"
        return f"Too few seeds to decide about {what}: {few}, and at least {MIN_SEEDS} are needed"
    able = max((row.detectable or 0.0 for row in rows), default=0.0)
    could = f"; {seeds} seeds could have shown {able:.{wording.decimals(able)}f} or more" if able else ""
    if len(rows) > 1:
        return f"No difference to {verdict.baseline} was shown for {_named(rows)}{could}"
    amount, interval = _amount(rows[0], verdict)
    return f"No difference between {rows[0].arm} and {verdict.baseline} was shown: {amount}{interval}{could}"


def _named(rows: Sequence[ArmVerdict]) -> str:
    names = [row.arm for row in rows]
    if len(names) > MAX_NAMES:
        return f"{len(names)} arms"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _is(rows: Sequence[ArmVerdict]) -> str:
    return "is" if len(rows) == 1 else "are"


def _unit(verdict: Verdict) -> str:
    return verdict.unit if " per " in verdict.unit else f"in {verdict.unit}"


def _badge(row: ArmVerdict, unit: str) -> Badge:
    if row.difference is None:
        value = "" if row.value is None else f"{row.value:.{wording.decimals(row.value_sd)}f} {unit}"
        return Badge(row.arm, row.verdict, value)
    half = None if row.low is None or row.high is None else (row.high - row.low) / 2
    places = wording.decimals(half, row.difference)
    return Badge(row.arm, row.verdict, f"{row.difference:+z.{places}f}".replace("-", MINUS))


def _caution(verdict: Verdict) -> str:
    """The reasons for which less is claimed."""
    if verdict.exploratory:
        return f"Exploratory: {verdict.exploratory}."
    if verdict.rows[0].value is None:  # nothing holds
        return ""
    limited = [row for row in verdict.rows if any(text.startswith(NO_CLAIM) for text in row.reservations)]
    if not limited:
        return ""
    whom = "" if len(limited) == len(verdict.rows) - 1 else f" for {_named(limited)}"
    return f"This holds for the chosen settings; no claim about the architectures{whom} (see the details)."


# -- next steps ------------------------------------------------------------------------------------------------------


def _steps(verdict: Verdict, arms: Sequence[ArmVerdict], launched: Launched | None) -> list[NextStep]:
    steps = []
    lost = sum(row.failed for row in verdict.rows)
    if lost:
        total = lost + sum(row.seeds for row in verdict.rows)
        steps.append(
            NextStep(
                f"{lost} of {total} confirmation runs failed; the panel Failures and workbench table --runs list the "
                "reasons. Where the configuration is the cause, such as a learning rate, change it under a new name."
            )
        )
    if launched is None or verdict.rows[0].value is None:
        return steps
    undecided = [row for row in arms if row.verdict == "undecided"]
    if undecided and (wanted := _wanted(undecided, verdict, launched)):
        steps += wanted
    elif arms and not lost and not undecided:
        steps += _longer(launched)
    return steps


def _wanted(rows: Sequence[ArmVerdict], verdict: Verdict, launched: Launched) -> list[NextStep]:
    """How many seeds would decide what is undecided."""
    now = min(row.seeds for row in rows)
    if now < FEW_SEEDS:  # no number of seeds is planned from the sd of so few values
        claimed = f"differences are claimed from {MIN_SEEDS} paired seeds on, and " if now < MIN_SEEDS else ""
        why = f"{claimed}the noise of fewer than {FEW_SEEDS} is too uncertain to plan by"
        return _more(FEW_SEEDS, now, why, launched)
    family = max(1, len(verdict.pairs) or len(verdict.rows) - 1)
    level = verdict.alpha / family
    noises = [
        row.detectable / detectable_difference(row.seeds, level, POWER)
        for row in rows
        if row.detectable is not None and row.level is None
    ]
    if not noises:
        return []
    sd, unit = max(noises), _unit(verdict)
    if launched.effect is not None:
        needed = seeds_needed(launched.effect / sd, level, POWER)
        what = f"a difference of {launched.effect:g} {unit} (the smallest of interest)"
    elif verdict.margin is not None:
        needed = seeds_for_equivalence(verdict.margin / sd, level, POWER)
        what = f"equivalence within ±{verdict.margin:g} {unit} (if there is no difference)"
    else:
        needed = 2 * now
        able = sd * detectable_difference(needed, level, POWER)
        what = f"a difference of {able:.{wording.decimals(able)}f} {unit}"
    if needed > MAX_SEEDS:
        seeds = "more than 1,000" if needed > wording.MANY_SEEDS else needed
        lower = "Lower the noise instead: more training tokens, more report documents, or protocol.control_variate."
        return [NextStep(f"Showing {what} would take {seeds} seeds. {lower}")]
    if needed <= now:
        return []
    power = f"{wording.percent(POWER)} power if the noise is as measured"
    return _more(needed, now, f"they show {what} with {power}", launched)


def _more(needed: int, now: int, why: str, launched: Launched) -> list[NextStep]:
    """Further seeds for the same ablation, or a new one with as many."""
    extra, first = needed - now, max(launched.seeds) + 1
    steps = []
    if not launched.obstacle:
        command = f"workbench extend {shlex.quote(launched.folder)} --seeds +{extra}"
        text = f"Run {extra} more seed{'s' * (extra > 1)} per arm, {needed} in all: {why}. {_price(extra, launched)}"
        if not launched.anytime:
            command += " --why 'undecided at the declared seeds'"
            text += " The design did not declare them, so the verdict becomes exploratory."
        steps.append(NextStep(text, command))
    if launched.obstacle or not launched.anytime:
        seeds = ",".join(map(str, range(first, first + needed)))
        command = _new_run(launched, f"{launched.name}-{needed}-seeds", f"confirmation.seeds=[{seeds}]")
        new = f"{needed} new seeds under a new name"
        if launched.obstacle:
            text = f"Run {new}, since {launched.obstacle} takes no more: {why}. {_price(needed, launched)}"
        else:
            text = f"Or, as a confirmation, run {new}. {_price(needed, launched)}"
        steps.append(NextStep(text, command))
    return steps


def _price(seeds: int, launched: Launched) -> str:
    """What so many seeds of every arm cost."""
    seconds = launched.seconds_per_seed
    time = f", about {duration(seconds * seeds)} on one worker" if seconds else ""
    return f"Cost: {count(launched.tokens_per_seed * seeds)} training tokens{time}."


def _longer(launched: Launched) -> list[NextStep]:
    """A decided question, asked again at a longer training."""
    if not launched.tokens:
        return []
    tokens = LONGER * launched.tokens
    first = max(launched.seeds) + 1
    seeds = ",".join(map(str, range(first, first + len(launched.seeds))))
    command = _new_run(
        launched,
        f"{launched.name}-{LONGER}x",
        f"base.training.tokens={tokens}",
        f"confirmation.seeds=[{seeds}]",
    )
    text = (
        f"Decided: no more seeds needed. Whether it holds after {LONGER} times the training ({count(tokens)} tokens "
        "a run) takes new seeds under a new name."
    )
    return [NextStep(text, command)]


def _new_run(launched: Launched, name: str, *overrides: str) -> str:
    return shlex.join(["workbench", "run", launched.folder, f"name={name}", *overrides])
