"""How often `workbench propose` keeps a change that improves the model, and one that changes nothing.

    python benchmarks/propose.py --repetitions 20        # writes results/calibration/propose.json

The *improvement* is the learning rate of the file, proposed against one that is too small; the *null* is twice as many
micro-batches of half the size, which changes rounding alone, so that differences have the mean zero. Each repetition
has seeds of its own and an empty ledger. The default design promises that a null is kept with a probability of at most
alpha / 2, and decided as better or worse with at most alpha.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from common import ROOT, write_report
from scipy.stats import binomtest

from workbench.api.answers import plain
from workbench.api.proposals import create, decide, prepare
from workbench.config import apply_overrides
from workbench.files import write_json

SLOW = "training.learning_rate=2e-3"
CASES = {
    "improvement": ([SLOW], ["training.learning_rate=5e-3"]),
    "null": ([], ["training.batch_size=2", "training.accumulate=2"]),
}
"""Case -> fields of the baseline, the change."""
SMALL = [
    "model={width: 32, depth: 2, vocabulary: 300, pattern: full}",
    "data={corpus: {kind: stdlib, limit_bytes: 2_000_000}, evaluation_documents: 32, evaluation_bytes: 2048}",
    "training={tokens: 32_000, batch_size: 4, context: 128, evaluations: 1, learning_rate: 5e-3}",
]
FIELDS = ["launch={measure: false}"]


def repetition(case: str, number: int, folder: Path, overrides: list[str], looks: list[int]) -> dict[str, Any]:
    """One proposal with seeds of its own."""
    fields, change = CASES[case]
    file = folder / f"{case}.yaml"
    write_json(file, apply_overrides(apply_overrides({}, [*SMALL, *overrides]), fields))
    first = 10_000 + 100 * number
    seeds = list(range(first, first + max(looks)))
    results = folder / f"{case}-{number}"
    results.mkdir()
    (results / "cache").symlink_to(_cache(folder), target_is_directory=True)  # the text is prepared once
    start = time.monotonic()
    run = create(prepare(change, file, results, fields=FIELDS, looks=looks, seeds=seeds))
    run.start_workers()
    run.wait()
    found = decide(run)
    numbers = {name: getattr(found, name) for name in ("decision", "word", "difference", "low", "high", "p", "looks")}
    return {"case": case, "number": number, "seconds": time.monotonic() - start, **plain(numbers)}


def _cache(folder: Path) -> Path:
    path = folder / "cache"
    path.mkdir(exist_ok=True)
    return path


def rate(count: int, total: int) -> dict[str, Any]:
    """A share with its exact 95 % interval."""
    interval = binomtest(count, total).proportion_ci(0.95, "exact")
    return {"count": count, "of": total, "rate": count / total, "low": interval.low, "high": interval.high}


def summary(rows: list[dict[str, Any]], alpha: float = 0.05) -> dict[str, Any]:
    """Rates of every case, beside what is promised."""
    cases = {}
    for case in CASES:
        mine = [row for row in rows if row["case"] == case]
        if not mine:
            continue
        counts, words = (Counter(row[name] for row in mine) for name in ("decision", "word"))
        cases[case] = {
            **{decision: rate(counts[decision], len(mine)) for decision in ("keep", "discard", "undecided")},
            "shown different": rate(words["better"] + words["worse"], len(mine)),
            "mean seeds": sum(max(row["looks"], default=0) for row in mine) / len(mine),
        }
    promised = {"null kept, at most": alpha / 2, "null shown different, at most": alpha}
    return {"promised": promised, "cases": cases, "runs": rows}


def main(
    overrides: Annotated[list[str] | None, typer.Argument(help="Fields of the run.")] = None,
    repetitions: Annotated[int, typer.Option(help="Of each case.")] = 20,
    looks: Annotated[str, typer.Option(help="Paired seeds at the looks.")] = "4,6,8",
    out: Annotated[Path, typer.Option(help="Where the numbers go.")] = ROOT / "results/calibration/propose.json",
) -> None:
    """Repeat both proposals and count the decisions."""
    started, rows = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(repetitions):
            for case in CASES:
                row = repetition(case, number, Path(scratch), overrides or [], [int(n) for n in looks.split(",")])
                rows.append(row)
                print(f"{case} {number}: {row['decision']} ({row['word']}), {row['seconds']:.0f} s", flush=True)
                write_report(out, {"looks": looks, "fields": [*SMALL, *(overrides or [])], **summary(rows)}, started)
    print(out)


if __name__ == "__main__":
    typer.run(main)
