"""What a reader of a verdict must know beside its numbers: declaration, deviations, look, code, runs that were run
again; and which of these make the verdict exploratory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import polars as pl

from workbench.ablation.folder import AblationFolder, LaunchRecord
from workbench.ablation.looks import Look, look_of
from workbench.ablation.spec.registration import describe
from workbench.ablation.verdict.circumstances import circumstances
from workbench.ablation.verdict.verdict import Verdict
from workbench.environment import same_code
from workbench.results.data_card import repetition
from workbench.results.tables import failed_suites
from workbench.status import Stage

__all__ = ["Disclosure", "disclose", "relabelled"]


@dataclass(frozen=True)
class Disclosure:
    """Sentences for the head of a verdict."""

    sentences: tuple[str, ...]
    reasons: tuple[str, ...]
    """Why the verdict is exploratory; empty if it is a confirmation."""
    look: Look | None
    """The look that the ablation takes; None if looks were not counted."""

    @property
    def exploratory(self) -> str | None:
        """The reasons in one line."""
        return "; ".join(self.reasons) or None


def disclose(folder: AblationFolder, record: LaunchRecord) -> Disclosure:
    """The disclosure of an ablation with the runs so far."""
    config = record.config
    reasons = [config.exploratory, config.budget.allow_mismatch]
    if config.confirmation.split != "report":
        reasons.append(f"measured on the {config.confirmation.split} split")
    for field, text in (("allow_overlap", "measured data mostly seen in training"), ("allow_lossy", "lossy tokenizer")):
        stated = dict.fromkeys(card.get(field) for card in record.data_cards.values())
        reasons += [f"{text}: {reason}" for reason in stated if reason]
    deviations = record.all_deviations()
    reasons += [f"deviation: {deviation.why}" for deviation in deviations if not deviation.planned]
    sentences = list(describe(record.registration, deviations))
    look = look_of(folder, record)
    if look:
        sentences += look.sentences(config.alpha)
        reasons += look.exploratory
    elif config.confirmation.split == "report" and (folder.is_archived or not record.launch):
        sentences.append("Looks at these report documents were not counted.")
    runs = folder.runs()
    confirmed = runs.filter(pl.col("stage") == Stage.CONFIRMATION)
    code, changed = _code(confirmed, runs.filter(pl.col("stage") == Stage.TUNING))
    carried_out, cut_short = circumstances(runs)
    sentences += [*code, *_run_again(confirmed), *failed_suites(confirmed)]
    sentences += repetition({row["arm"]: row.get("epochs") for row in record.cost})
    sentences += carried_out
    reasons += [*changed, *cut_short]
    return Disclosure(tuple(sentences), tuple(reason for reason in reasons if reason), look)


def relabelled(verdict: Verdict, disclosure: Disclosure) -> Verdict:
    """An archived verdict with another disclosure."""
    old, new = (f"Exploratory ({why}): " if why else "" for why in (verdict.exploratory, disclosure.exploratory))

    def renamed(part: Verdict) -> Verdict:
        rows = tuple(replace(row, sentence=new + row.sentence.removeprefix(old)) for row in part.rows)
        secondary = tuple(map(renamed, part.secondary))
        return replace(part, rows=rows, exploratory=disclosure.exploratory, secondary=secondary)

    return replace(renamed(verdict), declared=disclosure.sentences)


def _code(confirmed: pl.DataFrame, tuned: pl.DataFrame) -> tuple[list[str], list[str]]:
    """Sentences about the code of the runs, and the reasons for which it makes the verdict exploratory."""
    codes = _versions(confirmed)
    if not codes:
        return [], []
    sentences, reasons = [], []
    if len(codes) > 1:
        runs = "; ".join(f"{code}: {', '.join(names)}" for code, names in codes.items())
        sentences.append(f"Deviation: confirmation runs were trained by different code ({runs}).")
        reasons.append("deviation: confirmation runs of different code")
    elif earlier := [code for code in _versions(tuned) if not same_code(code, next(iter(codes)))]:
        sentences.append(f"Tuned by other code than confirmed: {', '.join(earlier)}; confirmed by {next(iter(codes))}.")
    if dirty := [code for code in codes if "-dirty" in code]:
        sentences.append(f"Trained by code with uncommitted changes: {', '.join(dirty)}.")
    return sentences, reasons


def _versions(runs: pl.DataFrame) -> dict[str, list[str]]:
    """Version of the code -> runs that it trained, at least in part. Versions with equal sources are one."""
    versions: dict[str, list[str]] = {}
    for run, codes in runs.select("run", "code").drop_nulls().sort("run").iter_rows():
        for code in codes.split(" → "):
            name = next((known for known in versions if same_code(known, code)), code)
            versions.setdefault(name, []).append(run)
    return versions


def _run_again(confirmed: pl.DataFrame) -> list[str]:
    """A sentence about the runs that were run again, with their earlier outcomes."""
    again = confirmed.drop_nulls("earlier_outcomes").sort("run")
    outcomes = [
        f"seed {row['seed']} of {row['arm']} ({row['earlier_outcomes']}; then {row['status']})"
        for row in again.iter_rows(named=True)
    ]
    return [f"Run again after a failure: {', '.join(outcomes)}."] if outcomes else []
