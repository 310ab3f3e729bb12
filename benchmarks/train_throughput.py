"""Training speed of whole runs on this GPU, compared with a plain transformer.

    python benchmarks/train_throughput.py full:340m:16 sliding:340m:16 full:1.3b:8 --peers plain:340m:16 plain:1.3b:8

A case is PATTERN:SCALE:BATCH[:CONTEXT], the words of the pattern joined by "+" (gdn+gdn+gdn+full). Modes:

stack          the function behind `workbench train`, in a separate process: Fabric, rows packed from documents on disk,
               logging, evaluation, and a checkpoint at the end
deterministic  the same with training.deterministic
bare           the same compiled model in a plain loop

Speeds are medians over the lines of the log after the first. Results go to results/benchmarks/train_throughput.json,
one entry per case and device; entries of other cases stay. --extra sets further fields as JSON, --label names them:

    python benchmarks/train_throughput.py full:340m:8 --label moe --extra '{"model": {"feedforward": "moe",
        "feedforwards": {"moe": {"experts": 64, "top_k": 8, "hidden": 352}}}}'
    python benchmarks/train_throughput.py full:340m:16 --label muon --extra '{"training": {"optimiser": "muon"}}'
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import merge_results, run_in_process

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
OUTPUT = ROOT / "results" / "benchmarks" / "train_throughput.json"
VOCABULARY = 32_000


def run_config(case: str, steps: int, corpus_bytes: int, extra: dict[str, Any]) -> Any:
    from workbench.config import deep_merge
    from workbench.training.config import RunConfig

    pattern, scale, batch, *context = case.split(":")
    T = int(context[0]) if context else 4096
    fields = {
        "model": {"scale": scale, "pattern": pattern.replace("+", " ")},
        "data": {
            "corpus": {"kind": "packages", "limit_bytes": corpus_bytes},
            "evaluation_documents": 64,
            "evaluation_bytes": 8192,
        },
        "training": {
            "tokens": steps * int(batch) * T,
            "batch_size": int(batch),
            "context": T,
            "precision": "bf16",
            "learning_rate": 3e-4,
            "log_every": 5,
            "evaluations": 1,
            "checkpoint_every": 10**9,
        },
    }
    return RunConfig.parse(deep_merge(fields, extra))


def stack(case: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One case as `workbench train` trains it."""
    start = time.perf_counter()
    import torch

    from workbench.accounting import account
    from workbench.training.trial import new_run, train

    config = run_config(case, arguments.steps, arguments.corpus_bytes, json.loads(arguments.extra))
    with tempfile.TemporaryDirectory() as folder:
        prepare_start = time.perf_counter()
        run = new_run(Path(folder) / "run", arguments.cache, config, stage="tuning")
        prepare_seconds = time.perf_counter() - prepare_start
        result = train(run.path, arguments.cache)
        if result["status"] != "done":
            return {"case": case, "mode": "stack", **result}
        rows = run.metrics()
        events: dict[str, dict[str, Any]] = {}  # the first of each name
        for line in (run.path / "events.jsonl").read_text().splitlines():
            event = json.loads(line)
            events.setdefault(event["event"], event)
    speed = statistics.median(row["tokens_per_second"] for row in rows[1:-1])
    cost = account(config.model, config.training.context)
    spans = [b["seconds"] - a["seconds"] for a, b in itertools.pairwise(rows[1:])]
    return {
        "case": case,
        "mode": "stack",
        "tokens_per_second": speed,
        "parameters": cost.parameters,
        "flops_per_second": statistics.median(row["flops_per_second"] for row in rows[1:-1]),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "loss": [rows[0]["loss"], rows[-1]["loss"]],
        "seconds_to_first_step": events["first_step"]["at"] - events["started"]["at"],
        "seconds_process_to_first_step": time.perf_counter()
        - start
        - prepare_seconds
        - (time.time() - events["first_step"]["at"]),
        "seconds_of_compiled_step": events["first_step"]["seconds"],
        "slowest_over_median_window": max(spans) / statistics.median(spans),
    }


