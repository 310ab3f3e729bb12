"""What a verdict states of how its runs were carried out: searches that the machine cut short, machines that differ."""

from __future__ import annotations

import polars as pl

from workbench.status import LOST, Stage, Status

__all__ = ["circumstances"]


def circumstances(runs: pl.DataFrame) -> tuple[list[str], list[str]]:
    """Sentences about how the runs of an ablation were carried out, and the reasons for which that makes the verdict
    exploratory.

    A tuning trial that the machine ended (killed, hung, or crashed in the end) makes the verdict exploratory: its arm
    was searched less than declared. One that diverged, was pruned or found no memory is a result of its setting.
    """
    confirmed = runs.filter(pl.col("stage") == Stage.CONFIRMATION)
    tuned = runs.filter((pl.col("stage") == Stage.TUNING) & pl.col("arm").is_in(confirmed["arm"].implode()))
    sentences, reasons = _machines(confirmed), []
    if lost := _lost_trials(tuned):
        sentences.append(f"Tuning trials that did not finish: {lost}; these arms were searched less than declared.")
        reasons.append(f"unequal tuning: {lost} did not finish")
    return sentences, reasons


def _lost_trials(tuned: pl.DataFrame) -> str:
    """How many tuning trials of each arm the machine ended; "" if none."""
    lost = tuned.filter(pl.col("status").is_in([*LOST, Status.CRASHED]))
    return "; ".join(
        f"{len(rows)} of {tuned.filter(pl.col('arm') == arm).height} of {arm} "
        f"({', '.join(sorted(set(rows['status'].to_list())))})"
        for (arm,), rows in sorted(lost.partition_by("arm", as_dict=True).items())
    )


def _machines(confirmed: pl.DataFrame) -> list[str]:
    """On what the confirmation runs were trained, where that differs between them."""
    known = confirmed.drop_nulls("machine")
    if known["machine"].n_unique() < 2:
        return []
    parts = [
        f"{machine}: {', '.join(sorted(rows['run']))}"
        for (machine,), rows in sorted(known.partition_by("machine", as_dict=True).items())
    ]
    return [f"Confirmation runs were trained on different machines ({'; '.join(parts)})."]
