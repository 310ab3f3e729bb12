"""Step times of balanced training on real ranks: six arms over three length distributions.

    python benchmarks/sparse_balance.py                       # two gloo processes on a CPU, a small model
    python benchmarks/sparse_balance.py --preset gpu          # two ranks of NCCL, block 256 and top-k 32, whole lengths

    none       micro-batches in the order of the stream, budgets as configured
    lbb        length-balanced batching
    sab        sparsity-aware batching
    dst        dynamic sparsity tuning
    lbb_dst    both
    sab_dst    both

All arms train on the same documents in the same steps, in one run and in turns: a few steps of each arm, then the next
few of each. A speed-up is the median over steps of the time of ``none`` divided by that of the arm, both of the slowest
rank and of the same global batch, so that drift of the machine and the documents of a step cancel. The latency table is
measured at the beginning on one rank, while the other waits.

``ranks: replicated`` meets once per step, like data parallelism with gradients that are summed at the end, and its
waiting is measured; ``ranks: sharded`` is FSDP2, which waits in every layer. All times are real: all ranks run at once.
Results go to results/benchmarks/sparse_balance.json, one entry per device, model and layout.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
from common import merge_results  # noqa: E402

OUTPUT = ROOT / "results" / "benchmarks" / "sparse_balance.json"
ARMS = ("none", "lbb", "sab", "dst", "lbb_dst", "sab_dst")
PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {
        "model": {
            "width": 64,
            "depth": 2,
            "vocabulary": 512,
            "pattern": "moba",
            "mixers": {"moba": {"kind": "moba", "block": 4, "top_k": 16, "head_dim": 32}},
        },
        "scale": 1 / 64,
        "buckets": [16, 64, 128, 192, 256, 320, 384, 448, 512, 768, 1152],
        "budgets": [2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 32],
        "accumulate": 4,
        "text": {"kind": "stdlib", "limit_bytes": 3_000_000},
        "precision": "fp32",
        "learning_rate": 3e-3,
    },
    "trial": {  # to try the script: its times mean nothing
        "model": {
            "width": 16,
            "depth": 1,
            "vocabulary": 300,
            "pattern": "moba",
            "mixers": {"moba": {"kind": "moba", "block": 8, "top_k": 2, "head_dim": 8}},
        },
        "scale": 1 / 1024,
        "buckets": [16, 32, 72],
        "budgets": [1, 2, 4],
        "accumulate": 2,
        "text": {"kind": "stdlib", "limit_bytes": 100_000},
        "precision": "fp32",
        "learning_rate": 3e-3,
    },
    "gpu": {
        "model": {
            "width": 1024,
            "depth": 4,
            "vocabulary": 8192,
            "pattern": "moba",
            "mixers": {"moba": {"kind": "moba", "block": 256, "top_k": 32, "head_dim": 128, "kv_heads": 2}},
        },
        "scale": 1.0,
        "buckets": [1024, 2048, 4096, 8192, 12_288, 16_384, 24_576, 32_768, 49_152, 73_728],
        "budgets": [8, 12, 16, 20, 24, 28, 32, 40, 48, 64],
        "accumulate": 8,
        "text": {"kind": "packages", "limit_bytes": 14_000_000},
        "precision": "bf16",
        "learning_rate": 1e-3,
    },
}


def fields_of(options: argparse.Namespace, distribution: str, arm: str, table: str) -> dict[str, Any]:
    """The run of an arm on one length distribution."""
    preset = PRESETS[options.preset]
    accumulate, context = options.accumulate or preset["accumulate"], preset["buckets"][-1]
    if distribution != "long_tail":  # the others have at most 32k tokens
        context = next(bucket for bucket in preset["buckets"] if bucket >= preset["scale"] * 32_768)
    loads = {"kind": "measured", "table": table}
    plans: dict[str, Any] = {
        "none": "contiguous",
        "lbb": "length_balanced",
        "sab": {"kind": "sparsity_aware", "loads": loads},
    }
    plan = plans[arm.removesuffix("_dst").replace("dst", "none")]
    budgets = {"kind": "dst", "table": table, "anchor": options.anchor, "tolerance": options.tolerance}
    return {
        "model": preset["model"],
        "data": {
            "corpus": {
                "kind": "drawn_lengths",
                "text": preset["text"],
                "distribution": distribution,
                "scale": preset["scale"],
            },
            "evaluation_documents": 4,
            "selection_documents": 4,
        },
        "training": {
            "tokens": options.steps * options.world * accumulate * context,
            "batch_size": options.world,
            "accumulate": accumulate,
            "context": context,
            "buckets": [bucket for bucket in preset["buckets"] if bucket <= context],
            "precision": preset["precision"],
            "learning_rate": preset["learning_rate"],
            "batch_plan": plan,
            "ranks": options.ranks,
            "compile": options.compile,
            "recompute": options.recompute,
            **({"budgets": budgets} if arm.endswith("dst") else {}),
        },
    }


class Arm:
    """One arm: its model, its rows, and what its steps took."""

    def __init__(self, fields: dict[str, Any], data: Any, fabric: Any):
        from workbench.data import StepLoader
        from workbench.model import LanguageModel
        from workbench.training.config import RunConfig
        from workbench.training.step import build_step

        config = RunConfig.parse(fields)
        training = config.training
        self.loader = StepLoader(
            config.stream(data),
            config.batch_plan,
            batch_size=training.batch_size,
            accumulate=training.accumulate,
            steps=training.steps,
            rank=fabric.global_rank,
            world=fabric.world_size,
        )
        self.step, _ = build_step(LanguageModel(config.model, seed=0), config, fabric)
        self.step.diagnose_at = set()
        self.step.step_lengths = self.loader.lengths
        self.batches = iter(self.loader)
        self.number = 0
        self.steps: list[dict[str, Any]] = []

    def run(self) -> None:
        """One step."""
        self.number += 1
        self.step(self.number, self.batches)
        started = time.perf_counter()
        lengths = self.loader.lengths(self.number - 1)
        if self.loader.plan.learns:
            self.loader.record(self.number - 1, self.step.measurements(lengths))
        planning = time.perf_counter() - started
        values, names = self.step.take_log_values()
        logged = dict(zip(names, values.tolist()[len(values) - len(names) :]))
        times = self.step.rank_times.take()
        of_ranks = np.array(times["ranks"]["micro_batches"])
        in_turn_A = of_ranks.mean(0)
        self.steps.append(
            {
                "seconds": times["step_seconds"],
                "rank_imbalance": times["rank_imbalance"],
                "waiting": times.get("waiting"),
                "micro_batch_imbalance": float(in_turn_A.max() / in_turn_A.mean()),
                "mean_load": float(of_ranks.sum(1).mean()),
                "planning": planning,
                **{name: logged[name] for name in ("budget", "coverage_lost") if name in logged},
            }
        )


def summary(arms: dict[str, Arm], warm_up: int) -> dict[str, dict[str, Any]]:
    """Medians over the steps after ``warm_up``, and the speed-up with its quartiles."""
    rows = {}
    base = np.array([step["seconds"] for step in arms["none"].steps[warm_up:]])
    for name, arm in arms.items():
        steps = arm.steps[warm_up:]
        ratios = base / np.array([step["seconds"] for step in steps])
        row: dict[str, Any] = {
            key: float(np.median([step[key] for step in steps])) for key in steps[0] if steps[0][key] is not None
        }
        low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        total = float(base.sum() / sum(step["seconds"] for step in steps))
        rows[name] = {**row, "speed_up": float(middle), "quartiles": [float(low), float(high)], "of_sums": total}
    return rows


def prepare_on_first(data: Any, vocabulary: int, cache: Path) -> str:
    """Prepare the data; their fingerprint."""
    from workbench.data import prepare

    return prepare(data, vocabulary, cache).fingerprint


def benchmark(options: argparse.Namespace) -> None:
    """What every rank does; rank 0 writes the results."""
    import torch

    from workbench.data import Source
    from workbench.training import parallel
    from workbench.training.config import RunConfig
    from workbench.training.latency import measure_latencies

    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    preset = PRESETS[options.preset]
    fabric = parallel.launch(options.world, options.ranks)
    is_first = fabric.global_rank == 0
    folder = Path(options.folder)
    table = str(folder / "table.json")
    say = (lambda line: print(line, flush=True)) if is_first else (lambda line: None)

    def on_first() -> None:
        if Path(table).exists():
            return
        fields = fields_of(options, "long_tail", "none", table)
        lengths = preset["buckets"][:: options.every]
        lengths = sorted({*lengths, preset["buckets"][-1]})
        measure_latencies(RunConfig.parse(fields), lengths, preset["budgets"], say).save(table)

    parallel.of_rank_zero(on_first)
    results = []
    for distribution in options.distributions:
        fields = fields_of(options, distribution, "none", table)
        config = RunConfig.parse(fields)
        vocabulary = config.model.vocabulary or 0
        of_text = partial(prepare_on_first, config.data, vocabulary, folder / "cache")
        data = Source.open(folder / "cache", parallel.of_rank_zero(of_text))
        arms = {name: Arm(fields_of(options, distribution, name, table), data, fabric) for name in options.arms}
        for turn in range(options.steps):
            names = list(arms)[turn % len(arms) :] + list(arms)[: turn % len(arms)]
            for name in names:
                arms[name].run()
        for arm in arms.values():
            with contextlib.closing(arm.batches):
                pass
        rows = summary(arms, options.warm_up)
        for name, row in rows.items():
            say(f"{distribution} {name}: {json.dumps({key: _short(value) for key, value in row.items()})}")
        results.append({"distribution": distribution, "arms": rows})
        if is_first:
            settings = {key: value for key, value in vars(options).items() if key not in ("folder", "output")}
            case = {"ranks": options.ranks, "world": options.world, "preset": options.preset, "times": "real"}
            entry = {**case, "settings": settings, "model": preset["model"], "distributions": results}
            entry["latency_table"] = json.loads(Path(table).read_text())
            merge_results(Path(options.output), [entry], key=lambda r: (r["preset"], r["ranks"], r["world"]))
    parallel.barrier()


def _short(value: Any) -> Any:
    return [_short(part) for part in value] if isinstance(value, list) else round(value, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="cpu")
    parser.add_argument("--world", type=int, default=2, help="ranks")
    parser.add_argument("--ranks", choices=["replicated", "sharded"], default="replicated")
    parser.add_argument("--steps", type=int, default=24, help="steps of every arm")
    parser.add_argument("--warm-up", type=int, default=6, help="first steps that are not counted")
    parser.add_argument("--accumulate", type=int, help="micro-batches of a rank; default of the preset")
    parser.add_argument("--anchor", choices=["mean", "min", "max"], default="mean")
    parser.add_argument("--tolerance", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=1, help="threads of a rank")
    parser.add_argument("--every", type=int, default=1, help="take every n-th bucket into the latency table")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--recompute", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--distributions", nargs="+", default=["bimodal", "long_tail", "uniform"])
    parser.add_argument(
        "--folder",
        help="for prepared data and the latency table, which is measured unless it exists; default a temporary one",
    )
    parser.add_argument("--output", default=str(OUTPUT))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        options.folder = options.folder or temporary
        Path(options.folder).mkdir(parents=True, exist_ok=True)
        from workbench.training import parallel

        others = parallel.start_other_ranks(options.world, benchmark, options)
        benchmark(options)
        for process in others:
            process.join(60)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONPATH", str(ROOT))
    main()
