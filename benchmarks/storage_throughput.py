"""Throughput of Optuna's storage under many workers, with trivial trials, and whether any trial was lost or failed.

    python benchmarks/storage_throughput.py --postgresql postgresql://user@127.0.0.1/database

Real trials take minutes; this measures how far the storage is from being a bottleneck. Every worker is a process with a
heartbeat, as in an ablation.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import optuna

from workbench.ablation.execution.storage import open_storage
from workbench.environment import environment

WORKER = """
import sys, time, optuna
from pathlib import Path
from workbench.ablation.execution.storage import open_storage
folder, url, name = Path(sys.argv[1]), sys.argv[2] or None, sys.argv[3]
trials, start = int(sys.argv[4]), Path(sys.argv[5])
study = optuna.load_study(storage=open_storage(folder, 10, url), study_name=name,
                          sampler=optuna.samplers.RandomSampler(), pruner=optuna.pruners.NopPruner())
print("ready", flush=True)
while not start.exists():
    time.sleep(0.05)
study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=trials)
"""


def measure(kind: str, url: str | None, workers: int, trials: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        name, start = f"throughput-{time.time()}", Path(folder) / "start"
        storage = open_storage(Path(folder), 10, url)
        optuna.create_study(storage=storage, study_name=name)
        call = [sys.executable, "-W", "ignore", "-c", WORKER, folder, url or "", name, str(trials), str(start)]
        processes = [
            subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(workers)
        ]
        for process in processes:
            assert process.stdout and process.stdout.readline() == "ready\n"
        start.touch()
        start_time = time.perf_counter()
        errors = [error for process in processes if (error := process.communicate()[1]) or process.returncode]
        seconds = time.perf_counter() - start_time
        states = [
            trial.state.name for trial in optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=False)
        ]
        return {
            "storage": kind,
            "workers": workers,
            "trials": len(states),
            "complete": states.count("COMPLETE"),
            "errors": errors,
            "seconds": round(seconds, 1),
            "trials_per_second": round(len(states) / seconds, 1),
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--postgresql", help="address of a database to measure besides SQLite")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--trials", type=int, default=200, help="trials per worker")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/storage_throughput.json"))
    parser.add_argument("--note", default="", help="note in the result, such as other load on the machine")
    options = parser.parse_args()
    kinds = {"sqlite (write-ahead log)": None, **({"postgresql": options.postgresql} if options.postgresql else {})}
    rows = [measure(kind, url, options.workers, options.trials) for kind, url in kinds.items()]
    options.out.write_text(
        json.dumps({"environment": environment(), "note": options.note, "rows": rows}, indent=1) + "\n"
    )
    print(json.dumps(rows, indent=1))
