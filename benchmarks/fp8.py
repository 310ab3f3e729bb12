"""Training with products in eight bits against bf16: tokens per second and loss, 1.3B with full attention.

    python benchmarks/fp8.py                       # bf16 twice (two seeds), fp8 by rows and by tensors, 300 steps each
    python benchmarks/fp8.py --case full:1.3b:8 --steps 300 --modes bf16 row

Every run trains in its own process as `workbench train` does, except that it writes no checkpoint. The two bf16 seeds
measure the noise of the loss; the gap of an fp8 run is to the bf16 run of its seed. Modes of one case may be run one
after another: results go to results/benchmarks/fp8.json, and those of the case on this device are compared.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import mean, median
from typing import Any

from common import merge_results, provenance, run_in_process

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
OUTPUT = ROOT / "results" / "benchmarks" / "fp8.json"
MODES = {"bf16": (None, 0), "bf16-second-seed": (None, 1), "row": ("row", 0), "tensor": ("tensor", 0)}
"""Scaling and seed of every mode."""
LAST_LINES = 10
"""Lines of the log whose mean is the final loss."""


def measured(mode: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run."""
    from train_throughput import run_config

    from workbench.training.checkpointer import Checkpointer
    from workbench.training.trial import new_run, train

    # nothing is resumed, and 16 GB take as long to write as a hundred steps
    Checkpointer.save = lambda self, step: None  # type: ignore[method-assign]
    scaling, seed = MODES[mode]
    extra: dict[str, Any] = {"seed": seed, "training": {"fp8": scaling}}
    config = run_config(arguments.case, arguments.steps, arguments.corpus_bytes, extra)
    with tempfile.TemporaryDirectory() as folder:
        run = new_run(Path(folder) / "run", arguments.cache, config, stage="tuning")
        result = train(run.path, arguments.cache)
        rows = run.metrics()
    if result["status"] != "done":
        return {"case": arguments.case, "mode": mode, **result}
    return {
        "case": arguments.case,
        "mode": mode,
        "steps": arguments.steps,
        "tokens_per_second": median(row["tokens_per_second"] for row in rows[1:-1]),
        "final_loss": mean(row["loss"] for row in rows[-LAST_LINES:]),
        "losses": [row["loss"] for row in rows],
    }


def compared(results: list[dict[str, Any]]) -> list[str]:
    """Speed and loss of every finished run beside bf16."""
    by_mode = {result["mode"]: result for result in results if "final_loss" in result}
    if "bf16" not in by_mode:
        return []
    base = by_mode["bf16"]
    lines = []
    for mode, result in by_mode.items():
        speed, gap = result["tokens_per_second"], result["final_loss"] - base["final_loss"]
        faster = speed / base["tokens_per_second"]
        lines.append(f"{mode}: {speed:,.0f} tokens/s, {faster:.3f}x; loss {result['final_loss']:.4f}, {gap:+.4f}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="full:1.3b:8", help="PATTERN:SCALE:BATCH[:CONTEXT]")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--corpus-bytes", type=int, default=60_000_000)
    parser.add_argument("--cache", default=str(ROOT / "results" / "benchmarks" / "cache"))
    parser.add_argument("--output", default=str(OUTPUT))
    parser.add_argument("--one", choices=MODES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print("RESULT " + json.dumps(measured(arguments.one, arguments)))
        return
    results = [{"case": arguments.case, "mode": mode, **run_in_process(__file__, mode)} for mode in arguments.modes]
    merge_results(Path(arguments.output), results, lambda result: (result["mode"], result["case"]))
    device = provenance()["device"]
    stored = [
        result
        for result in json.loads(Path(arguments.output).read_text())["results"]
        if result["case"] == arguments.case and result["environment"]["device"] == device
    ]
    failed = [result for result in results if "final_loss" not in result]
    print("\n".join([*compared(stored), *(json.dumps(result, indent=1) for result in failed)]))


if __name__ == "__main__":
    main()
