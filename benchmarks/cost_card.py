"""How right the cost card is: tokens a second and peak memory told from shrunken runs, beside those of whole runs.

    python benchmarks/cost_card.py full:340m:16 gdn:340m:8 gdn+gdn+gdn+full:340m:8 nsa:340m:8     # on a GPU
    python benchmarks/cost_card.py                                                            # small models on a CPU

A case is PATTERN:SCALE:BATCH[:CONTEXT], as in train_throughput.py. Each is told (`workbench.training.probe.measure_shrunken`, real
packed rows) and then trained by `workbench train`'s own function, as often as --repeats says: on a CPU in processes of their
own, one after the other; on CUDA in one process a case, all of which get ready at once and then take turns. Peak memory is what
torch's allocator counts on CUDA; on a CPU it is the largest sum of tensors (of the whole model, measured in the same way as the
shrunken ones), with the growth of the process's resident memory beside it. Results go to results/benchmarks/cost_card.json, one
entry a case and device, earlier entries of others kept. The last lines say which cases are within 5 % of the speed and 10 % of the
memory, and which miss.
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

from measured import in_process, keep

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
OUTPUT = ROOT / "results" / "benchmarks" / "cost_card.json"
TIME, MEMORY = 0.05, 0.10
"""What the card aims at: relative errors of tokens a second and of peak memory."""


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


def tell(case: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the cost card says."""
    from workbench.ablation.cost.memory import activation_bytes
    from workbench.accounting import account
    from workbench.data import prepare
    from workbench.training.optimiser import optimiser_bytes
    from workbench.training.probe import measure_shrunken

    config = run_config(case, arguments)
    training = config.training
    data = prepare(config.data, config.model.vocabulary or 0, arguments.cache)
    begun = time.perf_counter()
    found = measure_shrunken(config, data.stream(context=training.context, seed=0))
    cost = account(config.model, training.context)
    return {
        "tokens_per_second": training.tokens_per_step / found.seconds,
        "peak_bytes": found.peak_bytes,
        "peaks": found.peaks,
        "seconds_to_tell": time.perf_counter() - begun,
        "parameters": cost.parameters,
        "traced_bytes": 8 * cost.parameters + optimiser_bytes(config) + activation_bytes(config),
    }


