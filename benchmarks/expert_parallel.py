"""Expert parallelism beside FSDP2 alone: step times of a mixture of experts on several ranks.

    python benchmarks/expert_parallel.py                  # two gloo processes on a CPU, a small model
    python benchmarks/expert_parallel.py --preset gpu     # two GPUs with NCCL; --world 8 for eight

    gathered     every rank stores a shard of all experts, and gathers them for every use (training.expert_parallel off)
    exchanged    every rank stores whole experts, and tokens are sent to them (on)

Both arms train the same model on the same random tokens, in turns of one step each, whose order alternates. The choices
of tokens are given, not learned: ``balanced``, every expert equally often, or ``zipf``, the i-th expert with a
probability proportional to 1/i, so that the first rank has most rows. What the router computes is unchanged.

Reported are, as medians over the steps after the warm-up: seconds of a step, of the slowest rank; tokens per second;
bytes that the fullest rank sends in a step, by what they are; bytes that it stores (weights,
gradients, optimiser state); on GPUs also the largest memory that a step allocates on top. ``speed_up`` is the median
over steps of the time gathered divided by the time exchanged. Results go to results/benchmarks/expert_parallel.json,
one entry per device, preset, load and number of ranks.

To look at in a run on GPUs: the share of a step in which the host waits for the numbers of rows (one copy per layer and
pass); whether exchanges wait behind gathers of the next layer, with which they share a communicator; and at which width
of experts the time gathered exceeds the time exchanged, beside the arithmetic of bytes in docs/moe.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
from common import merge_results  # noqa: E402

OUTPUT = ROOT / "results" / "benchmarks" / "expert_parallel.json"
ARMS = {"gathered": False, "exchanged": True}
LOADS = ("balanced", "zipf")
PRESETS: dict[str, dict[str, Any]] = {
    "trial": {  # to try the script: its times mean nothing
        "model": {"width": 32, "depth": 1, "vocabulary": 300},
        "moe": {"experts": 4, "top_k": 2, "hidden": 32},
        "training": {"context": 32, "precision": "fp32"},
    },
    "cpu": {
        "model": {"width": 128, "depth": 4, "vocabulary": 512},
        "moe": {"experts": 16, "top_k": 2, "hidden": 256},
        "training": {"context": 128, "precision": "fp32"},
    },
    "gpu": {
        "model": {"width": 2048, "depth": 8, "vocabulary": 32_768},
        "moe": {"experts": 64, "top_k": 8, "hidden": 1024},
        "training": {"context": 4096, "precision": "bf16"},
    },
}


def fields_of(options: argparse.Namespace, *, expert_parallel: bool) -> dict[str, Any]:
    """The run of an arm."""
    preset = PRESETS[options.preset]
    batch = options.rows * options.world
    training = {
        **preset["training"],
        "batch_size": batch,
        "tokens": (options.warm_up + options.steps) * batch * preset["training"]["context"],
        "expert_parallel": expert_parallel,
        "compile": options.compile,
        "recompute": options.recompute,
    }
    moe = {**preset["moe"], "balance_over": "micro_batch"}  # no second forward pass that counts choices
    return {"model": {**preset["model"], "feedforward": "moe", "feedforwards": {"moe": moe}}, "training": training}


class SentBytes:
    """Counts the bytes that leave this rank while it is entered, by what they are."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self._functions: dict[str, Callable[..., Any]] = {}

    def __enter__(self) -> SentBytes:
        import torch.distributed as dist

        # those that FSDP calls, under their names in this and in earlier versions of torch
        gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
        reduce = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
        world, rank = dist.get_world_size(), dist.get_rank()

        def exchanged(output: Any, rows: Any, received: Any = None, sent: Any = None, **_: Any) -> None:
            if sent is None:
                self.bytes["numbers of rows"] += rows.nbytes * (world - 1) // world
            elif len(rows):
                self.bytes["rows"] += (sum(sent) - sent[rank]) * rows[:1].nbytes

        def gathered(output_tensor: Any, input_tensor: Any, **_: Any) -> None:
            self.bytes["gathered weights"] += input_tensor.nbytes * (world - 1)

        def reduced(output: Any, input: Any, **_: Any) -> None:
            self.bytes["summed gradients"] += input.nbytes * (world - 1) // world

        for name, count in (("all_to_all_single", exchanged), (gather, gathered), (reduce, reduced)):
            self._functions[name] = getattr(dist, name)
            setattr(dist, name, _counted(self._functions[name], count))
        return self

    def __exit__(self, *_: object) -> None:
        import torch.distributed as dist

        for name, function in self._functions.items():
            setattr(dist, name, function)


def _counted(function: Callable[..., Any], count: Callable[..., None]) -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        count(*arguments, **keywords)
        return function(*arguments, **keywords)

    return call


def choose(model: Any, load: str, tokens: int, seed: int) -> None:
    """Give the routers of a model the choices of ``tokens`` tokens."""
    import torch

    from workbench.feedforwards.router import Router

    routers = [module for module in model.modules() if isinstance(module, Router)]
    for number, router in enumerate(routers):
        E, K = router.num_experts, router.config.top_k
        if load == "balanced":
            ids_NK = (torch.arange(tokens)[:, None] * K + torch.arange(K)) % E
        else:  # K experts without replacement: the largest of their log-probabilities with Gumbel noise
            generator = torch.Generator().manual_seed(seed + number)
            noise_NE = -torch.empty(tokens, E).exponential_(generator=generator).log()
            ids_NK = (noise_NE - torch.arange(1, E + 1).log()).topk(K, dim=-1).indices
        ids_NK = ids_NK.to(router.weight.device)
        router.select = lambda scores_NC, logits_NC, ids_NK=ids_NK: ids_NK


