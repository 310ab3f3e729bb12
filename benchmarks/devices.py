"""FSDP2 training on 1, 2, 4, … GPUs of one host: speed, exposed communication, memory, whether losses stay equal.

    python benchmarks/devices.py                                          # every model, powers of two up to all GPUs
    python benchmarks/devices.py full:340m:16 --devices 1 2 --seconds 150   # one model on two GPUs, in four minutes
    python benchmarks/devices.py full/moe4:tiny:2:64 --devices 1 2        # gloo processes on a CPU: to try the script
    python benchmarks/devices.py --table                                  # the results so far, in Markdown

A case is PATTERN[/MIXTURE]:SCALE:ROWS[:CONTEXT], as in train_throughput.py. ROWS are those of one device. More devices
train ROWS on each (``per device``), or divide ROWS among them (``total``). Mixtures: moe64, 64 experts of which a token
takes 8 (340M active of 1.8B at scale 340m); moe64-exchanged, the same with whole experts on each rank
(training.expert_parallel).

Every case, number of devices and division of rows is a process of its own, with the same initial weights, rows packed
from the same documents, and the logging of a run; nothing is evaluated or saved. Of every entry:

tokens_per_second    from the median time of five steps between two synchronisations; the first five compile
efficiency           tokens per second and device, divided by those of one device
largest_difference_of_loss   over the steps, to one device; with ``total`` only, where every step has the same rows
peak_bytes           of tensors in a step after the first five, on the fullest device
communication        seconds of a step in which a device runs kernels of NCCL, mean over devices; they include waiting
exposed              those in which it runs no other kernel. Of three further steps, from the profiler

Results go to results/benchmarks/devices.json, one entry per case, number of devices, division and kind of device.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, merge_results, provenance, run_in_process
from train_throughput import run_config

sys.path.insert(0, str(ROOT))
OUTPUT = ROOT / "results" / "benchmarks" / "devices.json"
CASES = (
    "full:340m:16",
    "gdn+gdn+gdn+full:340m:16",
    "full/moe64:340m:8",
    "full/moe64-exchanged:340m:8",
    "full:1.3b:8",
    "gdn+gdn+gdn+full:1.3b:8",
)
MOE64 = {"feedforward": "moe", "feedforwards": {"moe": {"experts": 64, "top_k": 8, "hidden": 352}}}
MOE4 = {"feedforward": "moe", "feedforwards": {"moe": {"experts": 4, "top_k": 2}}}
MIXTURES: dict[str, dict[str, Any]] = {
    "moe64": {"model": MOE64},
    "moe64-exchanged": {"model": MOE64, "training": {"expert_parallel": True}},
    "moe4": {"model": MOE4},
    "moe4-exchanged": {"model": MOE4, "training": {"expert_parallel": True}},
}
DIVISIONS = ("per device", "total")
WINDOW = 5
"""Steps between two synchronisations and logged lines."""
PROFILED = 3
"""Further steps whose kernels are recorded, after one that starts the profiler."""


def config_of(case: str, devices: int, division: str, arguments: argparse.Namespace) -> Any:
    """The run of a case on ``devices`` devices.

    Raises:
        ConfigError: when they cannot divide its rows or experts.
    """
    from workbench.config import deep_merge, require

    pattern, scale, rows, *context = case.split(":")
    pattern, _, mixture = pattern.partition("/")
    require(not mixture or mixture in MIXTURES, "case", got=mixture, expected=f"one of {', '.join(MIXTURES)}")
    batch = int(rows) * (devices if division == "per device" else 1)
    require(batch % devices == 0, "case", got=f"{batch} rows", expected=f"a multiple of the {devices} devices")
    steps = arguments.steps + 1 + PROFILED
    extra = deep_merge({"training": {"log_every": WINDOW}}, MIXTURES.get(mixture, {}))
    extra = deep_merge(extra, json.loads(arguments.extra))
    config = run_config(":".join((pattern, scale, str(batch), *context)), steps, arguments.corpus_bytes, extra)
    config.check_experts(devices)
    return config


def train(config: Any, devices: int, data: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What every rank does; the numbers of all."""
    import torch

    from workbench.data import Source, StepLoader
    from workbench.environment import usable_cores
    from workbench.model import LanguageModel
    from workbench.training import parallel
    from workbench.training.memory import peak_memory, retain_freed_memory
    from workbench.training.step import build_step
    from workbench.training.trial import deterministic_algorithms

    torch.set_num_threads(arguments.threads or max(1, usable_cores() // devices))
    training = config.training
    fabric = parallel.launch(devices, training.ranks, expert_parallel=training.expert_parallel)
    on_gpu = fabric.device.type == "cuda"
    loader = StepLoader(
        config.stream(Source.open(arguments.cache, data)),
        config.batch_plan,
        batch_size=training.batch_size,
        accumulate=training.accumulate,
        steps=training.steps,
        rank=fabric.global_rank,
        world=devices,
    )

    def now() -> float:
        """The time at which all ranks have done their work."""
        if on_gpu:
            torch.cuda.synchronize()
        parallel.barrier()
        return time.perf_counter()

    losses: list[Any] = []
    windows: list[float] = []
    with (
        deterministic_algorithms(strict=training.deterministic),
        retain_freed_memory(),
        contextlib.closing(iter(loader)) as batches,
    ):
        model = LanguageModel(config.model, seed=config.seed_of("init"))
        step, compiled = build_step(model, config, fabric)
        step.diagnose_at = set()  # few steps of a run write diagnostics
        step.step_lengths = loader.lengths
        started = now()
        before = torch.zeros(2, dtype=torch.float64, device=fabric.device)
        for number in range(1, arguments.steps + 1):
            step(number, batches)
            losses.append(step.loss_window - before)
            before = step.loss_window
            if number % WINDOW == 0:
                step.take_log_values()
                step.rank_times.take()
                before = step.loss_window
                ended = now()
                windows.append(ended - started)
                if number == WINDOW and on_gpu:
                    torch.cuda.reset_peak_memory_stats()
                started = now()
        peak = parallel.largest(peak_memory(fabric.device), fabric.device)
        following = iter(range(arguments.steps + 1, training.steps + 1))
        seconds = profiled(lambda: step(next(following), batches)) if on_gpu and devices > 1 else None
    times = None
    if seconds is not None:
        times = parallel.all_gathered(torch.tensor(seconds, dtype=torch.float64, device=fabric.device)).tolist()
    measured = windows[1:] or windows
    return {
        "batch_size": training.batch_size,
        "compiled": compiled,
        "tokens_per_second": WINDOW * training.tokens_per_step / statistics.median(measured),
        "windows": windows,
        "losses": [float(loss / targets) for loss, targets in (pair.tolist() for pair in losses)],
        "peak_bytes": peak,
        "communication": None if times is None else statistics.mean(of_rank[0] for of_rank in times),
        "exposed": None if times is None else statistics.mean(of_rank[1] for of_rank in times),
        "exposed_by_device": None if times is None else [of_rank[1] for of_rank in times],
    }


def profiled(step: Callable[[], None]) -> tuple[float, float]:
    """Seconds of a step with communication, and with nothing but communication, on this device."""
    import torch
    from torch.profiler import ProfilerActivity, profile, schedule

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        with profile(
            activities=[ProfilerActivity.CUDA],
            schedule=schedule(wait=0, warmup=1, active=PROFILED, repeat=1),
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(file)),
        ) as profiler:
            for _ in range(1 + PROFILED):
                step()
                torch.cuda.synchronize()
                profiler.step()
        communication, exposed = communication_of(json.loads(file.read_text())["traceEvents"])
    return communication / PROFILED, exposed / PROFILED


def communication_of(events: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Seconds with communication, and with communication alone, of the kernels in a trace (of torch.profiler)."""
    kernels = [event for event in events if event.get("cat") == "kernel"]
    spans = np.array([(event["ts"], event["ts"] + event["dur"]) for event in kernels]).reshape(-1, 2)
    communicates = np.array([event["name"].startswith("nccl") for event in kernels], dtype=bool)
    return covered(spans[communicates]) / 1e6, (covered(spans) - covered(spans[~communicates])) / 1e6


def covered(spans: np.ndarray) -> float:
    """Length of the union of intervals, (N, 2) first and last points."""
    total, end = 0.0, -np.inf
    for first, last in spans[spans[:, 0].argsort()]:
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def one(arguments: argparse.Namespace) -> None:
    """One case, in its process: starts the other ranks and prints the result."""
    from workbench.training import parallel

    case, devices, division, data = json.loads(arguments.one)
    config = config_of(case, devices, division, arguments)
    others = parallel.start_other_ranks(devices, train, config, devices, data, arguments) if devices > 1 else []
    result = train(config, devices, data, arguments)
    print("RESULT " + json.dumps(result), flush=True)
    for process in others:
        process.join(60)


def compared(result: dict[str, Any], base: dict[str, Any] | None) -> dict[str, Any]:
    """A result beside that of one device."""
    if base is None or "error" in result or "error" in base:
        return result
    speed = result["tokens_per_second"] / base["tokens_per_second"]
    result = {**result, "speed_over_one": speed, "efficiency": speed / result["devices"]}
    if result["rows"] == "total":
        differences = [abs(a - b) for a, b in zip(result["losses"], base["losses"], strict=True)]
        result["largest_difference_of_loss"] = max(differences)
    return result


def earlier(path: Path, case: str, steps: int) -> dict[str, Any] | None:
    """The entry of one device in the file of results, if this device and code made it."""
    where = provenance()
    for entry in json.loads(path.read_text())["results"] if path.exists() else []:
        same = all(entry["environment"][name] == where[name] for name in ("device", "code"))
        if (entry["case"], entry["devices"], entry["steps"]) == (case, 1, steps) and same and "error" not in entry:
            return dict(entry)
    return None


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results in Markdown, by case and rows."""
    lines = [
        "| case | GPUs | rows per GPU | tokens/s | efficiency | ms of communication, exposed | peak GiB | loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        if "batch_size" not in r:
            continue
        times = "" if r["exposed"] is None else f"{1e3 * r['communication']:.0f}, {1e3 * r['exposed']:.0f}"
        difference = r.get("largest_difference_of_loss")
        cells = (
            r["case"],
            r["devices"],
            f"{r['batch_size'] / r['devices']:g}",
            f"{r['tokens_per_second']:,.0f}",
            f"{r['efficiency']:.1%}" if "efficiency" in r else "",
            times,
            f"{r['peak_bytes'] / 2**30:.1f}",
            "" if difference is None else f"{difference:.1g}",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--devices", type=int, nargs="+", help="default: powers of two up to the number of GPUs")
    parser.add_argument("--rows", nargs="+", choices=DIVISIONS, default=list(DIVISIONS))
    parser.add_argument("--steps", type=int, default=40, help="a multiple of five")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no further case starts after them")
    parser.add_argument("--limit", type=float, default=540, help="seconds after which a case is ended")
    parser.add_argument("--threads", type=int, default=0, help="threads of a rank; default: its share of the cores")
    parser.add_argument("--corpus-bytes", type=int, default=60_000_000)
    parser.add_argument("--cache", default=str(ROOT / "results" / "benchmarks" / "cache"))
    parser.add_argument("--extra", default="{}", help="JSON merged into the fields of every run")
    parser.add_argument("--output", default=str(OUTPUT))
    parser.add_argument("--table", action="store_true", help="print the results so far, and measure nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        return one(arguments)
    output, started = Path(arguments.output), time.monotonic()
    if arguments.table:
        return print(table(json.loads(output.read_text())["results"]))

    import torch

    from workbench.data import prepare

    Path(arguments.cache).mkdir(parents=True, exist_ok=True)
    numbers = arguments.devices or [n for n in (1, 2, 4, 8) if n <= max(1, torch.cuda.device_count())]
    results: list[dict[str, Any]] = []
    for case in arguments.cases:
        config = config_of(case, 1, "total", arguments)
        data = prepare(config.data, config.model.vocabulary or 0, Path(arguments.cache)).fingerprint
        base = earlier(output, case, arguments.steps)
        for devices, division in [(n, d) for n in numbers for d in (arguments.rows if n > 1 else ["total"])]:
            if time.monotonic() - started > arguments.seconds:
                print(f"{case} on {devices}, rows {division}: left out, time is up", flush=True)
                continue
            began = time.monotonic()
            job = json.dumps([case, devices, division, data])
            result = {"case": case, "devices": devices, "rows": division, "steps": arguments.steps}
            result |= run_in_process(__file__, job, limit=arguments.limit)
            base = result if devices == 1 else base
            results.append({**compared(result, base), "wall_seconds": round(time.monotonic() - began, 1)})
            shown = {name: value for name, value in results[-1].items() if name not in ("losses", "windows")}
            print(json.dumps(shown), flush=True)
            merge_results(output, results, lambda r: (r["case"], r["devices"], r.get("rows", "total")))
    print(table(results))


if __name__ == "__main__":
    main()