def take(case: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the whole run takes."""
    import torch

    from workbench.accounting import account
    from workbench.training.probe import measure
    from workbench.training.trial import new_run, train

    config = run_config(case, arguments)
    cuda = torch.cuda.is_available()
    resident = _status("VmRSS")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if cuda else 0
    # the checkpoint at the end is copied and written as ever, but not to a disk, whose speed is not what is asked
    memory = Path("/dev/shm")
    room = memory.is_dir() and shutil.disk_usage(memory).free > 50 * account(config.model, 2).parameters
    with tempfile.TemporaryDirectory(dir=memory if room else None) as folder:
        run = new_run(Path(folder) / "run", arguments.cache, config, stage="tuning")
        result = train(run.path, arguments.cache)
        if result["status"] != "done":
            return result
        rows = run.metrics()
    grown = _status("VmHWM") - resident
    peak = torch.cuda.max_memory_allocated() if cuda else measure(config).peak_bytes
    speed = statistics.median(row["tokens_per_second"] for row in rows[1:-1])
    return {
        "tokens_per_second": speed,
        "peak_bytes": peak,
        "resident_growth_bytes": None if cuda else grown,
        "held_before_bytes": held,
    }


def _status(field: str) -> int:
    """Bytes of a line of this process's status (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    return 0


def both(case: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One after the other in this process, on a CUDA device, when its turn has come."""
    import torch

    from workbench.data import prepare
    from workbench.files import locked

    config = run_config(case, arguments)
    prepare(config.data, config.model.vocabulary or 0, arguments.cache)
    torch.zeros(1, device="cuda")  # the device is ready
    with locked(Path(arguments.cache) / "turn.lock"):
        begun = time.time()
        sides: dict[str, list[dict[str, Any]]] = {"tell": [], "take": []}
        for _ in range(arguments.repeats):
            for mode, found in sides.items():
                found.append(MODES[mode](case, arguments))
        return {**sides, "seconds": time.time() - begun}


def one_by_one(case: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The same, in processes of their own."""
    begun = time.time()
    sides: dict[str, list[dict[str, Any]]] = {"tell": [], "take": []}
    for _ in range(arguments.repeats):
        for mode, found in sides.items():
            found.append(in_process(__file__, f"{mode}/{case}"))
    return {**sides, "seconds": time.time() - begun}


MODES = {"tell": tell, "take": take, "both": both}


def note(case: str, found: dict[str, Any], results: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Hold what was told of a case against what it took, and write it down."""
    if "tell" not in found:  # its process ended
        found = {"tell": [], "take": [], "seconds": 0.0, **found}
    entry: dict[str, Any] = {
        "case": case,
        "told": found["tell"],
        "taken": found["take"],
        "steps": arguments.steps,
        "extra": json.loads(arguments.extra),
        "wall_seconds": round(found["seconds"], 1),
    }
    if found["tell"] and all("tokens_per_second" in one for one in found["tell"] + found["take"]):
        told, taken = (
            {name: statistics.median(one[name] for one in found[mode]) for name in ("tokens_per_second", "peak_bytes")}
            for mode in ("tell", "take")
        )
        speed, peak = (told[name] / taken[name] - 1 for name in told)
        entry |= {
            "error_of_tokens_per_second": speed,
            "error_of_peak_bytes": peak,
            "within_aim": abs(speed) <= TIME and abs(peak) <= MEMORY,
        }
    elif "error" in found:
        entry["error"] = found["error"]
    results.append(entry)
    print(json.dumps(entry), flush=True)
    keep(Path(arguments.output), results, lambda r: r["case"], threads=arguments.threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="default: small models that a CPU trains")
    parser.add_argument("--steps", type=int, default=None, help="default: 16 on CUDA, 24 on a CPU")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", default=str(ROOT / "results" / "benchmarks" / "cache"))
    parser.add_argument("--extra", default="{}", help="JSON laid over every run's fields")
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
            found = {pool.submit(in_process, __file__, f"both/{case}"): case for case in cases}
            for future in as_completed(found):
                note(found[future], future.result(), results, arguments)
    else:
        for case in cases:
            note(case, one_by_one(case, arguments), results, arguments)
    print(
        f"\n{'case':28s} {'tokens/s told':>14s} {'taken':>10s} {'error':>7s} {'GiB told':>9s} {'taken':>7s} {'error':>7s}"
    )
    for r in results:
        if "within_aim" in r:
            t, m = (
                {name: statistics.median(one[name] for one in r[side]) for name in ("tokens_per_second", "peak_bytes")}
                for side in ("told", "taken")
            )
            misses = [
                f"{what} by {abs(r[error]):.1%}"
                for what, error, aim in (
                    ("speed", "error_of_tokens_per_second", TIME),
                    ("memory", "error_of_peak_bytes", MEMORY),
                )
                if abs(r[error]) > aim
            ]
            print(
                f"{r['case']:28s} {t['tokens_per_second']:14.0f} {m['tokens_per_second']:10.0f} {r['error_of_tokens_per_second']:+7.1%} "
                f"{t['peak_bytes'] / 2**30:9.2f} {m['peak_bytes'] / 2**30:7.2f} {r['error_of_peak_bytes']:+7.1%}  "
                + (f"MISSES {' and '.join(misses)}" if misses else f"within {TIME:.0%} and {MEMORY:.0%}")
            )
        else:
            print(f"{r['case']:28s} failed: {r.get('error') or (r['told'] + r['taken'])[-1]}")


if __name__ == "__main__":
    main()
