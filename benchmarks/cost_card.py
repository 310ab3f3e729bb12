"""Accuracy of the cost card: speed and peak memory predicted from shrunken runs, compared with those of whole runs.

    python benchmarks/cost_card.py full:340m:16 gdn:340m:8 gdn+gdn+gdn+full:340m:8 nsa:340m:8     # on a GPU
    python benchmarks/cost_card.py                                                    # small models on a CPU

A case is PATTERN:SCALE:BATCH[:CONTEXT], as in train_throughput.py. Each is predicted
(`workbench.training.probe.measure_shrunken`, real packed rows) and then trained by the function behind
`workbench train`, --repeats times: on a CPU in separate processes, one after the other; on CUDA in one process per
case, which start up in parallel and then take turns.

Peak memory on CUDA is that of torch's allocator. On a CPU it is the largest sum of tensors (of the whole model,
measured in the same way as the shrunken ones); the growth of the process's resident memory is listed as well. Results
go to results/benchmarks/cost_card.json, one entry per case and device; entries of other cases stay. The printed table
says which cases are within 5 % of the speed and 10 % of the memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from common import merge_results, run_in_process

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
OUTPUT = ROOT / "results" / "benchmarks" / "cost_card.json"
SPEED_TOLERANCE, MEMORY_TOLERANCE = 0.05, 0.10
"""Largest relative errors of tokens per second and of peak memory that the card aims at."""


def run_config(case: str, arguments: argparse.Namespace) -> Any:
    import torch

    from workbench.config import deep_merge
    from workbench.training.config import RunConfig

    pattern, scale, batch, *context = case.split(":")
    cuda = torch.cuda.is_available()
    T = int(context[0]) if context else (4096 if cuda else 256)
    corpus = {"kind": "packages", "limit_bytes": 12_000_000} if cuda else {"kind": "stdlib", "limit_bytes": 4_000_000}
    fields = {
        "model": {"scale": scale, "pattern": pattern.replace("+", " ")} | ({} if cuda else {"depth": 12}),
        "data": {"corpus": corpus, "evaluation_documents": 16},
        "training": {
            "tokens": arguments.steps * int(batch) * T,
            "batch_size": int(batch),
            "context": T,
            "precision": "bf16" if cuda else "fp32",
            "learning_rate": 3e-4,
            "log_every": 2,
            "evaluations": 1,
            "checkpoint_every": 10**9,
        },
    }
    return RunConfig.parse(deep_merge(fields, json.loads(arguments.extra)))


def predict(case: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Speed and memory by the cost card."""
    from workbench.ablation.cost.memory import activation_bytes
    from workbench.accounting import account
    from workbench.data import prepare
    from workbench.training.optimiser import training_state_bytes
    from workbench.training.probe import measure_shrunken

    config = run_config(case, arguments)
    training = config.training
    data = prepare(config.data, config.model.vocabulary or 0, arguments.cache)
    start = time.perf_counter()
    measured = measure_shrunken(config, data.stream(context=training.context, seed=0))
    cost = account(config.model, training.context)
    return {
        "tokens_per_second": training.tokens_per_step / measured.seconds,
        "peak_bytes": measured.peak_bytes,
        "peaks": measured.peaks,
        "seconds_to_predict": time.perf_counter() - start,
        "parameters": cost.parameters,
        "traced_bytes": 8 * cost.parameters + training_state_bytes(config) + activation_bytes(config),
    }


