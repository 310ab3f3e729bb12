"""The delta rule in torch on a CPU, compared with the fallback of transformers for the gated delta rule.

    python benchmarks/delta_rule_cpu.py                       # transformers is timed where it is installed
    python benchmarks/delta_rule_cpu.py --threads 2 --shapes 1x2048x8x128

fp32, forward and backward. The implementations alternate, so that other load on the machine affects all of them.
Figures are medians over the rounds of wall-clock time and of the process's CPU time, which is more reliable on a busy
machine. Every output is first compared with the recurrence. Results go to results/benchmarks/delta_rule_cpu.json.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
OUTPUT = ROOT / "results" / "benchmarks" / "delta_rule_cpu.json"
THEIRS = "transformers, gated delta rule"


def implementations(chunks: list[int]) -> dict[str, tuple[str, Callable[..., Any]]]:
    """Name -> (decay, call); a call takes q (scaled), k, v, g, β and returns outputs and state."""
    from workbench.ops.delta_rule import delta_rule

    calls: dict[str, tuple[str, Callable[..., Any]]] = {}
    try:
        from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule
    except ImportError as error:
        print(f"transformers is not timed: {error}")
    else:
        fallback = inspect.unwrap(torch_chunk_gated_delta_rule)

        def theirs(q: Any, k: Any, v: Any, g: Any, beta: Any) -> Any:
            return fallback(q * q.shape[-1] ** 0.5, k, v, g=g, beta=beta, output_final_state=True)

        calls[THEIRS] = ("scalar", theirs)
    for decay in ("scalar", "channel"):
        for chunk in chunks:

            def ours(q: Any, k: Any, v: Any, g: Any, beta: Any, chunk: int = chunk) -> Any:
                return delta_rule(q, k, v, g, beta_BTH=beta, chunk=chunk, backend="torch")

            calls[f"ours, {decay} decay, chunk {chunk}"] = (decay, ours)
    return calls


def inputs(B: int, T: int, H: int, K: int, decay: str) -> list[Any]:
    import torch
    from torch.nn import functional as F

    shape = (B, T, H, K) if decay == "channel" else (B, T, H)
    tensors = [
        torch.randn(B, T, H, K) / K**0.5,
        F.normalize(torch.randn(B, T, H, K), dim=-1),
        torch.randn(B, T, H, K),
        -torch.rand(shape),
        torch.rand(B, T, H),
    ]
    return [x.requires_grad_() for x in tensors]


def once(call: Callable[..., Any], tensors: list[Any], upstream: Any) -> dict[str, float]:
    import torch

    start = time.perf_counter(), time.process_time()
    out, _ = call(*tensors)
    middle = time.perf_counter(), time.process_time()
    torch.autograd.grad(out, tensors, upstream)
    end = time.perf_counter(), time.process_time()
    return {
        "forward_ms": 1e3 * (middle[0] - start[0]),
        "both_ms": 1e3 * (end[0] - start[0]),
        "forward_cpu_ms": 1e3 * (middle[1] - start[1]),
        "both_cpu_ms": 1e3 * (end[1] - start[1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=["1x2048x8x128", "4x2048x8x64"], help="BxTxHxK, V = K")
    parser.add_argument("--chunks", nargs="*", type=int, default=[32, 64])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default=str(OUTPUT))
    arguments = parser.parse_args()
    import torch

    from workbench.environment import environment, version
    from workbench.ops.delta_rule.reference import delta_rule_recurrent

    torch.set_num_threads(arguments.threads)
    calls, results = implementations(arguments.chunks), []
    for text in arguments.shapes:
        B, T, H, K = map(int, text.split("x"))
        tensors = {decay: inputs(B, T, H, K, decay) for decay in ("scalar", "channel")}
        upstream = torch.randn(B, T, H, K)
        errors = {}
        with torch.no_grad():
            for decay, (q, k, v, g, beta) in tensors.items():
                exact, _ = delta_rule_recurrent(*(x.double() for x in (q, k, v, g)), beta_BTH=beta.double())
                for name, (call_decay, call) in calls.items():
                    if call_decay == decay:
                        actual, _ = call(q, k, v, g, beta)
                        errors[name] = float((actual - exact).norm() / exact.norm())
                        assert errors[name] < 1e-5, f"{name}: relative error {errors[name]:.1e}"
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
        for number in range(arguments.rounds + 1):
            for name, (decay, call) in calls.items():
                measured = once(call, tensors[decay], upstream)
                if number:  # the first round is a warm-up
                    rounds[name].append(measured)
        for name, rows in rounds.items():
            medians = {key: round(statistics.median(row[key] for row in rows), 2) for key in rows[0]}
            row: dict[str, Any] = {"case": name, "shape": text, "relative_error": errors[name], **medians}
            if THEIRS in rounds:
                ratios = [theirs["both_ms"] / ours["both_ms"] for theirs, ours in zip(rounds[THEIRS], rows)]
                cpu = [theirs["both_cpu_ms"] / ours["both_cpu_ms"] for theirs, ours in zip(rounds[THEIRS], rows)]
                row["times_as_fast"] = round(statistics.median(ratios), 2)
                row["times_as_fast_cpu"] = round(statistics.median(cpu), 2)
            results.append(row)
            print(json.dumps(row), flush=True)
    where = {**environment(), "date": time.strftime("%Y-%m-%d"), "transformers": version("transformers")}
    path = Path(arguments.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": where, "rounds": arguments.rounds, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
