"""How many trials of a small model a device trains best at a time, and how soon a trial trains.

    python benchmarks/trials_per_gpu.py                      # on a GPU: 1, 2, 4, 8 and 12 workers, about five minutes
    python benchmarks/trials_per_gpu.py --smoke              # on a CPU: whether it works at all

One ablation of one arm, every worker a process with trials of its own as `launch.workers` starts them. Its caches of compiled
and autotuned code are empty at first. One worker takes the first trial of the arm (cold) and the second (warm); then as many
workers as there shall ever be are started, and stopped in steps. At each number of workers tokens are counted over some seconds
in which trials begin and end as they do, so what a trial costs beside its training is in the rate.

Results go to results/benchmarks/trials_per_gpu.json, one entry a case and device, earlier entries of others kept.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measured import ROOT, keep

sys.path.insert(0, str(ROOT))
OUTPUT = ROOT / "results" / "benchmarks" / "trials_per_gpu.json"


def fields(options: argparse.Namespace, cuda: bool) -> dict[str, Any]:
    pattern, scale, batch, context = options.case.split(":")
    small = {"width": 32, "depth": 2, "vocabulary": 300} if options.smoke else {}
    return {
        "name": "trials",
        "base": {
            "model": {"scale": scale, "pattern": pattern.replace("+", " "), **small},
            "data": {
                "corpus": {"kind": "stdlib", "limit_bytes": options.corpus_bytes},
                "evaluation_documents": 8,
                "evaluation_bytes": 4096,
            },
            "training": {
                "tokens": options.steps * int(batch) * int(context),
                "batch_size": int(batch),
                "context": int(context),
                "precision": "bf16" if cuda else "fp32",
                "log_every": 5,
                "evaluations": 1,
                "checkpoint_every": 10**9,
            },
        },
        "arms": {"one": {}},
        "tuning": {"trials": 0},
        "confirmation": {"seeds": list(range(options.trials)), "split": "selection"},
        "launch": {"workers": max(options.workers), "measure": False},
    }


class Board:
    """What the folders of runs say at this moment."""

    def __init__(self, run: Any, tokens_per_step: int):
        self.run, self.tokens_per_step = run, tokens_per_step

    def first_steps(self) -> dict[str, dict[str, float]]:
        """Run -> seconds from the worker's taking it to its first step: before training, and of the step itself (compiling
        included)."""
        from workbench.files import read_jsonl

        found = {}
        for path in self.run.folder.glob("runs/*/events.jsonl"):
            at = {event["event"]: event for event in reversed(read_jsonl(path))}
            if "first_step" in at:
                taken, step = (path.parent / "run.json").stat().st_mtime, at["first_step"]
                found[path.parent.name] = {
                    "at": step["at"],
                    "seconds": step["at"] - taken,
                    "step_seconds": step["seconds"],
                }
        return found

    def running(self) -> set[str]:
        frame = self.run.runs()
        return set(frame.filter(frame["status"] == "running")["run"])

    def tokens(self) -> int:
        """Trained so far, over all trials."""
        return int(self.run.runs()["step"].sum()) * self.tokens_per_step


def wait_for(condition: Callable[[], Any], until: float) -> bool:
    """Whether it came true before the time."""
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def level(board: Board, workers: int, seconds: float, until: float) -> dict[str, Any] | None:
    """What so many workers do together, from when all of them train; None where time is up before."""
    if not wait_for(lambda: len(board.running()) >= workers, until):
        return None
    those = board.running()
    if not wait_for(
        lambda: (
            those - board.running() <= set(board.first_steps()) and those & board.running() <= set(board.first_steps())
        ),
        until,
    ):
        return None
    if time.monotonic() + seconds > until:
        return None
    ended, tokens, begun = _done(board), board.tokens(), time.monotonic()
    time.sleep(seconds)
    rate = (board.tokens() - tokens) / (time.monotonic() - begun)
    return {
        "workers": workers,
        "tokens_per_second": rate,
        "trials_ended": _done(board) - ended,
        "seconds": seconds,
        "used_bytes": _used_bytes(),
    }


def _done(board: Board) -> int:
    return int((board.run.runs()["status"] == "done").sum())


def _used_bytes() -> int | None:
    """Memory of the device that is taken, by whomever."""
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return total - free


def stop_some(run: Any, left: int) -> None:
    """End workers until ``left`` are there; their trials write a checkpoint."""
    for pid in run.workers()[left:]:
        os.kill(pid, signal.SIGTERM)
    wait_for(lambda: len(run.workers()) <= left, time.monotonic() + 60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="full+gdn:tiny:16:512", help="PATTERN:SCALE:BATCH:CONTEXT")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 12])
    parser.add_argument("--steps", type=int, default=600, help="of one trial")
    parser.add_argument("--trials", type=int, default=150, help="at most; those left at the end are not run")
    parser.add_argument("--seconds", type=float, default=20.0, help="of counting at each number of workers")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds after which no further number is begun")
    parser.add_argument("--corpus-bytes", type=int, default=2_000_000)
    parser.add_argument("--smoke", action="store_true", help="a model of nothing, one and two workers")
    parser.add_argument("--output", default=str(OUTPUT))
    options = parser.parse_args()
    if options.smoke:
        options.case, options.workers, options.steps, options.trials = "full+gdn:tiny:2:32", [1, 2], 60, 40
        options.seconds, options.corpus_bytes = 3.0, 300_000
    begun = time.monotonic()
    until = begun + options.limit
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {
            "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor",
            "TRITON_CACHE_DIR": f"{scratch}/triton",
            "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        }
        import torch

        from workbench.ablation.ablation import Ablation
        from workbench.ablation.execution.placement import usable_cores

        cuda = torch.cuda.is_available()
        before = _used_bytes()
        run = Ablation.parse(fields(options, cuda), Path(scratch) / "results").create()
        prepared = time.monotonic() - begun
        training = run.about["config"]["base"]["training"]
        board = Board(run, training["batch_size"] * training["context"])
        levels = []
        try:
            run.start_workers(1)
            wait_for(lambda: len(board.first_steps()) >= 2, until)
            first = sorted(board.first_steps().values(), key=lambda row: row["at"])
            most = max(options.workers)
            for count in [1, *sorted({*options.workers} - {1}, reverse=True)]:
                if count == most:
                    run.start_workers(count)
                stop_some(run, count)
                found = level(board, count, options.seconds, until)
                if found is None:
                    print(f"{count} workers: not reached within {options.limit:g} s", flush=True)
                    break
                levels.append(found | {"trials_per_minute": 60 * found["tokens_per_second"] / training["tokens"]})
                print(levels[-1], flush=True)
            warm = [row["seconds"] for row in list(board.first_steps().values())]
        finally:
            run.stop(60)
        reasons = sorted({reason for reason in run.runs()["reason"] if reason and "asked to stop" not in reason})
        entry = {
            "case": options.case,
            "steps": options.steps,
            "levels": sorted(levels, key=lambda row: row["workers"]),
            "used_bytes_before": before,
            "seconds_to_prepare": round(prepared, 1),
            "first_trial": first[0] if first else None,
            "second_trial": first[1] if len(first) > 1 else None,
            "later_trials_median_seconds": statistics.median(warm[2:]) if len(warm) > 2 else None,
            "reasons": reasons,
            "wall_seconds": round(time.monotonic() - begun, 1),
        }
    if not options.smoke:
        keep(Path(options.output), [entry], lambda r: r["case"], cores=usable_cores())
    print(f"\n{'workers':>8s} {'tokens/s':>10s} {'trials/min':>11s}")
    for row in entry["levels"]:
        print(f"{row['workers']:8d} {row['tokens_per_second']:10.0f} {row['trials_per_minute']:11.1f}")
    for name in ("first_trial", "second_trial"):
        if entry[name]:
            print(
                f"{name.replace('_', ' ')} of the arm: {entry[name]['seconds']:.1f} s to its first step, of which the step "
                f"with what it compiles {entry[name]['step_seconds']:.1f} s"
            )
    print(f"{entry['wall_seconds']:.0f} s in all")


if __name__ == "__main__":
    main()
