"""A mixture-of-experts layer compared with its matrix products alone and with a dense layer of equal active FLOPs.

    python benchmarks/moe.py                            # 64 experts of 512 and 32 of 1024, top 8, 32,768 tokens
    python benchmarks/moe.py --only products moe parts deterministic   # where the layer's time goes; about a minute
    python benchmarks/moe.py --shapes 1024x128x8x256 --tokens 65536
    python benchmarks/moe.py --smoke                    # tiny shapes on a CPU: checks that the script runs

bf16 autocast over fp32 weights, the layer compiled as a whole, as in training. Times are of forward and backward
passes, with router, permutation, balance loss and counts. Rows:

products       the grouped matrix products up and down and their gradients, on rows that are already sorted and weights
               that are already bf16
zero           top 12 with half as many zero-computation experts as experts, of which 8 choices are expected to be real,
               compared with a fixed top 12 without them; its bias is set so that a third of the choices are zero
part: …        a step of the layer other than its products, alone, with the bytes that it must at least move and the
               time for these at the rate of a large copy on this device (`floor_ms`; a step that reads from the L2
               cache can take less)
kernels        time per kernel in one forward and backward pass of the compiled layer
deterministic  the layer under torch.use_deterministic_algorithms, and whether two runs give the same bits

Medians of triton.testing.do_bench. The layer is first compared with single experts in fp32, and not timed where it
differs. Results go to results/benchmarks/moe.json, one entry per shape and implementation; FLOPs are those of the
products, 3 x forward.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
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
    modules: list[Any] = list(module.modules())
    with torch.no_grad():
        for submodule in modules:
            for name, parameter in submodule.named_parameters(recurse=False):
                submodule.init_parameter(name, parameter, torch.Generator().manual_seed(parameter.numel()))
    return module.to(DEVICE)


Run = Callable[[Tensor], tuple[Tensor, ...]]


def layer(module: nn.Module, compiled: bool) -> Run:
    """The layer's output and its losses, with counts as in a training step."""
    from workbench.contract import AuxOutputs

    call = torch.compile(module, fullgraph=True, dynamic=False) if compiled else module

    def run(x_BTD: Tensor) -> tuple[Tensor, ...]:
        aux = AuxOutputs(collect_metrics=False)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            y_BTD = call(x_BTD, aux=aux)
        step_losses = [counter.step_loss(counts, loss_input) for counter, counts, loss_input in aux.counts]
        return y_BTD, *(loss for loss in [*aux.losses, *step_losses] if loss is not None)

    return run


def products(experts: int, top_k: int, width: int, hidden: int, tokens: int) -> tuple[Run, list[Tensor], Tensor]:
    """Both grouped products, with an equal number of rows for every expert."""
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


def timed(run: Run, leaves: Sequence[Tensor], x: Tensor) -> dict[str, float]:
    """Milliseconds, and the peak of allocated bytes above those allocated before."""

    def both() -> Any:
        return torch.autograd.grad(run(x), [x, *leaves], upstream, allow_unused=True)

    start = time.perf_counter()
    upstream = [torch.randn_like(part) for part in run(x)]
    both()
    if DEVICE.type == "cpu":
        start = time.perf_counter()  # the first call is not timed
        both()
        return {"forward_backward_ms": 1e3 * (time.perf_counter() - start)}
    from triton.testing import do_bench

    torch.cuda.synchronize()
    first_seconds = time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()
    bytes_before = torch.cuda.memory_allocated()
    both()
    peak = torch.cuda.max_memory_allocated() - bytes_before
    with torch.no_grad():
        forward = do_bench(lambda: run(x), warmup=50, rep=200, return_mode="median")
    return {
        "forward_ms": forward,
        "forward_backward_ms": do_bench(both, warmup=50, rep=400, return_mode="median"),
        "seconds_of_first_use": first_seconds,
        "bytes": peak,
    }


def copy_rate() -> float:
    """Bytes read and written per second in a copy of 1 GiB."""
    if DEVICE.type == "cpu":
        return 1e10
    from triton.testing import do_bench

    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * 2**30 / do_bench(lambda: target.copy_(source), return_mode="median") * 1e3


