"""The delta rule on this GPU: our kernels for every variant, compared with the best matching kernel of
flash-linear-attention where that is installed.

    python benchmarks/delta_rule.py                              # 8 × 4096 and 1 × 32768, 8 heads of 128 × 128
    python benchmarks/delta_rule.py --shapes 4x8192x16x128 --variants gdn kda

bf16, forward alone and forward with backward; medians of triton.testing.do_bench. Our kernels are first compared with
the recurrence in fp64 on 300 tokens, gradients included, and not timed where they differ. fla searches launch options
at first use, for minutes. Results go to results/benchmarks/delta_rule.json, one entry per variant, shape and
implementation.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
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


def inputs(variant: str, B: int, T: int, H: int, K: int) -> dict[str, Tensor]:
    decay, has_beta, has_erase_key = VARIANTS[variant]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    def unit(x: Tensor) -> Tensor:
        return F.normalize(x.float(), dim=-1).bfloat16()

    tensors = {"q": unit(normal(B, T, H, K)) * K**-0.5, "p": unit(normal(B, T, H, K)), "z": normal(B, T, H, K)}
    if decay != "none":
        tensors["g"] = F.logsigmoid(torch.randn(*((B, T, H) if decay == "scalar" else (B, T, H, K)), device="cuda") + 3)
    if has_beta:
        tensors["beta_BTH"] = torch.rand(B, T, H, device="cuda")
    elif not has_erase_key:  # both keys are scaled by the root of a gate
        tensors["p"] = tensors["p"] * torch.rand(B, T, H, K, device="cuda", dtype=torch.bfloat16).sqrt()
    if has_erase_key:
        tensors["erase_key_BTHK"] = tensors["p"] * torch.rand(B, T, H, K, device="cuda", dtype=torch.bfloat16)
    return {name: x.detach().requires_grad_() for name, x in tensors.items()}


def ours(x: dict[str, Tensor], backend: str = "triton") -> Tensor:
    from workbench.ops.delta_rule import delta_rule

    erase_key, beta = x.get("erase_key_BTHK"), x.get("beta_BTH")
    return delta_rule(x["q"], x["p"], x["z"], x.get("g"), erase_key_BTHK=erase_key, beta_BTH=beta, backend=backend)[0]


def theirs(x: dict[str, Tensor]) -> Tensor:
    """The best matching kernel of fla. With a separate erase key that is `chunk_gdn2`, which applies the gates itself:
    the erase key is passed as its erase gate and q as its write gate, since only the time is measured."""
    if "erase_key_BTHK" not in x:
        return ours(x, "fla")
    from fla.ops.gdn2 import chunk_gdn2

    return chunk_gdn2(x["q"], x["p"], x["z"], x["g"], x["erase_key_BTHK"], x["q"].detach(), scale=1.0)[0]


def check(variant: str, K: int) -> tuple[float, str]:
    """Largest relative error of output and gradients on 300 tokens against the recurrence in fp64, and its tensor."""
    x = inputs(variant, 1, 300, 2, K)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in x.items()}
    actual, expected = ours(x), ours(exact, "recurrent")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["8x4096x8x128", "1x32768x8x128"], help="BxTxHxK")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--no-peers", action="store_true", help="our kernels only")
    parser.add_argument("--output", default=str(OUTPUT))
    arguments = parser.parse_args()
    from workbench.environment import environment, version

    where = {**environment(), "fla": version("fla-core"), "date": time.strftime("%Y-%m-%d")}
    results: list[dict[str, Any]] = []
    implementations = {"ours": ours} if arguments.no_peers else {"ours": ours, "fla": theirs}
    # ours first for every case: the search of fla can take longer than the time available
    for name, variant, shape in itertools.product(implementations, arguments.variants, arguments.shapes):
        B, T, H, K = map(int, shape.split("x"))
        row: dict[str, Any] = {"variant": variant, "shape": shape, "implementation": name}
        try:
            if name == "ours":
                error, tensor = check(variant, K)
                row |= {"relative_error": error, "of": tensor}
                if not error < ALLOWED:
                    raise RuntimeError(f"relative error {error:.1e} of {tensor}; not timed")
            row |= timed(implementations[name], inputs(variant, B, T, H, K))
        except Exception as problem:  # the other cases are still measured
            row["error"] = f"{type(problem).__name__}: {problem}"[:300]
        results.append(row)
        print(json.dumps(row), flush=True)
        report = {"environment": where, "results": results}
        Path(arguments.output).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
