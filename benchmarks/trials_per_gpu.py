"""Throughput of a device by the number of workers that train small models on it, and the start-up time of a trial.

    python benchmarks/trials_per_gpu.py                      # on a GPU: 1, 2, 4, 8 and 12 workers, about five minutes
    python benchmarks/trials_per_gpu.py --smoke              # on a CPU: checks that the script runs

One ablation of one arm; every worker is a process with separate trials, as `launch.workers` starts them. The caches of
compiled and autotuned code are empty at first. One worker runs the first trial of the arm (cold) and the second (warm);
then the largest number of workers is started, and reduced step by step. At each number, tokens are counted over some
seconds in which trials start and end as usual, so that the rate includes the overhead of a trial.

Results go to results/benchmarks/trials_per_gpu.json, one entry per case and device; entries of other cases stay.
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

from common import ROOT, merge_results

sys.path.insert(0, str(ROOT))
OUTPUT = ROOT / "results" / "benchmarks" / "trials_per_gpu.json"


def fields(options: argparse.Namespace, cuda: bool) -> dict[str, Any]:
    pattern, scale, batch, context = options.case.split(":")
    smoke = {"width": 32, "depth": 2, "vocabulary": 300} if options.smoke else {}
    return {
        "name": "trials",
        "base": {
            "model": {"scale": scale, "pattern": pattern.replace("+", " "), **smoke},
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


class Progress:
    """Current state of the runs, from their folders."""

    def __init__(self, run: Any, tokens_per_step: int):
        self.run, self.tokens_per_step = run, tokens_per_step

    def first_steps(self) -> dict[str, dict[str, float]]:
        """Run -> time of its first step, seconds from the start of the trial to it, and seconds of the step, with
        compilation."""
        from workbench.files import read_jsonl

        steps = {}
        for path in self.run.folder.glob("runs/*/events.jsonl"):
            at = {event["event"]: event for event in reversed(read_jsonl(path))}
            if "first_step" in at:
                start, step = (path.parent / "run.json").stat().st_mtime, at["first_step"]
                steps[path.parent.name] = {
                    "at": step["at"],
                    "seconds": step["at"] - start,
                    "step_seconds": step["seconds"],
                }
        return steps

    def running(self) -> set[str]:
        frame = self.run.runs()
        return set(frame.filter(frame["status"] == "running")["run"])

    def tokens(self) -> int:
        """Tokens trained so far, over all trials."""
        return int(self.run.runs()["step"].sum()) * self.tokens_per_step


def wait_for(condition: Callable[[], Any], until: float) -> bool:
    """Wait for a condition. Returns whether it became true before the monotonic time ``until``."""
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def measure_level(progress: Progress, workers: int, seconds: float, until: float) -> dict[str, Any] | None:
    """Throughput of ``workers`` workers, from when all of them train; None if the time runs out before."""
    if not wait_for(lambda: len(progress.running()) >= workers, until):
        return None
    trials = progress.running()
    if not wait_for(lambda: trials <= set(progress.first_steps()), until):
        return None
    if time.monotonic() + seconds > until:
        return None
    done, tokens, start = _done(progress), progress.tokens(), time.monotonic()
    time.sleep(seconds)
    rate = (progress.tokens() - tokens) / (time.monotonic() - start)
    return {
        "workers": workers,
        "tokens_per_second": rate,
        "trials_ended": _done(progress) - done,
        "seconds": seconds,
        "used_bytes": _used_bytes(),
    }


def _done(progress: Progress) -> int:
    return int((progress.run.runs()["status"] == "done").sum())


def _used_bytes() -> int | None:
    """Used memory of the device, by all processes."""
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return total - free


def reduce_workers(run: Any, count: int) -> None:
    """Stop workers until ``count`` are left; their trials write a checkpoint."""
    for pid in run.workers()[count:]:
        os.kill(pid, signal.SIGTERM)
    wait_for(lambda: len(run.workers()) <= count, time.monotonic() + 60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="full+gdn:tiny:16:512", help="PATTERN:SCALE:BATCH:CONTEXT")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 12])
    parser.add_argument("--steps", type=int, default=600, help="steps of one trial")
    parser.add_argument("--trials", type=int, default=150, help="largest number of trials")
    parser.add_argument("--seconds", type=float, default=20.0, help="seconds of counting at each number of workers")
    parser.add_argument(
        "--limit", type=float, default=300.0, help="seconds after which no further number of workers is measured"
    )
    parser.add_argument("--corpus-bytes", type=int, default=2_000_000)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, one and two workers")
    parser.add_argument("--output", default=str(OUTPUT))
    options = parser.parse_args()
    if options.smoke:
        options.case, options.workers, options.steps, options.trials = "full+gdn:tiny:2:32", [1, 2], 60, 40
        options.seconds, options.corpus_bytes = 3.0, 300_000
    start = time.monotonic()
    until = start + options.limit
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {
            "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor",
            "TRITON_CACHE_DIR": f"{scratch}/triton",
            "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        }
        import torch

        from workbench.ablation.ablation import Ablation
        from workbench.environment import usable_cores

        cuda = torch.cuda.is_available()
        used_before = _used_bytes()
        run = Ablation.parse(fields(options, cuda), Path(scratch) / "results").create()
        prepare_seconds = time.monotonic() - start
        training = run.about["config"]["base"]["training"]
        progress = Progress(run, training["batch_size"] * training["context"])
        levels = []
        try:
            run.start_workers(1)
            wait_for(lambda: len(progress.first_steps()) >= 2, until)
            first = sorted(progress.first_steps().values(), key=lambda row: row["at"])
            most = max(options.workers)
            for count in [1, *sorted({*options.workers} - {1}, reverse=True)]:
                if count == most:
                    run.start_workers(count)
                reduce_workers(run, count)
                result = measure_level(progress, count, options.seconds, until)
                if result is None:
                    print(f"{count} workers: not reached within {options.limit:g} s", flush=True)
                    break
                levels.append(result | {"trials_per_minute": 60 * result["tokens_per_second"] / training["tokens"]})
                print(levels[-1], flush=True)
            start_seconds = [row["seconds"] for row in progress.first_steps().values()]
        finally:
            run.stop(60)
        reasons = sorted({reason for reason in run.runs()["reason"] if reason and "asked to stop" not in reason})
        entry = {
            "case": options.case,
            "steps": options.steps,
            "levels": sorted(levels, key=lambda row: row["workers"]),
            "used_bytes_before": used_before,
            "seconds_to_prepare": round(prepare_seconds, 1),
            "first_trial": first[0] if first else None,
            "second_trial": first[1] if len(first) > 1 else None,
            "later_trials_median_seconds": statistics.median(start_seconds[2:]) if len(start_seconds) > 2 else None,
            "reasons": reasons,
            "wall_seconds": round(time.monotonic() - start, 1),
        }
    if not options.smoke:
        merge_results(Path(options.output), [entry], lambda r: r["case"], cores=usable_cores())
    print(f"\n{'workers':>8s} {'tokens/s':>10s} {'trials/min':>11s}")
    for row in entry["levels"]:
        print(f"{row['workers']:8d} {row['tokens_per_second']:10.0f} {row['trials_per_minute']:11.1f}")
    for name in ("first_trial", "second_trial"):
        if entry[name]:
            print(
                f"{name.replace('_', ' ')} of the arm: {entry[name]['seconds']:.1f} s to its first step, including "
                f"{entry[name]['step_seconds']:.1f} s for the step itself, with compilation"
            )
    print(f"{entry['wall_seconds']:.0f} s in total")


if __name__ == "__main__":
    main()
