"""What a newcomer sees: the verdict of sweeps/quickstart.yaml over repetitions with fresh seeds, and the time it takes.

    python benchmarks/quickstart.py --repetitions 20        # writes results/calibration/quickstart.json

Every repetition has a tuning seed and confirmation seeds of its own. As many run at once as there are pairs of cores;
each sees two cores, as on a small laptop. A repetition decides something when at least one arm is better or worse, and
is honest about the rest when at least one is undecided or equivalent.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Annotated, Any

import typer
from common import ROOT, write_report

from workbench.ablation.ablation import Ablation
from workbench.ablation.run import AblationRun
from workbench.ablation.spec.ablation import AblationConfig

SWEEP = ROOT / "sweeps/quickstart.yaml"
CERTAIN, OPEN = {"better", "worse"}, {"undecided", "equivalent"}


def repetition(number: int, results: Path, cores: set[int], overrides: list[str]) -> dict[str, Any]:
    """Run the ablation once with seeds of its own on ``cores``; its words and numbers by arm."""
    seeds = len(AblationConfig.load(SWEEP, overrides).confirmation.seeds)
    first = 10_000 + 100 * number
    own = [f"confirmation.seeds={list(range(first, first + seeds))}", f"tuning.seed={first + 99}"]
    command = [sys.executable, "-m", "workbench", "run", str(SWEEP), *overrides, *own, "--results", str(results)]
    start = time.monotonic()
    log = results / "log.txt"
    with log.open("w") as output:
        subprocess.run(
            command,
            check=True,
            stdout=output,
            stderr=output,
            cwd=ROOT,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),  # of the child: workers and trials inherit it
        )
    seconds = time.monotonic() - start
    run = AblationRun(next(results.glob("*/ablation.json")).parent)
    verdict = run.verdict()
    assert verdict is not None
    fields = ("verdict", "difference", "low", "high", "rho")
    arms = {row.arm: {name: getattr(row, name) for name in fields} for row in verdict.rows[1:]}
    chosen = {arm: choice["hyperparameters"] for arm, choice in run.selection().items()}
    words = {row["verdict"] for row in arms.values()}
    return {
        "number": number,
        "arms": arms,
        "chosen": chosen,
        "seconds": seconds,
        "training_seconds": float(run.runs()["seconds"].sum()),
        "decides": bool(words & CERTAIN) and bool(words & OPEN),
    }


def main(
    overrides: Annotated[list[str] | None, typer.Argument(help="Fields of the sweep, as for `workbench run`.")] = None,
    repetitions: Annotated[int, typer.Option(help="Repetitions.")] = 20,
    cores: Annotated[int, typer.Option(help="Cores of a repetition.")] = 2,
    first: Annotated[int, typer.Option(help="Number of the first repetition; its seeds follow from it.")] = 0,
    out: Annotated[Path, typer.Option(help="Where the numbers go.")] = ROOT / "results/calibration/quickstart.json",
) -> None:
    """Repeat the quickstart and count the repetitions that end with a certain and an open answer."""
    usable = sorted(os.sched_getaffinity(0))
    free: Queue[set[int]] = Queue()
    for start in range(0, max(len(usable) - cores + 1, 1), cores):
        free.put(set(usable[start : start + cores]))
    finished: list[dict[str, Any]] = []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        begin = time.monotonic()
        Ablation.load(SWEEP, overrides or [], Path(scratch) / "prepared").create()  # the text is prepared once
        preparation = time.monotonic() - begin

        def repeat(number: int) -> dict[str, Any]:
            results, mine = Path(scratch) / str(number), free.get()
            try:
                shutil.copytree(Path(scratch) / "prepared/cache", results / "cache")
                result = repetition(number, results, mine, overrides or [])
            finally:
                free.put(mine)
            words = ", ".join(
                f"{arm} {row['verdict']} ({row['difference']:+.4f}, {row['low']:+.4f} to {row['high']:+.4f})"
                for arm, row in result["arms"].items()
            )
            print(f"{number}: {words}; {result['seconds']:.0f} s", flush=True)
            finished.append(result)
            summary = {
                "repetitions": len(finished),
                "decide": sum(row["decides"] for row in finished),
                "preparation_seconds": preparation,
                "overrides": overrides or [],
                "runs": sorted(finished, key=lambda row: row["number"]),
            }
            write_report(out, summary, started)  # after each, so that an interruption leaves what was measured
            return result

        with ThreadPoolExecutor(free.qsize()) as pool:
            list(pool.map(repeat, range(first, first + repetitions)))
    print(f"{sum(row['decides'] for row in finished)} of {len(finished)} end with a certain and an open answer: {out}")


if __name__ == "__main__":
    typer.run(main)