class Arm:
    """One arm: its model, and what its steps took."""

    def __init__(self, options: argparse.Namespace, load: str, *, expert_parallel: bool):
        import torch

        from workbench.model import LanguageModel
        from workbench.training import parallel
        from workbench.training.config import RunConfig
        from workbench.training.step import build_step

        config = RunConfig.parse(fields_of(options, expert_parallel=expert_parallel))
        config.check_experts(options.world)
        self.shape = (options.rows, config.training.context)
        self.vocabulary = int(config.model.vocabulary or 0)
        fabric = parallel.launch(options.world, expert_parallel=expert_parallel)
        self.device = fabric.device
        model = LanguageModel(config.model, seed=0).to(self.device)
        choose(model, load, options.rows * config.training.context, seed=1000 * fabric.global_rank)
        self.step, _ = build_step(model, config, fabric)
        self.step.diagnose_at = set()
        self.generator = torch.Generator().manual_seed(fabric.global_rank)
        self.number = 0
        self.seconds: list[float] = []
        self.sent: Counter[str] = Counter()
        self.allocated = 0

    def run(self) -> None:
        """One step on random tokens; times are those of the slowest rank."""
        import torch

        from workbench.data import Batch
        from workbench.training import parallel

        self.number += 1
        tokens_BT = torch.randint(self.vocabulary, self.shape, generator=self.generator)
        zeros_BT = torch.zeros(self.shape, dtype=torch.int32)
        batch = Batch(tokens_BT, tokens_BT.roll(-1, 1), zeros_BT, zeros_BT.long())
        on_gpu, before = self.device.type == "cuda", 0
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        parallel.barrier()
        started = time.perf_counter()
        with SentBytes() as sent:
            self.step(self.number, iter([batch]))
        if on_gpu:
            torch.cuda.synchronize()
            self.allocated = torch.cuda.max_memory_allocated() - before
        seconds = torch.tensor(time.perf_counter() - started, device=self.device)
        self.seconds.append(float(parallel.all_maximum(seconds)))
        self.sent = sent.bytes

    def stored_bytes(self) -> int:
        """Weights, gradients and optimiser state on this rank, between forward pass and update."""
        from workbench.optimisers.tensors import local

        parameters = list(self.step.model.parameters())
        state = [value for entry in self.step.optimiser.state.values() for value in entry.values()]
        return sum(2 * local(p).nbytes for p in parameters) + sum(
            local(v).nbytes for v in state if hasattr(v, "nbytes")
        )

    def summary(self, warm_up: int, world: int) -> dict[str, Any]:
        """Medians over the steps after ``warm_up``, of the fullest rank."""
        import numpy as np
        import torch

        from workbench.training import parallel

        kinds = ("rows", "numbers of rows", "gathered weights", "summed gradients")
        numbers = [self.stored_bytes(), self.allocated, sum(self.sent.values()), *(self.sent[kind] for kind in kinds)]
        largest = parallel.all_maximum(torch.tensor(numbers, dtype=torch.float64, device=self.device)).tolist()
        seconds = float(np.median(self.seconds[warm_up:]))
        rows, context = self.shape
        return {
            "seconds": seconds,
            "tokens_per_second": world * rows * context / seconds,
            "stored_bytes": int(largest[0]),
            "allocated_in_step_bytes": int(largest[1]) if self.device.type == "cuda" else None,
            "sent_bytes": int(largest[2]),
            "sent_bytes_by_kind": {kind: int(value) for kind, value in zip(kinds, largest[3:], strict=True)},
        }


def benchmark(options: argparse.Namespace) -> None:
    """What every rank does; rank 0 writes the results."""
    import numpy as np
    import torch

    from workbench.training import parallel

    torch.set_num_threads(options.threads)
    for load in options.loads:
        arms = {name: Arm(options, load, expert_parallel=exchanges) for name, exchanges in ARMS.items()}
        for turn in range(options.warm_up + options.steps):
            for name in list(arms)[:: -1 if turn % 2 else 1]:
                arms[name].run()
        rows = {name: arm.summary(options.warm_up, options.world) for name, arm in arms.items()}
        gathered, exchanged = (np.array(arms[name].seconds[options.warm_up :]) for name in ARMS)
        low, middle, high = np.quantile(gathered / exchanged, [0.25, 0.5, 0.75])
        del arms
        if not parallel.is_rank_zero():
            continue
        entry = {
            "preset": options.preset,
            "load": load,
            "world": options.world,
            "backend": torch.distributed.get_backend(),
            "arms": rows,
            "speed_up": float(middle),
            "quartiles": [float(low), float(high)],
            "settings": {key: value for key, value in vars(options).items() if key != "output"},
            "model": PRESETS[options.preset],
        }
        print(json.dumps({key: entry[key] for key in ("load", "world", "speed_up", "arms")}), flush=True)
        merge_results(
            Path(options.output),
            [entry],
            key=lambda r: (r["preset"], r["load"], r["world"], r["settings"]["compile"], r["settings"]["recompute"]),
        )
    parallel.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="cpu")
    parser.add_argument("--world", type=int, default=2, help="ranks")
    parser.add_argument("--rows", type=int, default=2, help="rows of a micro-batch on each rank")
    parser.add_argument("--steps", type=int, default=20, help="steps of every arm")
    parser.add_argument("--warm-up", type=int, default=5, help="first steps that are not counted")
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--threads", type=int, default=1, help="threads of a rank")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--recompute", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--output", default=str(OUTPUT))
    options = parser.parse_args()

    from workbench.training import parallel

    others = parallel.start_other_ranks(options.world, benchmark, options)
    benchmark(options)
    for process in others:
        process.join(60)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONPATH", str(ROOT))
    main()
