"""A mixture-of-experts layer beside the products it cannot do without, and beside a dense layer of equal active FLOPs, in one go.

    python benchmarks/moe.py                                   # 64 experts of 512 and 32 of 1024, 8 a token, 32,768 tokens
    python benchmarks/moe.py --shapes 1024x128x8x256 --tokens 65536
    python benchmarks/moe.py --smoke                           # tiny shapes on a CPU: whether it runs

bf16 by autocast over fp32 weights, blocks as in training: compiled whole. Forward with backward, router, permutation, balance loss
and counts included. `products` is the bare grouped product, up and down, with its gradients, on rows that stand sorted already and
weights that are bf16 already. `zero` chooses 12 of the experts and half as many zero-computation experts again, of which 8 are
expected to be real, beside a fixed top 12 without them: its bias is set so that a third of the choices are zero. Medians of
triton.testing.do_bench; the layer is first held against single experts in fp32 and not timed where it disagrees. Results go to
results/benchmarks/moe.json, one entry a shape and implementation; flops are those of the products, 3 x forward.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
OUTPUT = ROOT / "results" / "benchmarks" / "moe.json"
ALLOWED = 2e-2
"""Largest relative error of bf16 against single experts in fp32."""
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build(kind: str, width: int, **settings: Any) -> nn.Module:
    from workbench.contract import feedforwards

    cls = feedforwards[kind]
    module = cls(cls.Config.parse({"kind": kind, **settings}).resolved(width), width)
    with torch.no_grad():
        for owner in module.modules():
            for name, parameter in owner.named_parameters(recurse=False):
                owner.init_parameter(name, parameter, torch.Generator().manual_seed(parameter.numel()))
    return module.to(DEVICE)


Run = Callable[[Tensor], tuple[Tensor, ...]]


def layer(module: nn.Module, compiled: bool) -> Run:
    """The layer's output and its losses, counts taken as a training step does."""
    from workbench.contract import Side

    call = torch.compile(module, fullgraph=True, dynamic=False) if compiled else module

    def run(x_BTD: Tensor) -> tuple[Tensor, ...]:
        side = Side(watch=False)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            y_BTD = call(x_BTD, side=side)
        late = [counter.late_loss(counts, own) for counter, counts, own in side.counted]
        return y_BTD, *(loss for loss in [*side.losses, *late] if loss is not None)

    return run