def train_whole(case: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Speed and memory of the whole run."""
    import torch

    from workbench.accounting import account
    from workbench.training.probe import measure
    from workbench.training.trial import new_run, train

    config = run_config(case, arguments)
    cuda = torch.cuda.is_available()
    resident_before = _status("VmRSS")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    allocated_before = torch.cuda.memory_allocated() if cuda else 0
    # the checkpoint at the end is written to memory: the speed of the disk is not measured
    shm = Path("/dev/shm")
    fits = shm.is_dir() and shutil.disk_usage(shm).free > 50 * account(config.model, 2).parameters
    with tempfile.TemporaryDirectory(dir=shm if fits else None) as folder:
        run = new_run(Path(folder) / "run", arguments.cache, config, stage="tuning")
        result = train(run.path, arguments.cache)
        if result["status"] != "done":
            return result
        rows = run.metrics()
    growth = _status("VmHWM") - resident_before
    peak = torch.cuda.max_memory_allocated() if cuda else measure(config).peak_bytes
    speed = statistics.median(row["tokens_per_second"] for row in rows[1:-1])
    return {
        "tokens_per_second": speed,
        "peak_bytes": peak,
        "resident_growth_bytes": None if cuda else growth,
        "allocated_before_bytes": allocated_before,
    }


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    return 0


def both(case: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Prediction and whole run in this process on a CUDA device, one case at a time."""
    import torch

    from workbench.data import prepare
    from workbench.files import locked

    config = run_config(case, arguments)
    prepare(config.data, config.model.vocabulary or 0, arguments.cache)
    torch.zeros(1, device="cuda")  # initialises the device
    with locked(Path(arguments.cache) / "device.lock"):
        start = time.time()
        entries: dict[str, list[dict[str, Any]]] = {"predicted": [], "measured": []}
        for _ in range(arguments.repeats):
            for mode, repeats in entries.items():
                repeats.append(MODES[mode](case, arguments))
        return {**entries, "seconds": time.time() - start}


def one_by_one(case: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The same, in separate processes."""
    start = time.time()
    entries: dict[str, list[dict[str, Any]]] = {"predicted": [], "measured": []}
    for _ in range(arguments.repeats):
        for mode, repeats in entries.items():
            repeats.append(run_in_process(__file__, f"{mode}/{case}"))
    return {**entries, "seconds": time.time() - start}


MODES = {"predicted": predict, "measured": train_whole, "both": both}


def add_entry(case: str, outcome: dict[str, Any], results: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Compare prediction and whole run of a case, and write the entry."""
    if "predicted" not in outcome:  # its process failed
        outcome = {"predicted": [], "measured": [], "seconds": 0.0, **outcome}
    entry: dict[str, Any] = {
        "case": case,
        "predicted": outcome["predicted"],
        "measured": outcome["measured"],
        "steps": arguments.steps,
        "extra": json.loads(arguments.extra),
        "wall_seconds": round(outcome["seconds"], 1),
    }
    repeats = outcome["predicted"] + outcome["measured"]
    if outcome["predicted"] and all("tokens_per_second" in repeat for repeat in repeats):
        predicted, measured = medians(entry)
        speed, peak = (predicted[name] / measured[name] - 1 for name in predicted)
        entry |= {
            "error_of_tokens_per_second": speed,
            "error_of_peak_bytes": peak,
            "within_tolerance": abs(speed) <= SPEED_TOLERANCE and abs(peak) <= MEMORY_TOLERANCE,
        }
    elif "error" in outcome:
        entry["error"] = outcome["error"]
    results.append(entry)
    print(json.dumps(entry), flush=True)
    merge_results(Path(arguments.output), results, lambda r: r["case"], threads=arguments.threads)


def medians(entry: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Of the repeats: predicted, measured."""
    predicted, measured = (
        {
            name: statistics.median(repeat[name] for repeat in entry[side])
            for name in ("tokens_per_second", "peak_bytes")
        }
        for side in ("predicted", "measured")
    )
    return predicted, measured


def print_table(results: list[dict[str, Any]]) -> None:
    print(f"\n{'':28s} {'tokens/s':>25s} {'':7s} {'GiB':>17s}")
    print(
        f"{'case':28s} {'predicted':>14s} {'measured':>10s} {'error':>7s} "
        f"{'predicted':>9s} {'measured':>8s} {'error':>7s}"
    )
    for r in results:
        if "within_tolerance" not in r:
            print(f"{r['case']:28s} failed: {r.get('error') or (r['predicted'] + r['measured'])[-1]}")
            continue
        predicted, measured = medians(r)
        speed, peak = r["error_of_tokens_per_second"], r["error_of_peak_bytes"]
        misses = [f"speed by {abs(speed):.1%}"] if abs(speed) > SPEED_TOLERANCE else []
        misses += [f"memory by {abs(peak):.1%}"] if abs(peak) > MEMORY_TOLERANCE else []
        print(
            f"{r['case']:28s} {predicted['tokens_per_second']:14.0f} {measured['tokens_per_second']:10.0f} "
            f"{speed:+7.1%} {predicted['peak_bytes'] / 2**30:9.2f} {measured['peak_bytes'] / 2**30:8.2f} {peak:+7.1%}  "
            + (
                f"MISSES {' and '.join(misses)}"
                if misses
                else f"within {SPEED_TOLERANCE:.0%} and {MEMORY_TOLERANCE:.0%}"
            )
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="default: small models that a CPU trains")
    parser.add_argument("--steps", type=int, default=None, help="default: 16 on CUDA, 24 on a CPU")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", default=str(ROOT / "results" / "benchmarks" / "cache"))
    parser.add_argument("--extra", default="{}", help="JSON merged into the fields of every run")
    parser.add_argument("--output", default=str(OUTPUT))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    import torch

    arguments.steps = arguments.steps or (16 if torch.cuda.is_available() else 24)
    if arguments.one:
        torch.set_num_threads(arguments.threads)
        mode, case = arguments.one.split("/", 1)
        print("RESULT " + json.dumps(MODES[mode](case, arguments)), flush=True)
        return
    cases = arguments.cases or ["full:tiny:4", "gdn:tiny:4", "gdn+gdn+gdn+full:tiny:4", "nsa:tiny:4"]
    results: list[dict[str, Any]] = []
    if torch.cuda.is_available():
        Path(arguments.cache).mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(len(cases)) as pool:
            futures = {pool.submit(run_in_process, __file__, f"both/{case}"): case for case in cases}
            for future in as_completed(futures):
                add_entry(futures[future], future.result(), results, arguments)
    else:
        for case in cases:
            add_entry(case, one_by_one(case, arguments), results, arguments)
    print_table(results)


if __name__ == "__main__":
    main()
