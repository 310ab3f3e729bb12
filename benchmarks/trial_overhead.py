"""Overhead of a trial beyond its training: process, imports, data, model, first step with compilation, bookkeeping.

    python benchmarks/trial_overhead.py --trials 8

One worker runs tiny trials one after the other. The first includes the imports (its processes are forked from a server
that has imported torch once); the others are the cost of a trial on a warm machine. Stages are separated by the times
of events in the run's folder and in Optuna's study.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from itertools import pairwise
from pathlib import Path

from workbench.ablation.ablation import Ablation
from workbench.ablation.execution.plan import Plan
from workbench.environment import environment
from workbench.files import read_jsonl
from workbench.status import Stage


def measure(trials: int) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        run = Ablation.parse(
            {
                "name": "overhead",
                "base": {
                    "model": {"width": 64, "depth": 2, "vocabulary": 300},
                    "data": {
                        "corpus": {"kind": "stdlib", "limit_bytes": 300_000},
                        "evaluation_documents": 4,
                        "evaluation_bytes": 200,
                    },
                    "training": {
                        "tokens": 40 * 64,
                        "batch_size": 2,
                        "context": 32,
                        "log_every": 1,
                        "evaluations": 1,
                        "checkpoint_every": 1000,
                    },
                },
                "arms": {"full": {}},
                "tuning": {
                    "trials": trials,
                    "space": {"training.learning_rate": {"low": 1e-3, "high": 1e-2, "log": True}},
                },
                "confirmation": {"seeds": [0]},
                "launch": {"workers": 1},
            },
            folder,
        ).launch()
        assert run.wait()
        rows, spans = [], []
        for trial in Plan(run.files).study("full", Stage.TUNING).trials:
            assert trial.datetime_start and trial.datetime_complete
            path = run.folder / "runs" / trial.user_attrs["run"]
            start, end = trial.datetime_start.timestamp(), trial.datetime_complete.timestamp()
            at = {event["event"]: event["at"] for event in read_jsonl(path / "events.jsonl")}
            rows.append(
                {
                    "process, imports, data, model": at["started"] - start,
                    "first step": at["first_step"] - at["started"],
                    "training after the first step, evaluation, files": at["done"] - at["first_step"],
                    "detection of the end": end - at["done"],
                }
            )
            spans.append((start, end))
        for row, (before, after) in zip(rows[1:], pairwise(spans)):
            row["plan and database between two trials"] = after[0] - before[1]
        return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/trial_overhead.json"))
    parser.add_argument("--note", default="", help="note in the result, such as other load on the machine")
    options = parser.parse_args()
    first, *others = measure(options.trials)
    warm = {name: round(statistics.median(row[name] for row in others), 3) for name in others[0]}
    overhead = round(sum(seconds for name, seconds in warm.items() if not name.startswith("training")), 3)
    result = {
        "environment": environment(),
        "note": options.note,
        "load average": os.getloadavg()[0],
        "trials": options.trials,
        "first trial, seconds": {name: round(value, 3) for name, value in first.items()},
        "later trials, median seconds": warm,
        "overhead of a later trial, seconds": overhead,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "environment"}, indent=1))
