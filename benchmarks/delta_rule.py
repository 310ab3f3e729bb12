"""The delta rule on this GPU: our kernels for every variant beside those of other packages, where they are installed.

    python benchmarks/delta_rule.py                              # 8 × 4096 and 1 × 32768, 8 heads of 128 × 128
    python benchmarks/delta_rule.py --shapes 4x8192x16x128 --variants gdn kda --decays gentle moderate strong
    python benchmarks/delta_rule.py --implementations ours flash_qla flash_qla:compiled

bf16, forward alone and forward with backward, eagerly (medians of triton.testing.do_bench) and from a CUDA graph, which
has no time of the host. Every implementation is first compared with the recurrence in fp64 on 300 tokens, gradients
included, and not timed where it differs. An implementation is "ours" or a peer (:mod:`workbench.ops.delta_rule.peers`);
with ":compiled" the operator is timed that compiled code calls. Each runs in a process of its own, since a failed
capture of a graph leaves its process unusable; what one does not cover is left out. fla searches launch options at
first use, for minutes. Results go to results/benchmarks/delta_rule.json, one entry per variant, shape, decay and
implementation.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import provenance, run_in_process
from torch import Tensor
from triton.testing import do_bench

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
OUTPUT = ROOT / "results" / "benchmarks" / "delta_rule.json"
ALLOWED = 1e-2
"""Largest relative error in bf16."""

VARIANTS = {
    # decay, whether there is one strength β per head, whether the erase key is separate from the write key
    "deltanet": ("none", True, False),
    "gdn": ("scalar", True, False),
    "kda": ("channel", True, False),
    "fg2_gdn": ("channel", False, False),
    "fg2_gdn_plus": ("channel", False, False),
    "gdn2": ("channel", False, True),
}

DECAYS = {"gentle": 7.0, "moderate": 3.0, "strong": 0.0}
"""Added to random numbers before a log-sigmoid: exp(g) is 0.999, 0.95 and 0.5 in the mean. Peers that truncate are
faster, and farther from the recurrence, the stronger the decay is."""
DEVICE = "cuda"


def inputs(variant: str, B: int, T: int, H: int, K: int, strength: str = "moderate") -> dict[str, Tensor]:
    decay, has_beta, has_erase_key = VARIANTS[variant]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)

    def unit(x: Tensor) -> Tensor:
        return F.normalize(x.float(), dim=-1).bfloat16()

    tensors = {"q": unit(normal(B, T, H, K)) * K**-0.5, "p": unit(normal(B, T, H, K)), "z": normal(B, T, H, K)}
    if decay != "none":
        shape = (B, T, H) if decay == "scalar" else (B, T, H, K)
        tensors["g"] = F.logsigmoid(torch.randn(*shape, device=DEVICE) + DECAYS[strength])
    if has_beta:
        tensors["beta_BTH"] = torch.rand(B, T, H, device=DEVICE)
    elif not has_erase_key:  # both keys are scaled by the root of a gate
        tensors["p"] = tensors["p"] * torch.rand(B, T, H, K, device=DEVICE, dtype=torch.bfloat16).sqrt()
    if has_erase_key:
        tensors["erase_key_BTHK"] = tensors["p"] * torch.rand(B, T, H, K, device=DEVICE, dtype=torch.bfloat16)
    return {name: x.detach().requires_grad_() for name, x in tensors.items()}


def ours(x: dict[str, Tensor], backend: str = "triton") -> Tensor:
    from workbench.ops.delta_rule import delta_rule

    erase_key, beta = x.get("erase_key_BTHK"), x.get("beta_BTH")
    return delta_rule(x["q"], x["p"], x["z"], x.get("g"), erase_key_BTHK=erase_key, beta_BTH=beta, backend=backend)[0]


def theirs(name: str) -> Callable[[dict[str, Tensor]], Tensor]:
    """The function of a peer; with ":compiled" the operator of compiled code.

    fla's for a separate erase key is `chunk_gdn2`, which applies the gates itself: the erase key is passed as its erase
    gate and q as its write gate, since only the time is measured.
    """
    backend, _, compiled = name.partition(":")
    from workbench.ops.delta_rule.peers import operator

    def call(x: dict[str, Tensor]) -> Tensor:
        if backend == "fla" and "erase_key_BTHK" in x:
            from fla.ops.gdn2 import chunk_gdn2

            return chunk_gdn2(x["q"], x["p"], x["z"], x["g"], x["erase_key_BTHK"], x["q"].detach(), scale=1.0)[0]
        optional = {key: x.get(key) for key in ("erase_key_BTHK", "beta_BTH")}
        return operator.compute(backend, x["q"], x["p"], x["z"], x.get("g"), **optional, compiled=bool(compiled))[0]

    return call


def obstacle(name: str, variant: str, shape: tuple[int, int, int, int]) -> str | None:
    """Why a peer does not cover a variant; None if it does."""
    from workbench.ops.delta_rule import peers

    backend, _, compiled = name.partition(":")
    decay, _, erase = VARIANTS[variant]
    kind = {"scalar": "head"}.get(decay, decay)
    facts = (*shape, shape[-1], kind, erase, False, bool(compiled))
    return peers.obstacle(peers.known_peers()[backend], peers.Call(torch.device(DEVICE, 0), torch.bfloat16, *facts))


def check(
    variant: str, K: int, call: Callable[[dict[str, Tensor]], Tensor] = ours, strength: str = "moderate"
) -> tuple[float, str]:
    """Largest relative error of output and gradients on 300 tokens against the recurrence in fp64, and its tensor."""
    x = inputs(variant, 1, 300, 2, K, strength)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in x.items()}
    actual, expected = call(x), ours(exact, "recurrent")
    direction = torch.randn_like(expected)
    pairs = {"o": (actual, expected)}
    for name, a, b in zip(
        x,
        torch.autograd.grad((actual * direction).sum(), list(x.values())),
        torch.autograd.grad((expected * direction).sum(), list(exact.values())),
    ):
        pairs[name] = (a, b)
    return max((float((a.double() - b).detach().norm() / b.detach().norm()), name) for name, (a, b) in pairs.items())


def timed(call: Callable[[dict[str, Tensor]], Tensor], x: dict[str, Tensor]) -> dict[str, float]:
    start = time.perf_counter()
    upstream = torch.randn_like(call(x))
    leaves = list(x.values())
    torch.autograd.grad(call(x), leaves, upstream, allow_unused=True)
    torch.cuda.synchronize()
    first_seconds = time.perf_counter() - start
    with torch.no_grad():
        forward = do_bench(lambda: call(x), warmup=20, rep=100, return_mode="median")
    both = do_bench(
        lambda: torch.autograd.grad(call(x), leaves, upstream, allow_unused=True),
        warmup=20,
        rep=200,
        return_mode="median",
    )
    return {"forward_ms": forward, "forward_backward_ms": both, "seconds_of_first_use": first_seconds}


def graph_ms(call: Callable[[], Any]) -> float:
    """Median of a call replayed from a CUDA graph.

    Raises:
        RuntimeError: if it cannot be captured.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return do_bench(graph.replay, warmup=20, rep=100, return_mode="median")


