"""What a learned index finds of the attention over training: its recall, on one model that recalls facts from noise.

    python benchmarks/index_recall.py                   # about ten minutes of one core

A ``dsa`` model of two layers is trained on needles in noise, with dense attention in the first steps. Twenty times per
run every layer writes, over the queries that see more than ``top_k`` tokens,

- index_recall: share of the ``top_k`` tokens with the largest attention, the mean over heads, that the index selects
- index_mass: share of the attention to all tokens that falls on what the index selects
- index_divergence: the index's loss, in the warm-up over all tokens, afterwards over the selected ones

A random choice would have a recall of about ``top_k`` over the tokens that a query sees: ``chance`` is its mean for
rows of the longest length. One model and one seed: figures of this run, not of DSA. Results go to
results/benchmarks/index_recall.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
from common import write_report  # noqa: E402

OUTPUT = ROOT / "results" / "benchmarks" / "index_recall.json"
TOP_K, LENGTH = 16, 96
RUN: dict[str, Any] = {
    "model": {
        "width": 64,
        "depth": 2,
        "vocabulary": 512,
        "pattern": "dsa",
        "mixers": {"dsa": {"heads": 2, "top_k": TOP_K, "index_heads": 2, "index_dim": 16, "warm_up": 0.3}},
    },
    "data": {
        "kind": "needle",
        "haystack": "noise",
        "lengths": [72, 80, LENGTH],
        "measured_lengths": [LENGTH],
        "examples": 100,
        "text": {"corpus": {"kind": "stdlib", "limit_bytes": 1_000_000}},
    },
    "training": {"batch_size": 8, "context": LENGTH, "learning_rate": 3e-3, "evaluations": 4},
}
VALUES = ("index_recall", "index_mass", "index_divergence")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3200)
    parser.add_argument("--output", default=str(OUTPUT))
    arguments = parser.parse_args()
    from workbench.training import RunConfig
    from workbench.training.trial import new_run, train

    started = time.perf_counter()
    tokens = arguments.steps * RUN["training"]["batch_size"] * LENGTH
    config = RunConfig.parse({**RUN, "training": {**RUN["training"], "tokens": tokens}})
    with tempfile.TemporaryDirectory() as folder:
        run = new_run(Path(folder) / "run", Path(folder) / "cache", config)
        result = train(run.path, Path(folder) / "cache")
        rows = [
            {"step": row["step"], "layer": row["layer"], **{name: row["values"][name] for name in VALUES}}
            for row in run.diagnostics()
        ]
        losses = [{name: row[name] for name in ("step", "loss")} for row in run.metrics() if "loss" in row]
        evaluations = [row for row in run.evaluations() if row["metric"] == "errors per answer"]
    chance = sum(TOP_K / t for t in range(TOP_K + 1, LENGTH + 1)) / (LENGTH - TOP_K)
    print(*rows, sep="\n")
    report = {"run": RUN, "steps": arguments.steps, "chance": chance, "diagnostics": rows, "result": result}
    write_report(
        Path(arguments.output),
        {**report, "losses": losses[:: max(1, len(losses) // 40)], "evaluations": evaluations},
        started,
    )


if __name__ == "__main__":
    main()
