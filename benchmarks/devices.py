"""One training run on 1, 2, 4, … GPUs: speed-up, and whether the loss stays that of one GPU.

    python benchmarks/devices.py full:340m:16                    # all powers of two up to the number of GPUs
    python benchmarks/devices.py full:tiny:4:256 --devices 1 2   # on a machine without GPUs: CPU processes

A case is PATTERN:SCALE:BATCH[:CONTEXT], as in train_throughput.py. The batch is shared by all devices, and
`workbench train --devices N` trains each case from the same initial weights on the same rows, so that losses at equal
steps differ by rounding only. Results go to results/benchmarks/devices.json, one entry per case, number and kind of
device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, merge_results
from train_throughput import run_config

sys.path.insert(0, str(ROOT))
OUTPUT = ROOT / "results" / "benchmarks" / "devices.json"


def train(file: Path, folder: Path, devices: int) -> dict[str, Any]:
    """Run `workbench train`; its speed and losses."""
    from workbench.results.store import RunFolder

    start = time.perf_counter()
    call = [sys.executable, "-m", "workbench", "train", str(file), "--folder", str(folder), f"--devices={devices}"]
    process = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    if process.returncode:
        return {"error": (process.stderr or process.stdout)[-1500:]}
    rows = RunFolder(folder).metrics()
    return {
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in rows[1:-1]),
        "losses": {row["step"]: row["loss"] for row in rows},
        "wall_seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=["full:340m:16"])
    parser.add_argument("--devices", type=int, nargs="+", help="default: powers of two up to the number of GPUs")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--corpus-bytes", type=int, default=40_000_000)
    parser.add_argument("--extra", default="{}", help="JSON merged into the fields of the run")
    parser.add_argument("--output", default=str(OUTPUT))
    arguments = parser.parse_args()
    numbers = arguments.devices or [n for n in (1, 2, 4, 8) if n <= torch.cuda.device_count()]
    results: list[dict[str, Any]] = []
    for case in arguments.cases:
        config = run_config(case, arguments.steps, arguments.corpus_bytes, json.loads(arguments.extra))
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "run.yaml"
            file.write_text(config.model_dump_json())  # JSON is YAML
            first: dict[str, Any] = {}
            for n in numbers:
                run = train(file, Path(scratch) / f"on-{n}", n)
                first = first or run
                entry = {"case": case, "devices": n, "steps": arguments.steps, **run}
                if "losses" in run and "losses" in first:
                    entry["speed_over_first"] = run["tokens_per_second"] / first["tokens_per_second"]
                    entry["largest_difference_of_loss"] = max(
                        abs(run["losses"][k] - x) for k, x in first["losses"].items()
                    )
                results.append(entry)
                print(json.dumps(entry), flush=True)
                merge_results(Path(arguments.output), results, lambda r: (r["case"], r["devices"]))


if __name__ == "__main__":
    main()