def parts(module: Any, x_BTD: Tensor) -> dict[str, tuple[Run, list[Tensor], Tensor, int]]:
    """The layer's steps other than the products: a call, its other leaves, its input, and the bytes that it must move
    forward and backward."""
    from workbench.ops.experts import routing
    from workbench.ops.experts.torch import swiglu_grouped

    x_ND = x_BTD.detach().flatten(0, 1)
    (N, D), (E, _, F2) = x_ND.shape, module.up.shape
    with torch.no_grad():
        decision = module.router(x_ND)
    routes, counts_E = decision.routes, decision.routes.counts[:E]
    R, F = routes.order_R.numel(), F2 // 2
    real = int(counts_E.sum())

    def rows(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE).bfloat16().requires_grad_()

    weight_R = torch.rand(R, device=DEVICE).requires_grad_()
    compile_on_gpu = torch.compile if DEVICE.type == "cuda" else lambda call, **_: call
    router = compile_on_gpu(lambda x: module.router(x).topk_scores_NK, fullgraph=True, dynamic=False)
    casts = compile_on_gpu(lambda up, down: (up.bfloat16(), down.bfloat16()), dynamic=False)

    def scores(x: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return (router(x),)

    x_fp32_ND = x_ND.clone().requires_grad_()
    return {
        "router": (scores, [module.router.weight], x_fp32_ND, 3 * 4 * N * D),
        "dispatch": (lambda x: (routing.dispatch(x, routes, E),), [], rows(N, D), 2 * 2 * (N + real) * D),
        "swiglu": (
            lambda x: (swiglu_grouped(x, counts_E, weight_R, all_rows=real == R),),
            [weight_R],
            rows(R, F2),
            2 * 8 * real * F,
        ),
        "combine": (lambda x: (routing.combine(x, routes, E),), [], rows(R, D), 2 * 2 * (N + real) * D),
        "casts": (
            lambda x: casts(x, module.down),
            [module.down],
            module.up,
            12 * (module.up.numel() + module.down.numel()),
        ),
    }


def kernels(run: Run, leaves: Sequence[Tensor], x: Tensor, repeats: int = 5) -> dict[str, float]:
    """Milliseconds per kernel name in one forward and backward pass; kernels below 1 % are summed as "others"."""
    from torch.profiler import ProfilerActivity, profile

    upstream = [torch.randn_like(part) for part in run(x)]

    def both() -> None:
        torch.autograd.grad(run(x), [x, *leaves], upstream, allow_unused=True)

    both()
    activity = ProfilerActivity.CUDA if DEVICE.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        for _ in range(repeats):
            both()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
    times: Counter[str] = Counter()
    for event in profiler.key_averages():
        times[event.key[:100]] += event.self_device_time_total if DEVICE.type == "cuda" else event.self_cpu_time_total
    total = sum(times.values())
    shown = {name: time / repeats / 1e3 for name, time in times.most_common() if time > total / 100}
    return {"total": total / repeats / 1e3, **shown, "others": total / repeats / 1e3 - sum(shown.values())}


def deterministic(module: nn.Module, x: Tensor, compiled: bool) -> dict[str, Any]:
    """Times as in a run with ``training.deterministic``, and whether two passes give the same bits."""
    import torch._inductor.config as inductor

    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    inductor.deterministic = True
    try:
        run, leaves = layer(module, compiled), list(module.parameters())
        row: dict[str, Any] = timed(run, leaves, x)
        upstream = [torch.randn_like(part) for part in run(x)]
        bits = []
        for _ in range(2):
            outputs = run(x)
            bits.append([*outputs, *torch.autograd.grad(outputs, [x, *leaves], upstream, allow_unused=True)])
        row["same_bits"] = all(a is b if a is None else torch.equal(a, b) for a, b in zip(*bits))
        return row
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
        inductor.deterministic = False


def check(settings: dict[str, Any], width: int, compiled: bool) -> float:
    """Largest relative error of output and gradients on 512 tokens against single experts in fp32."""
    fast: Any = build("moe", width, **settings)
    slow: Any = build("moe", width, **settings, backend="loop")
    x = torch.randn(1, 512, width, device=DEVICE).bfloat16().float().requires_grad_()
    direction = torch.randn_like(x)
    outputs = layer(fast, compiled)(x)[0], slow(x)
    gradients = [
        torch.autograd.grad((y * direction).sum(), [x, module.up, module.down])
        for y, module in zip(outputs, (fast, slow))
    ]
    pairs = [outputs, *zip(*gradients)]
    return max(float((a - b).detach().norm() / b.detach().norm()) for a, b in pairs)


KINDS = ("products", "moe", "top", "zero", "dense", "parts", "deterministic")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", default=["1024x64x8x512", "1024x32x8x1024"], help="width x experts x top_k x hidden"
    )
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, help="rows to measure; default: all")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, not compiled")
    parser.add_argument("--output", default=str(OUTPUT))
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.shapes, arguments.tokens = ["64x8x4x32"], 256
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first matrix product
    from workbench.environment import environment

    where = {**environment(), "date": time.strftime("%Y-%m-%d")}
    results: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        results.append(row)
        print(json.dumps(row), flush=True)
        Path(arguments.output).write_text(
            json.dumps({"environment": where, "results": results}, indent=1) + "\n", encoding="utf-8"
        )

    rate = copy_rate()
    for shape in arguments.shapes:
        D, E, K, H = map(int, shape.split("x"))
        wide, T, compiled = K * 3 // 2, arguments.tokens, not arguments.smoke
        base = {"experts": E, "top_k": K, "hidden": H}
        zero = {
            **base,
            "top_k": wide,
            "zero_experts": E // 2,
            "expected_experts": float(K),
            "renormalise": False,
            "bias": "proportional",
        }
        plain: dict[str, Any] = {
            "products": base,
            "moe": base,
            f"moe top {wide}": {**base, "top_k": wide},
            "zero": zero,
            "dense": None,
            "deterministic": base,
        }
        for name, settings in plain.items():
            if ("top" if "top" in name else name) not in arguments.only:
                continue
            torch._dynamo.reset()
            row: dict[str, Any] = {"shape": shape, "tokens": T, "implementation": name}
            flops = 3 * 2 * T * 3 * D * H * (wide if "top" in name else K)
            try:
                B = 8 if T % 8 == 0 else 1
                x = torch.randn(B, T // B, D, device=DEVICE).requires_grad_()
                if name == "products":
                    row |= timed(*products(E, K, D, H, T))
                else:
                    module = build("swiglu" if settings is None else "moe", D, **(settings or {"hidden": K * H}))
                    if name == "zero":  # as the bias controller leaves it on these tokens
                        balance(module, x)
                        row["ffn_experts"] = experts_per_token(module, x)
                    if name == "deterministic":
                        row |= deterministic(module, x, compiled)
                    else:
                        if settings is not None:
                            row["relative_error"] = check(settings, D, compiled)
                            if not row["relative_error"] < ALLOWED:
                                raise RuntimeError(f"relative error {row['relative_error']:.1e}; not timed")
                        run, leaves = layer(module, compiled), list(module.parameters())
                        row |= timed(run, leaves, x)
                row["tflops"] = flops / row["forward_backward_ms"] / 1e9
            except Exception as problem:  # the other rows are still measured
                row["error"] = f"{type(problem).__name__}: {problem}"[:300]
            add(row)
            if name == "moe" and "error" not in row and "parts" in arguments.only:
                row = {"shape": shape, "tokens": T, "implementation": "kernels"}
                try:
                    row["kernels_ms"] = kernels(run, leaves, x)
                except Exception as problem:
                    row["error"] = f"{type(problem).__name__}: {problem}"[:300]
                add(row)
                for part, (call, others, part_input, least) in parts(module, x).items():
                    row = {"shape": shape, "tokens": T, "implementation": f"part: {part}", "bytes_least": least}
                    try:
                        row |= timed(call, others, part_input) | {"floor_ms": least / rate * 1e3}
                    except Exception as problem:
                        row["error"] = f"{type(problem).__name__}: {problem}"[:300]
                    add(row)


@torch.no_grad()
def balance(module: Any, x_BTD: Tensor) -> None:
    """Update the selection bias for 300 steps on the same tokens."""
    for step in range(300):
        counts = module.router(x_BTD.flatten(0, 1)).routes.counts
        module.router.update_state(counts, 1.0 - step / 300, 1.0, torch.ones((), device=DEVICE))


@torch.no_grad()
def experts_per_token(module: Any, x_BTD: Tensor) -> float:
    """Mean number of real experts per token."""
    chosen_NK = module.router(x_BTD.flatten(0, 1)).topk_expert_ids_NK
    return float((chosen_NK < module.config.experts).sum() / len(chosen_NK))


if __name__ == "__main__":
    main()