def deterministic(case: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """As :func:`stack`, with training.deterministic."""
    from workbench.config import deep_merge

    arguments.extra = json.dumps(deep_merge(json.loads(arguments.extra), {"training": {"deterministic": True}}))
    return {**stack(case, arguments), "mode": "deterministic"}


def bare(case: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The same compiled model, batches and optimiser in the shortest loop; the batches are on the device beforehand."""
    import torch

    from workbench.data import PreparedData
    from workbench.model import LanguageModel
    from workbench.training.optimiser import build_optimiser
    from workbench.training.trial import new_run

    config = run_config(case, arguments.steps, arguments.corpus_bytes, json.loads(arguments.extra))
    with tempfile.TemporaryDirectory() as folder:
        data = PreparedData.open(arguments.cache, new_run(Path(folder) / "run", arguments.cache, config).record().data)
    t = config.training
    stream = data.stream(context=t.context, seed=0)
    batches = [[x.cuda() for x in stream.batch(range(k * t.batch_size, (k + 1) * t.batch_size))] for k in range(8)]
    model = LanguageModel(config.model, seed=0).cuda()
    model.compile_blocks()
    optimiser = build_optimiser(model, t)
    times: list[float] = []
    start = time.perf_counter()
    for step in range(arguments.steps // 5 * 5):
        if step == 1:
            torch.cuda.synchronize()
            first_step_seconds = time.perf_counter() - start
        if step % 5 == 0:
            torch.cuda.synchronize()
            times.append(time.perf_counter())
        tokens, targets, segments, _ = batches[step % 8]
        with torch.autocast("cuda", torch.bfloat16):
            loss = model.loss(tokens, targets, segments=segments)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), t.clip)
        optimiser.step()
        optimiser.zero_grad()
    torch.cuda.synchronize()
    times.append(time.perf_counter())
    spans = [b - a for a, b in itertools.pairwise(times[1:])]
    if arguments.profile:
        _profile(model, optimiser, batches[0], arguments.profile)
    return {
        "case": case,
        "mode": "bare",
        "tokens_per_second": 5 * t.batch_size * t.context / statistics.median(spans),
        "loss": float(loss.detach()),
        "seconds_of_compiled_step": first_step_seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def _profile(model: Any, optimiser: Any, batch: Any, path: str) -> None:
    import torch
    from torch.profiler import ProfilerActivity, profile

    tokens, targets, segments, _ = batch
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model.loss(tokens, targets, segments=segments)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        torch.cuda.synchronize()
    Path(path).write_text(
        profiler.key_averages().table(sort_by="self_device_time_total", row_limit=40, max_name_column_width=90)
    )


def plain(case: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """A plain transformer compiled as a whole, as a user could write it: no documents, packing or logging."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    _, scale, batch, *context = case.split(":")
    B, T = int(batch), int(context[0]) if context else 4096
    D, depth, hidden = {"340m": (1024, 24, 2816), "1.3b": (2048, 24, 5632)}[scale]

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm_a, self.norm_b = nn.RMSNorm(D), nn.RMSNorm(D)
            self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
            self.up, self.down = nn.Linear(D, 2 * hidden, bias=False), nn.Linear(hidden, D, bias=False)

        def forward(self, x: Any, cos: Any, sin: Any) -> Any:
            q, k, v = self.qkv(self.norm_a(x)).view(B, T, 3, D // 128, 128).unbind(2)

            def rotate(y: Any) -> Any:
                a, b = y.chunk(2, -1)
                return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(v.dtype)

            q, k, v = (y.transpose(1, 2) for y in (rotate(q), rotate(k), v))
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(o.transpose(1, 2).reshape(B, T, D))
            gate, value = self.up(self.norm_b(x)).chunk(2, -1)
            return x + self.down(F.silu(gate) * value)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.norm, self.head = (
                nn.Embedding(VOCABULARY, D),
                nn.RMSNorm(D),
                nn.Linear(D, VOCABULARY, bias=False),
            )
            self.layers = nn.ModuleList(Layer() for _ in range(depth))
            angle = torch.arange(T)[:, None] / 10_000 ** (torch.arange(0, 128, 2) / 128)
            self.register_buffer("cos", angle.cos()[None, :, None])
            self.register_buffer("sin", angle.sin()[None, :, None])

        def forward(self, tokens: Any, targets: Any) -> Any:
            x = self.embedding(tokens)
            for layer in self.layers:
                x = layer(x, self.cos, self.sin)
            return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), targets.flatten())

    model = Plain().cuda()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    compiled = torch.compile(model)
    rows = torch.randint(VOCABULARY, (B, T + 1), device="cuda")
    times = []
    for step in range(arguments.steps // 5 * 5):
        if step % 5 == 0:
            torch.cuda.synchronize()
            times.append(time.perf_counter())
        with torch.autocast("cuda", torch.bfloat16):
            loss = compiled(rows[:, :-1], rows[:, 1:])
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    torch.cuda.synchronize()
    times.append(time.perf_counter())
    spans = [b - a for a, b in itertools.pairwise(times[1:])]
    parameters = sum(p.numel() for p in model.parameters())
    flops = 6 * (parameters - VOCABULARY * D) + 6 * T * D * depth
    speed = 5 * B * T / statistics.median(spans)
    return {
        "case": case,
        "mode": "plain",
        "tokens_per_second": speed,
        "parameters": parameters,
        "flops_per_second": speed * flops,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def ceiling(case: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """FLOP/s of a bf16 matrix product of 8192³ on random data: a practical upper bound."""
    import torch
    from triton.testing import do_bench

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return {
        "case": case,
        "mode": "ceiling",
        "flops_per_second": 2 * 8192**3 / (do_bench(lambda: a @ b, return_mode="median") / 1e3),
    }


MODES = {"stack": stack, "deterministic": deterministic, "bare": bare, "plain": plain, "ceiling": ceiling}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="default full:340m:16, unless --peers is given")
    parser.add_argument("--peers", nargs="*", default=[], help="plain:SCALE:BATCH")
    parser.add_argument(
        "--modes",
        nargs="+",
        default=["stack"],
        choices=["stack", "deterministic", "bare"],
        help="how each case is trained",
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--corpus-bytes", type=int, default=60_000_000)
    parser.add_argument("--cache", default=str(ROOT / "results" / "benchmarks" / "cache"))
    parser.add_argument("--extra", default="{}", help="JSON merged into the fields of every run")
    parser.add_argument("--label", default="", help="name of the cases with these fields, such as moe")
    parser.add_argument("--profile", default="", help="file for a table of the kernels of the bare loop")
    parser.add_argument("--output", default=str(OUTPUT))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        mode, case = arguments.one.split("/", 1)
        print("RESULT " + json.dumps(MODES[mode](case, arguments)), flush=True)
        return
    if not arguments.cases and not arguments.peers:
        arguments.cases = ["full:340m:16"]
    jobs = ["ceiling/matrix product", *(f"{mode}/{case}" for case in arguments.cases for mode in arguments.modes)]
    jobs += [f"plain/{case}" for case in arguments.peers]
    results: list[dict[str, Any]] = []
    for job in jobs:
        start = time.time()
        result = {"case": job, **run_in_process(__file__, job)}
        if arguments.label:
            result |= {"case": f"{result['case']} {arguments.label}", "extra": json.loads(arguments.extra)}
        results.append({**result, "wall_seconds": round(time.time() - start, 1)})
        print(json.dumps(results[-1]), flush=True)
        merge_results(Path(arguments.output), results, lambda r: (r.get("mode"), r["case"]))
    ceiling_rate = next((r["flops_per_second"] for r in results if r.get("mode") == "ceiling"), None)
    print(
        f"\n{'mode':13s} {'case':28s} {'tokens/s':>10s} {'TFLOP/s':>8s} {'of ceiling':>10s} {'peak GiB':>9s} "
        f"{'first step s':>12s}"
    )
    for r in results:
        rate = r.get("flops_per_second", 0.0)
        print(
            f"{r.get('mode', '?'):13s} {r['case']:28s} {r.get('tokens_per_second', 0):10.0f} {rate / 1e12:8.1f} "
            f"{rate / ceiling_rate if ceiling_rate else 0:10.1%} {r.get('peak_gib', 0):9.1f} "
            f"{r.get('seconds_process_to_first_step', 0):12.1f}"
        )


if __name__ == "__main__":
    main()
