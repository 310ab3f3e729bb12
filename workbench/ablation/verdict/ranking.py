"""The order of arms as far as a verdict shows one."""

from __future__ import annotations

from workbench.ablation.verdict.verdict import Verdict

__all__ = ["best_arms", "ranks"]


def ranks(verdict: Verdict) -> dict[str, int | None]:
    """Arm -> one more than the number of arms that are shown to be better; None for an arm that failed.

    Two arms are shown to differ where their own comparison says so, if all pairs were compared; else where one is
    better and the other worse than the baseline, or one is and the other is not. Arms that are not shown to differ tie.
    """
    words = {row.arm: row.verdict for row in verdict.rows}
    tiers = {"better": 0, "worse": 2}  # of all other words the difference to the baseline is not shown, or too small
    pairs = {(pair.arm, pair.reference): pair.verdict for pair in verdict.pairs}

    def is_better(one: str, other: str) -> bool:
        if (one, other) in pairs:
            return pairs[one, other] == "better"
        if (other, one) in pairs:
            return pairs[other, one] == "worse"
        return tiers.get(words[one], 1) < tiers.get(words[other], 1)

    ranked = [row.arm for row in verdict.rows if row.value is not None and row.verdict != "failed"]
    better = {arm: sum(is_better(other, arm) for other in ranked if other != arm) for arm in ranked}
    return {arm: better[arm] + 1 if arm in better else None for arm in words}


def best_arms(verdict: Verdict) -> set[str]:
    """The arms of the first rank; none where all arms tie, because then no difference is shown."""
    found = {arm: rank for arm, rank in ranks(verdict).items() if rank is not None}
    best = {arm for arm, rank in found.items() if rank == 1}
    return best if len(best) < len(found) else set()