def timed_in_graphs(call: Callable[[dict[str, Tensor]], Tensor], x: dict[str, Tensor]) -> dict[str, float]:
    upstream, leaves = torch.randn_like(call(x)), list(x.values())

    def forward() -> None:
        with torch.no_grad():
            call(x)

    def both() -> None:
        torch.autograd.grad(call(x), leaves, upstream, allow_unused=True)

    return {"forward_graph_ms": graph_ms(forward), "forward_backward_graph_ms": graph_ms(both)}


def measure(implementation: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one implementation: all cases eagerly, then all from graphs, up to the first that fails."""
    call = ours if implementation == "ours" else theirs(implementation)
    rows = []
    for variant, size, strength in itertools.product(arguments.variants, arguments.shapes, arguments.decays):
        B, T, H, K = shape = tuple(map(int, size.split("x")))
        if VARIANTS[variant][0] == "none" and strength != arguments.decays[0]:
            continue  # it has no decay
        row: dict[str, Any] = dict(variant=variant, shape=size, decay=strength, implementation=implementation)
        if implementation != "ours" and obstacle(implementation, variant, shape):
            continue
        try:
            timing_only = implementation.startswith("fla") and VARIANTS[variant][2]
            error, tensor = (math.nan, "") if timing_only else check(variant, K, call, strength)
            if not timing_only:
                row |= {"relative_error": error, "of": tensor}
                if not error < ALLOWED:
                    raise RuntimeError(f"relative error {error:.1e} of {tensor}; not timed")
            row |= timed(call, inputs(variant, B, T, H, K, strength))
        except Exception as problem:  # the other cases are still measured
            row["error"] = f"{type(problem).__name__}: {problem}"[:300]
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    for row in rows:
        if "error" in row:
            continue
        try:
            B, T, H, K = map(int, row["shape"].split("x"))
            row |= timed_in_graphs(call, inputs(row["variant"], B, T, H, K, row["decay"]))
        except Exception as problem:
            row["graph_error"] = f"{type(problem).__name__}: {problem}"[:300]
            break
    return rows


def main() -> None:
    from workbench.environment import version
    from workbench.ops.delta_rule.peers import known_peers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["8x4096x8x128", "1x32768x8x128"], help="BxTxHxK")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--decays", nargs="+", default=["moderate"], choices=list(DECAYS))
    parser.add_argument(
        "--implementations",
        nargs="+",
        default=["ours", *(name for name in known_peers() if name != "fla"), "flash_qla:compiled", "fla"],
        help="fla last: its search can take longer than the time available",
    )
    parser.add_argument("--output", default=str(OUTPUT))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print("RESULT", json.dumps({"rows": measure(arguments.one, arguments)}))
        return
    where = provenance(fla=version("fla-core"))
    results: list[dict[str, Any]] = []
    for implementation in arguments.implementations:
        answer = run_in_process(__file__, implementation)
        results += answer.get("rows", [{"implementation": implementation, **answer}])
        report = {"environment": where, "results": results}
        Path(arguments.output).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(implementation, json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
