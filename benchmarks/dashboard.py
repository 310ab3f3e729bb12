"""Time to draw and update a dashboard of 1,000 finished runs with 2,000 points each.

    python benchmarks/dashboard.py --output results/benchmarks/dashboard.json

An ablation with random numbers is written to a temporary folder (10 arms, 60 tuning and 40 confirmation runs each, in
the files that runs write), and a :class:`workbench.dashboards.Dashboard` is opened on it without a browser: everything
up to the message to the page is timed, import of the panels included. "cold" is the first dashboard of this process:
"verdict" is the panel that a finished ablation opens, "curves" the one with every point, "without a copy" the same
where `ended.parquet`, which is written when an ablation finishes, is missing. "warm" is a second dashboard in the same
kernel; an update follows new points of ten unfinished runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl

from workbench.ablation.folder import AblationFolder
from workbench.ablation.run import AblationRun
from workbench.dashboards.live.widget import Dashboard
from workbench.dashboards.panel import ordered_panels
from workbench.environment import environment
from workbench.files import write_json
from workbench.metric import BITS_PER_BYTE
from workbench.results.tables import ENDED_RUNS

ARMS, TRIALS, SEEDS, POINTS, DOCUMENTS = 10, 60, 40, 2_000, 30


def make_store(folder: Path, arms: int, trials: int, seeds: int, points: int) -> list[Path]:
    """Write the ablation. Returns the folders of its runs."""
    names = [f"arm-{i}" for i in range(arms)]
    write_json(
        folder / "ablation.json",
        {
            "name": "many",
            "identity": "0" * 12,
            "order": names,
            "metric": BITS_PER_BYTE.plain(),
            "views": {},
            "workers": 2,
            "canonical": {},
            "config": {
                "name": "many",
                "arms": {name: {} for name in names},
                "question": "Is the dashboard fast enough?",
                "alpha": 0.05,
                "margin": None,
                "exploratory": None,
                "budget": {"allow_mismatch": None},
                "tuning": {"trials": trials},
                "confirmation": {"seeds": list(range(seeds))},
            },
            "cost": [
                {
                    "arm": arm,
                    "parameters": 10**6,
                    "non_embedding": 10**6 + 10_000 * i,
                    "training_flops": 1e15 + 1e14 * i,
                    "cache_bytes": 10**6 * (i + 1),
                    "trials": trials + seeds,
                    "mismatch": "",
                }
                for i, arm in enumerate(names)
            ],
            "provenance": {"ablation": "0" * 12, "created": "2026-01-01 00:00:00 +0000"},
        },
    )
    random = np.random.default_rng(0)
    selection, paths = {}, []
    for a, arm in enumerate(names):
        for number in range(trials + seeds):
            stage, seed = ("tuning", 1000) if number < trials else ("confirmation", number - trials)
            path = folder / "runs" / f"{stage}-{arm}-{number:03d}"
            path.mkdir(parents=True)
            paths.append(path)
            rate = float(10 ** random.uniform(-4, -2))
            about = {
                "arm": arm,
                "stage": stage,
                "seed": seed,
                "steps": points,
                "tokens": points * 1000,
                "parameters": 10**6,
                "metric": BITS_PER_BYTE.plain(),
                "hyperparameters": {"training.learning_rate": rate},
                "config": {"of": "x" * 4_000},
            }
            losses = 6 / np.arange(1, points + 1) ** 0.2 + 0.02 * a + 0.05 * random.standard_normal(points)
            (path / "metrics.jsonl").write_text("".join(line(i + 1, loss, points) for i, loss in enumerate(losses)))
            numbers = {
                "step": points,
                "seconds": points / 10,
                "loss": losses[-1],
                "selection_value": losses[-1] / 3,
                "report_value": losses[-1] / 3,
                "reason": None,
                "status": "done",
            }
            for name, data in (("run.json", about), ("result.json", numbers), ("status.json", {"status": "done"})):
                (path / name).write_text(json.dumps(data))
            if stage == "confirmation":
                nats = random.normal(700 + a, 5, DOCUMENTS)
                pl.DataFrame(
                    {"document": range(DOCUMENTS), "nll_nats": nats, "bytes": [1000] * DOCUMENTS}
                ).write_parquet(path / "report.parquet")
        selection[arm] = {"run": f"tuning-{arm}-000", "hyperparameters": {}, "selection_value": 1.0}
    write_json(folder / "selection.json", selection)
    AblationFolder(folder).mark_finished(True)
    return paths


def line(step: int, loss: float, points: int) -> str:
    row = {
        "step": step,
        "tokens": step * 1000,
        "flops": step * 1e12,
        "seconds": step / 10,
        "learning_rate": 1e-3,
        "tokens_per_second": 1e4,
        "flops_per_second": 1e13,
        "loss": loss,
        "gradient_norm": 1.0,
    }
    if step % (points // 10) == 0:
        row["selection_value"] = loss / 3
    return json.dumps(row) + "\n"


def timed(
    action: Callable[[], object], times: int = 1, before: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """Median seconds of wall-clock and CPU time of this process; they differ on a busy machine."""
    wall, cpu = [], []
    for _ in range(times):
        before()
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        action()
        wall.append(time.perf_counter() - wall_start)
        cpu.append(time.process_time() - cpu_start)
    return {"wall_s": round(statistics.median(wall), 4), "cpu_s": round(statistics.median(cpu), 4)}


def first_dashboard(folder: Path, panel: str) -> dict[str, float]:
    """Seconds of the first dashboard of a fresh process."""
    command = [sys.executable, __file__, "--first", str(folder), "--panel", panel]
    measured: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return measured


def measure(folder: Path, runs: list[Path], repeats: int, points: int) -> dict[str, object]:
    cold = {panel: first_dashboard(folder, panel) for panel in ("verdict", "curves")}
    copy = folder / ENDED_RUNS
    copy.rename(folder / "copy")
    cold["curves, without a copy"] = first_dashboard(folder, "curves")
    (folder / "copy").rename(copy)
    run = AblationRun(folder)
    unfinished, step = runs[-10:], points
    for path in unfinished:
        (path / "status.json").write_text(json.dumps({"status": "interrupted", "reason": "resumes"}))
        (path / "result.json").unlink()

    def add_points() -> None:
        nonlocal step
        step += 1
        for path in unfinished:
            with open(path / "metrics.jsonl", "a") as file:
                file.write(line(step, 1.0, points))

    Dashboard(run, refresh=0, panel="curves").close()
    warm = timed(lambda: Dashboard(run, refresh=0, panel="curves"), repeats)
    opened, updates, sent = {}, {}, {}
    for cls in ordered_panels():
        panel = cls.Config.model_fields["kind"].default
        if not cls().applies(run):
            continue
        view = Dashboard(run, refresh=0, panel="cost")
        opened[panel] = timed(lambda: view.open_panel(panel))  # noqa: B023
        if panel == "overview":  # the overview does not read finished ablations again
            (folder / "finished.json").unlink()
            view.refresh_once()
        updates[panel], sent[panel] = timed(view.refresh_once, repeats, add_points), view.sent
        write_json(folder / "finished.json", {})
        view.close()
    return {
        "cold_first_figure": cold,
        "warm_first_figure": warm,
        "open_panel": opened,
        "update": updates,
        "bytes_of_last_message": sent,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", type=int, default=ARMS)
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--points", type=int, default=POINTS)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--first", type=Path, metavar="FOLDER", help="time one dashboard of this ablation only")
    parser.add_argument("--panel", default="verdict", help="of --first")
    options = parser.parse_args()
    if options.first:
        print(json.dumps(timed(lambda: Dashboard(options.first, refresh=0, panel=options.panel))))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "many"
        path.mkdir()
        runs = make_store(path, options.arms, options.trials, options.seeds, options.points)
        measured = measure(path, runs, options.repeats, options.points)
    result = {
        "what": "median seconds to draw and update, up to the message to the page",
        "runs": len(runs),
        "points": options.points,
        "arms": options.arms,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "environment": environment(),
        **measured,
    }
    print(json.dumps(result, indent=1))
    if options.output:
        write_json(options.output, result)


if __name__ == "__main__":
    main()
