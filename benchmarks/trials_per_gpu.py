"""Throughput of the GPUs of a host by the number of workers that train small models on each, and start-up times.

    python benchmarks/trials_per_gpu.py                                       # every GPU, 1, 2, 4 and 8 workers on each
    python benchmarks/trials_per_gpu.py --workers 1 8 --seconds 45 --limit 225          # in four minutes
    python benchmarks/trials_per_gpu.py --gpus 2 --workers 1 8 --launchers local ray    # two GPUs, placed by both
    python benchmarks/trials_per_gpu.py --smoke                               # on a CPU: checks that the script runs

At each number of workers an ablation of one arm is started; every worker is a process with separate trials, as
`launch.workers` starts them. The local launcher spreads workers over the GPUs. Ray, if it is installed, is started on
this host, and gives every worker a share of a GPU. Once every worker trains, tokens are counted in a window in which
trials start and end as usual, so that the rate includes the overhead of trials; a window is good for a claim if several
trials of every worker end in it. Rates of its tenths show how even it is.

The caches of compiled and autotuned code are empty at first: the first trial of the first ablation is cold, and the
first that starts after it warm.

Results go to results/benchmarks/trials_per_gpu.json, one entry per case, number of GPUs, launcher and kind of device.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import ROOT, merge_results

sys.path.insert(0, str(ROOT))
OUTPUT = ROOT / "results" / "benchmarks" / "trials_per_gpu.json"
LAUNCHERS = ("local", "ray")
PARTS = 10
"""Parts of a window whose rates are recorded as well."""


def fields(options: argparse.Namespace, launcher: str, workers: int, address: str, *, cuda: bool) -> dict[str, Any]:
    """The ablation with so many workers on each GPU."""
    pattern, scale, batch, context = options.case.split(":")
    smoke = {"width": 32, "depth": 2, "vocabulary": 300} if options.smoke else {}
    launch: dict[str, Any] = {"workers": workers * options.gpus, "measure": False}
    if launcher == "ray":
        share = {"entrypoint_num_gpus": 1 / workers, "entrypoint_num_cpus": 0.01}
        launch["launcher"] = {"kind": "ray", "address": address, "parameters": share, "one_host": True}
    return {
        "name": f"{launcher}-{workers}",
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
        "confirmation": {"seeds": list(range(options.trials * workers * options.gpus)), "split": "pilot"},
        "launch": launch,
    }


@contextlib.contextmanager
def ray_cluster(gpus: int) -> Iterator[str]:
    """The address of the jobs of a Ray cluster, which is this host."""
    port, jobs = _free_port(), _free_port()
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # paths of sockets must be short
    call = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--num-gpus={gpus}"]
    call += [f"--port={port}", f"--dashboard-port={jobs}", "--include-dashboard=true", f"--temp-dir={folder}/ray"]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    with open(f"{folder}/log", "w") as log:
        process = subprocess.Popen(call, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        from ray.job_submission import JobSubmissionClient

        address = f"http://127.0.0.1:{jobs}"

        def answers() -> bool:
            with contextlib.suppress(Exception):  # it is starting
                return JobSubmissionClient(address).list_jobs() == []
            return False

        if not wait_for(answers, time.monotonic() + 120):
            raise SystemExit(f"Ray does not start: {Path(folder, 'log').read_text()[-1500:]}")
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


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

    def done(self) -> int:
        """Trials that have ended as they should."""
        return int((self.run.runs()["status"] == "done").sum())

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


def measure(run: Any, workers: int, seconds: float, tokens_per_step: int, until: float) -> dict[str, Any] | None:
    """Throughput of ``workers`` workers, from when all of them train; None if the time runs out before."""
    progress = Progress(run, tokens_per_step)
    if not wait_for(lambda: len(progress.running()) >= workers, until):
        return None
    trials = progress.running()
    if not wait_for(lambda: trials <= set(progress.first_steps()), until) or time.monotonic() + seconds > until:
        return None
    done, marks = progress.done(), [(time.monotonic(), progress.tokens())]
    for part in range(1, PARTS + 1):
        time.sleep(max(0.0, marks[0][0] + seconds * part / PARTS - time.monotonic()))
        tokens = progress.tokens()
        marks.append((time.monotonic(), tokens))
    spans = itertools.pairwise(marks)
    return {
        "workers": workers,
        "tokens_per_second": (marks[-1][1] - marks[0][1]) / (marks[-1][0] - marks[0][0]),
        "tokens_per_second_by_part": [(b[1] - a[1]) / (b[0] - a[0]) for a, b in spans],
        "trials_ended": progress.done() - done,
        "trials_started": len(progress.first_steps()) - len(trials),
        "seconds": marks[-1][0] - marks[0][0],
        "used_bytes": _used_bytes(),
        "first_steps": sorted(progress.first_steps().values(), key=lambda row: row["at"]),
    }


def _used_bytes() -> list[int]:
    """Used memory of every GPU, by all processes."""
    import torch

    free_and_total = [torch.cuda.mem_get_info(number) for number in range(torch.cuda.device_count())]
    return [total - free for free, total in free_and_total]


def measure_launcher(launcher: str, options: argparse.Namespace, scratch: Path, until: float) -> dict[str, Any]:
    """An entry: every number of workers, placed by one launcher."""
    import torch

    from workbench.ablation.ablation import Ablation

    _, _, batch, context = options.case.split(":")
    tokens_per_step = int(batch) * int(context)
    levels: list[dict[str, Any]] = []
    reasons: set[str] = set()
    used_before, prepare_seconds = _used_bytes(), None
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(ray_cluster(options.gpus)) if launcher == "ray" else ""
        for workers in options.workers:
            started = time.monotonic()
            settings = fields(options, launcher, workers, address, cuda=torch.cuda.is_available())
            run = Ablation.parse(settings, scratch / "results").create()
            prepare_seconds = prepare_seconds or round(time.monotonic() - started, 1)
            try:
                run.start_workers()
                result = measure(run, workers * options.gpus, options.seconds, tokens_per_step, until)
            finally:
                run.stop(60)
            reasons |= {reason for reason in run.runs()["reason"] if reason and "asked to stop" not in reason}
            if result is None:
                print(f"{launcher}, {workers} workers per GPU: not reached within {options.limit:g} s", flush=True)
                break
            result = {"workers_per_gpu": workers, **result}
            result["trials_per_minute"] = 60 * result["tokens_per_second"] / (options.steps * tokens_per_step)
            if levels:
                result["speed_over_first"] = result["tokens_per_second"] / levels[0]["tokens_per_second"]
            levels.append(result)
            print({name: value for name, value in result.items() if name != "first_steps"}, flush=True)
    first_steps = [level.pop("first_steps") for level in levels]
    warm = first_steps[0][levels[0]["workers"] :] if levels else []
    last = [row["seconds"] for row in first_steps[-1]] if levels else []
    return {
        "case": options.case,
        "gpus": options.gpus,
        "launcher": launcher,
        "steps": options.steps,
        "levels": levels,
        "used_bytes_before": used_before,
        "seconds_to_prepare": prepare_seconds,
        "first_trial": first_steps[0][0] if levels else None,
        "second_trial": warm[0] if warm else None,
        "median_seconds_to_first_step_at_most_workers": statistics.median(last) if last else None,
        "reasons": sorted(reasons),
    }


def main() -> None:
    import torch

    from workbench.ablation.execution.placement import visible_gpus
    from workbench.environment import usable_cores

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="full+gdn:tiny:16:512", help="PATTERN:SCALE:BATCH:CONTEXT")
    parser.add_argument("--gpus", type=int, default=max(1, torch.cuda.device_count()), help="the first so many")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8], help="on each GPU, rising")
    parser.add_argument("--launchers", nargs="+", choices=LAUNCHERS, default=["local"])
    parser.add_argument("--steps", type=int, default=600, help="steps of one trial")
    parser.add_argument("--trials", type=int, default=25, help="largest number of trials of a worker")
    parser.add_argument("--seconds", type=float, default=60.0, help="seconds of counting at each number of workers")
    parser.add_argument(
        "--limit", type=float, default=900.0, help="seconds after which no further number of workers is measured"
    )
    parser.add_argument("--corpus-bytes", type=int, default=2_000_000)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, one and two workers")
    parser.add_argument("--output", default=str(OUTPUT))
    options = parser.parse_args()
    if options.smoke:
        options.case, options.workers, options.steps = "full+gdn:tiny:2:32", [1, 2], 60
        options.seconds, options.corpus_bytes = 3.0, 300_000
    options.workers = sorted({*options.workers})
    start = time.monotonic()
    until = start + options.limit
    entries = []
    with tempfile.TemporaryDirectory() as scratch:
        if torch.cuda.is_available():
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible_gpus()[: options.gpus])
        for launcher in options.launchers:
            if launcher == "ray" and importlib.util.find_spec("ray") is None:
                print("ray: left out, it is not installed", flush=True)
                continue
            os.environ |= {
                "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor",
                "TRITON_CACHE_DIR": f"{scratch}/triton",
                "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
            }
            began = time.monotonic()
            entry = measure_launcher(launcher, options, Path(scratch), until)
            entries.append({**entry, "wall_seconds": round(time.monotonic() - began, 1)})
            if not options.smoke:
                merge_results(Path(options.output), entries, _key, cores=usable_cores())
    print(f"\n{'launcher':>8s} {'GPUs':>5s} {'on each':>8s} {'tokens/s':>10s} {'trials/min':>11s} {'ended':>6s}")
    for entry in entries:
        for row in entry["levels"]:
            print(
                f"{entry['launcher']:>8s} {entry['gpus']:5d} {row['workers_per_gpu']:8d} "
                f"{row['tokens_per_second']:10.0f} {row['trials_per_minute']:11.1f} {row['trials_ended']:6d}"
            )
        for name in ("first_trial", "second_trial"):
            if entry[name]:
                print(
                    f"{name.replace('_', ' ')} of the arm: {entry[name]['seconds']:.1f} s to its first step, including "
                    f"{entry[name]['step_seconds']:.1f} s for the step itself, with compilation"
                )
    print(f"{time.monotonic() - start:.0f} s in total")


def _key(entry: dict[str, Any]) -> tuple[Any, ...]:
    return entry["case"], entry.get("gpus", 1), entry.get("launcher", "local")


if __name__ == "__main__":
    main()