def products(experts: int, top_k: int, width: int, hidden: int, tokens: int) -> tuple[Run, list[Tensor], Tensor]:
    """Both grouped products on as many rows for every expert."""
    from workbench.ops.experts.torch import grouped_mm

    rows = tokens * top_k
    ends_E = (torch.arange(1, experts + 1, device=DEVICE) * rows // experts).to(torch.int32)
    scale = width**-0.5
    up, down = (
        (torch.randn(shape, device=DEVICE) * scale).bfloat16().requires_grad_()
        for shape in ((experts, width, 2 * hidden), (experts, hidden, width))
    )
    x_RD = torch.randn(rows, width, device=DEVICE).bfloat16().requires_grad_()
    hidden_RF = torch.randn(rows, hidden, device=DEVICE).bfloat16().requires_grad_()

    def run(x: Tensor) -> tuple[Tensor, ...]:
        return grouped_mm(x, up, ends_E), grouped_mm(hidden_RF, down, ends_E)

    return run, [up, down, hidden_RF], x_RD


def timed(run: Run, leaves: list[Tensor], x: Tensor) -> dict[str, float]:
    """Milliseconds, and bytes held at the most above what was there before."""

    def both() -> Any:
        return torch.autograd.grad(run(x), [x, *leaves], upstream, allow_unused=True)

    begun = time.perf_counter()
    upstream = [torch.randn_like(part) for part in run(x)]
    both()
    if DEVICE.type == "cpu":
        start = time.perf_counter()
        both()
        return {"forward_backward_ms": 1e3 * (time.perf_counter() - start)}
    from triton.testing import do_bench

    torch.cuda.synchronize()
    first = time.perf_counter() - begun
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    peak = torch.cuda.max_memory_allocated() - before
    with torch.no_grad():
        forward = do_bench(lambda: run(x), warmup=50, rep=200, return_mode="median")
    return {
        "forward_ms": forward, "forward_backward_ms": do_bench(both, warmup=50, rep=400, return_mode="median"),
        "seconds_of_first_use": first, "bytes": peak,
    }  # fmt: skip


def check(settings: dict[str, Any], width: int, compiled: bool) -> float:
    """Largest relative error of output and gradients on 512 tokens against single experts in fp32, same choices."""
    fast, slow = build("moe", width, **settings), build("moe", width, **settings, backend="loop")
    x = torch.randn(1, 512, width, device=DEVICE).bfloat16().float().requires_grad_()
    direction = torch.randn_like(x)
    got = layer(fast, compiled)(x)[0]
    wanted = slow(x)
    pairs = [(got, wanted)]
    for a, b in zip(
        *(torch.autograd.grad((y * direction).sum(), [x, m.up, m.down]) for y, m in ((got, fast), (wanted, slow)))
    ):
        pairs.append((a, b))
    return max(float((a - b).detach().norm() / b.detach().norm()) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", default=["1024x64x8x512", "1024x32x8x1024"], help="width x experts x top_k x hidden"
    )
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, not compiled")
    parser.add_argument("--code", default=None, help="commit of the code, where this is not a git checkout")
    parser.add_argument("--output", default=str(OUTPUT))
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.shapes, arguments.tokens = ["64x8x4x32"], 256
    from workbench.environment import environment

    where = {**environment(), "date": time.strftime("%Y-%m-%d")}
    where["code"] = arguments.code or where["code"]
    results: list[dict[str, Any]] = []
    for shape in arguments.shapes:
        D, E, K, H = map(int, shape.split("x"))
        wide, T = K * 3 // 2, arguments.tokens
        base = {"experts": E, "top_k": K, "hidden": H}
        zero = {
            **base,
            "top_k": wide,
            "zero_experts": E // 2,
            "expected": float(K),
            "renormalise": False,
            "bias": "proportional",
        }
        plain = {"products": base, "moe": base, f"moe top {wide}": {**base, "top_k": wide}, "zero": zero, "dense": None}
        for name, settings in plain.items():
            torch._dynamo.reset()
            row: dict[str, Any] = {"shape": shape, "tokens": T, "implementation": name}
            flops = 3 * 2 * T * 3 * D * H * (wide if "top" in name else K)
            try:
                x = torch.randn(
                    8 if T % 8 == 0 else 1, T // (8 if T % 8 == 0 else 1), D, device=DEVICE
                ).requires_grad_()
                if name == "products":
                    run, leaves, x = products(E, K, D, H, T)
                else:
                    kind = "swiglu" if settings is None else "moe"
                    module = build(kind, D, **(settings or {"hidden": K * H}))
                    if name == "zero":  # as a controller would leave it on these tokens
                        balanced(module, x)
                        row["ffn_experts"] = realised(module, x)
                    if settings is not None:
                        row["relative_error"] = check(settings, D, not arguments.smoke)
                        if not row["relative_error"] < ALLOWED:
                            raise RuntimeError(f"wrong: relative error {row['relative_error']:.1e}; not timed")
                    run, leaves = layer(module, not arguments.smoke), list(module.parameters())
                row |= timed(run, leaves, x)
                row["tflops"] = flops / row["forward_backward_ms"] / 1e9
            except Exception as problem:  # the others are still wanted
                row["error"] = f"{type(problem).__name__}: {problem}"[:300]
            results.append(row)
            print(json.dumps(row), flush=True)
            Path(arguments.output).write_text(
                json.dumps({"environment": where, "results": results}, indent=1) + "\n", encoding="utf-8"
            )


@torch.no_grad()
def balanced(module: Any, x_BTD: Tensor) -> None:
    for step in range(300):
        counts = module.router(x_BTD.flatten(0, 1)).routes.counts
        module.router.move(counts, 1.0 - step / 300, 1.0, torch.ones((), device=DEVICE))


@torch.no_grad()
def realised(module: Any, x_BTD: Tensor) -> float:
    chosen_NK = module.router(x_BTD.flatten(0, 1)).chosen_NK
    return float((chosen_NK < module.config.experts).sum() / len(chosen_NK))


if __name__ == "__main__":
    main()
