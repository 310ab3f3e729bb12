"""Sparse attention on this GPU: our kernels, whole and in parts, compared with dense attention and NSA in fla.

    python benchmarks/sparse_attention.py                       # results/benchmarks/sparse_attention.json
    python benchmarks/sparse_attention.py --sections check layers

Sections, in this order; the file is written after every case:

check      every kernel form that is timed, at 2,048 tokens, in bf16 against the chunked form in fp64: values,
           gradients, and, in fp32, the selected sets. A form that fails is not timed.
attention  bf16, 16 query heads of 64, 1 and 4 key–value heads, at 8 × 4,096, 32,768 and 65,536 tokens: pooled blocks,
           selection and selected blocks together ("whole", as parallel_nsa of fla computes it) and each alone; the
           global layer of ASA on latents (keys of 96 channels whose first 64 are the values); a window of 512; cuDNN,
           FlexAttention, fla.
tune       (only on request) each kernel with other launch settings than those of
           workbench.ops.sparse_attention.kernels, on the shapes of the tables, fastest first, after the current ones.
           Settings that change the values are not timed.
layers     mixers of width 1,024 as in training (compiled, bf16 autocast): an ASA pair, two NSA layers, two full layers.
parts      the same layers by kernel: milliseconds per step on the device, from the profiler of torch.

Milliseconds are medians of triton.testing.do_bench (caches flushed between calls). "read_gb" is what programs must read
of the selected keys and values in one forward pass, not counting what neighbouring programs share.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
OUTPUT = ROOT / "results" / "benchmarks" / "sparse_attention.json"

from common import run_in_process  # noqa: E402

from workbench.environment import environment, version  # noqa: E402
from workbench.ops.dispatch import force_backend  # noqa: E402
from workbench.ops.sparse_attention import (  # noqa: E402
    Blocks,
    document_starts,
    select_blocks,
    selected_attention,
    unfold_blocks,
    visible_block_attention,
)

H = 16
LENGTHS = [(8, 4096), (1, 32_768), (1, 65_536)]
ALLOWED = 2e-2
"""Largest relative error of values and gradients in bf16."""


class Form(NamedTuple):
    """Block sizes, and channels of keys and values; where ``latent``, the values are channels of the keys."""

    name: str
    blocks: Blocks
    K: int = 64
    V: int = 64
    latent: bool = False


def forms() -> list[Form]:
    return [
        Form("block 64, top 16", Blocks(64, 64, 64, 16, 1, 2)),
        Form("block 16, top 64", Blocks(16, 16, 16, 64, 1, 2)),
        Form("block 16, top 64, one selection for 4", Blocks(16, 16, 16, 64, 1, 2, 4)),
        Form("latents, block 16, top 64, one selection for 4", Blocks(16, 16, 16, 64, 1, 2, 4), 96, 64, True),
    ]


def inputs(form: Form, B: int, T: int, G: int, dtype: torch.dtype = torch.bfloat16) -> list[Any]:
    shapes = [(B, T, H, form.K), (B, T, G, form.K), *([] if form.latent else [(B, T, G, form.V)])]
    tensors: list[Any] = [torch.randn(*shape, device="cuda").to(dtype).requires_grad_() for shape in shapes]
    return tensors + [None] * form.latent


def pooled(x: Any, blocks: Blocks) -> Any:
    return None if x is None else unfold_blocks(x, None, blocks.length, blocks.stride).mean(-1)


def call_options(form: Form, start: Any) -> dict[str, Any]:
    return {"start_BT": start, "value_dim": form.V}


def whole(form: Form, q: Any, k: Any, v: Any, start: Any, indices: Any = None) -> tuple[Any, Any, Any]:
    """(pooled output, selected output, indices)."""
    blocks, options = form.blocks, call_options(form, start)
    ck, cv = pooled(k, blocks), pooled(v, blocks)
    o_cmp, lse = visible_block_attention(q, ck, cv, length=blocks.length, stride=blocks.stride, **options)
    if indices is None:
        indices = select_blocks(q, ck, lse, blocks=blocks, start_BT=start, num_keys=q.shape[1])
    o_slc, _ = selected_attention(q, k, v, indices, block=blocks.block, reuse=blocks.reuse, **options)
    return o_cmp, o_slc, indices


def relative_error(actual: Any, expected: Any) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    finite = expected.isfinite()
    return float((actual - expected)[finite].norm() / expected[finite].norm())


def check(form: Form, G: int) -> dict[str, Any]:
    T = 2048
    start = document_starts(None, 1, T, torch.device("cuda"))
    single: list[Any] = [None if x is None else x.detach() for x in inputs(form, 1, T, G, torch.float32)]
    blocks, ck = form.blocks, pooled(single[1], form.blocks)
    options = {"length": blocks.length, "stride": blocks.stride, **call_options(form, start)}
    with force_backend("torch"):
        _, lse = visible_block_attention(single[0], ck, None if form.latent else ck[..., : form.V], **options)
    sets = []
    for backend in (None, "torch"):
        with force_backend(backend):
            sets.append(select_blocks(single[0], ck, lse, blocks=blocks, start_BT=start, num_keys=T))
    same_sets = float((sets[0] == sets[1]).all(-1).float().mean())
    half = [None if x is None else x.to(torch.bfloat16).requires_grad_() for x in single]
    exact = [None if x is None else x.detach().double().requires_grad_() for x in half]
    results: list[list[Any]] = []
    for backend, tensors in ((None, half), ("torch", exact)):
        with force_backend(backend):
            q, k, v = tensors
            o_cmp, o_slc, _ = whole(form, q, k, v, start, sets[1])
            if not results:
                weights = [torch.randn_like(o_cmp), torch.randn_like(o_slc)]
            loss = torch.stack([(o * w.to(o.dtype)).sum() for o, w in zip((o_cmp, o_slc), weights)]).sum()
            leaves = [x for x in tensors if x is not None]
            results.append([o_cmp, o_slc, *torch.autograd.grad(loss, leaves)])
    names = ("pooled", "selected", "dq", "dk", "dv")
    errors = {name: relative_error(a, b) for name, a, b in zip(names, *results)}
    passed = max(errors.values()) < ALLOWED and same_sets > 0.999
    case = {"section": "check", "form": form.name, "kv_heads": G}
    return {**case, "passed": passed, "same_sets": same_sets, "errors": errors}


def milliseconds(call: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return round(do_bench(call, warmup=20, rep=80, return_mode="median"), 3)


def timed(call: Callable[..., Any], tensors: list[Any]) -> dict[str, Any]:
    """Forward under no_grad, and forward with backward, of ``call(*tensors)``, which returns one tensor or several."""
    leaves = [x for x in tensors if x is not None]

    def both() -> None:
        outputs = call(*tensors)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs], allow_unused=True)

    try:
        with torch.no_grad():
            forward = milliseconds(lambda: call(*tensors))
        torch.cuda.reset_peak_memory_stats()
        return {
            "forward_ms": forward,
            "both_ms": milliseconds(both),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        }
    except Exception as error:  # a peer that is not installed, or runs out of memory, is a row with its error
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def ours(form: Form, B: int, T: int, G: int) -> list[dict[str, Any]]:
    tensors, blocks = inputs(form, B, T, G), form.blocks
    start = document_starts(None, B, T, torch.device("cuda"))
    case = {"section": "attention", "form": form.name, "batch": B, "tokens": T, "kv_heads": G}
    options = call_options(form, start)
    with torch.no_grad():
        ck = pooled(tensors[1], blocks)
        _, lse = visible_block_attention(
            tensors[0], ck, pooled(tensors[2], blocks), length=blocks.length, stride=blocks.stride, **options
        )
        indices = select_blocks(tensors[0], ck, lse, blocks=blocks, start_BT=start, num_keys=T)
        select_ms = milliseconds(lambda: select_blocks(tensors[0], ck, lse, blocks=blocks, start_BT=start, num_keys=T))
    read = B * T * G * blocks.selected * blocks.block * (form.K + (0 if form.latent else form.V)) * 2 / blocks.reuse
    flops = B * T * H * blocks.selected * blocks.block * 2 * (form.K + form.V)
    rows = [
        {**case, "op": "whole", **timed(lambda q, k, v: whole(form, q, k, v, start)[:2], tensors)},
        {**case, "op": "selection alone", "forward_ms": select_ms},
        {
            **case,
            "op": "selected blocks alone",
            "read_gb": round(read / 1e9, 2),
            "forward_tflop": round(flops / 1e12, 3),
            **timed(
                lambda q, k, v: selected_attention(q, k, v, indices, block=blocks.block, reuse=blocks.reuse, **options)[
                    0
                ],
                tensors,
            ),
        },
        {
            **case,
            "op": "pooled blocks alone",
            **timed(
                lambda q, k, v: visible_block_attention(
                    q, pooled(k, blocks), pooled(v, blocks), length=blocks.length, stride=blocks.stride, **options
                )[0],
                tensors,
            ),
        },
    ]
    return rows


def peers(B: int, T: int, G: int) -> list[dict[str, Any]]:
    tensors = inputs(Form("", Blocks(64, 64, 64, 16)), B, T, G)
    start = document_starts(None, B, T, torch.device("cuda"))
    case = {"section": "attention", "batch": B, "tokens": T, "kv_heads": G}
    rows = [
        {
            **case,
            "op": "our window of 512",
            **timed(lambda q, k, v: visible_block_attention(q, k, v, start_BT=start, window=512)[0], tensors),
        }
    ]

    def heads_first(*xs: Any) -> list[Any]:
        return [x.transpose(1, 2) for x in xs]

    if G == 1:  # dense peers with a key head per query head: the cost of full attention
        dense = [torch.randn(B, H, T, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def cudnn(q: Any, k: Any, v: Any) -> Any:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        rows.append({**case, "kv_heads": H, "op": "cuDNN, full", **timed(cudnn, dense)})
        rows.append({**case, "kv_heads": H, "op": "FlexAttention, window of 512", **timed(flex(T, dense), dense)})
        rows.append({**case, "op": "fla parallel_nsa, block 64, top 16, no window", **fla(tensors)})
    return rows


def flex(T: int, tensors: list[Any]) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def mask_mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (k <= q) & (q - k < 512)

    mask = create_block_mask(mask_mod, None, None, T, T, device="cuda", _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def fla(tensors: list[Any]) -> dict[str, Any]:
    try:
        from fla.ops.nsa.parallel import parallel_nsa
    except Exception as error:
        return {"error": f"not importable: {str(error)[:200]}"}
    B, T = tensors[0].shape[:2]
    gate = torch.ones(B, T, H, device="cuda", dtype=torch.bfloat16)

    def call(q: Any, k: Any, v: Any) -> Any:
        return parallel_nsa(q, k, v, g_cmp=gate, g_slc=gate, block_counts=16, block_size=64, window_size=0)

    return timed(call, tensors)


LAYERS = {
    "two full layers": ("full", "full"),
    "ASA pair": ("asa_local", "asa_global"),
    "two NSA layers": ("nsa", "nsa"),
}


def layer_pair(name: str, B: int, T: int) -> tuple[Callable[[Any], Any], Any]:
    """Two compiled layers in sequence, and an input."""
    from workbench.model import LanguageModel, ModelConfig

    kinds = LAYERS[name]
    heads = {"heads": 16, "head_dim": 64}
    pattern = " ".join(kinds)
    config = ModelConfig(
        scale="340m", depth=2, vocabulary=256, pattern=pattern, mixers={kind: heads for kind in set(kinds)}
    )
    torch._dynamo.reset()
    modules = [block.get_submodule("mixer") for block in LanguageModel(config, seed=0).cuda().blocks]
    calls = [torch.compile(module, fullgraph=True, dynamic=False) for module in modules]
    x = torch.randn(B, T, 1024, device="cuda", requires_grad=True)

    def pair(x: Any) -> Any:
        with torch.autocast(x.device.type, torch.bfloat16):
            return calls[1](calls[0](x))

    return pair, x


def layers(name: str, B: int, T: int) -> dict[str, Any]:
    pair, x = layer_pair(name, B, T)
    return {"section": "layers", "op": name, "batch": B, "tokens": T, **timed(pair, [x])}


def parts(name: str, B: int, T: int, steps: int = 5, shown: int = 20) -> list[dict[str, Any]]:
    """The slowest kernels of a forward and backward pass, all others in one row, and the sum."""
    from torch.profiler import ProfilerActivity, profile

    pair, x = layer_pair(name, B, T)

    def step() -> None:
        y = pair(x)
        torch.autograd.grad(y, [x], torch.ones_like(y), allow_unused=True)

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    case = {"section": "parts", "op": name, "batch": B, "tokens": T}
    kernels = sorted(
        ((e.self_device_time_total / 1e3 / steps, e.count / steps, e.key) for e in profiler.key_averages()),
        reverse=True,
    )

    def total(name: str, part: list[tuple[float, float, str]]) -> dict[str, Any]:
        times, calls, _ = zip(*part) if part else ((), (), ())
        return {**case, "kernel": name, "calls": sum(calls), "both_ms": round(sum(times), 3)}

    rows = [total(kernel[2][:90], [kernel]) for kernel in kernels[:shown]]
    return [*rows, total("all others", kernels[shown:]), total("sum", kernels)]


def grid(**choices: tuple[int, ...]) -> list[dict[str, int]]:
    return [dict(zip(choices, values)) for values in itertools.product(*choices.values())]


CANDIDATES: dict[str, list[dict[str, int]]] = {
    "selected_forward": [
        *grid(BN=(32, 64), num_warps=(1,), num_stages=(2, 3)),
        *grid(BN=(64,), num_warps=(2, 4), num_stages=(2, 3)),
        *grid(BN=(128,), num_warps=(4,), num_stages=(2,)),
        *grid(BN=(32,), num_warps=(1,), num_stages=(2,), maxnreg=(128,)),
    ],
    "selected_queries": [
        *grid(BN=(32,), num_warps=(1, 2), num_stages=(2, 3)),
        *grid(BN=(64,), num_warps=(2, 4), num_stages=(2, 3)),
        *grid(BN=(64,), num_warps=(8,), num_stages=(2,)),
    ],
    "selected_keys": [
        *grid(ROWS=(32, 64), num_warps=(1, 2), num_stages=(2,)),
        *grid(ROWS=(64, 128), num_warps=(4,), num_stages=(2, 3)),
        *grid(ROWS=(32,), num_warps=(1,), num_stages=(3,)),
        *grid(ROWS=(128,), num_warps=(8,), num_stages=(2,)),
    ],
    "visible_forward": [
        *grid(BT=(64, 128), BN=(64,), num_warps=(4,), num_stages=(2, 3)),
        *grid(BT=(128,), BN=(64, 128), num_warps=(8,), num_stages=(2, 3)),
    ],
    "visible_queries": [
        *grid(BT=(64,), BN=(64, 128), num_warps=(4,), num_stages=(2, 3)),
        *grid(BT=(128,), BN=(64,), num_warps=(4, 8), num_stages=(2, 3)),
    ],
    "visible_keys": [
        *grid(BT=(64,), BN=(64,), num_warps=(4,), num_stages=(1, 2, 3)),
        *grid(BT=(128,), BN=(64,), num_warps=(4, 8), num_stages=(2,)),
        *grid(BT=(64,), BN=(128,), num_warps=(4, 8), num_stages=(2,)),
        *grid(BT=(128,), BN=(128,), num_warps=(8,), num_stages=(1, 2)),
    ],
}
"""Settings that ``tune`` tries, one kernel at a time. Unsupported settings give a row with the error."""


class Shape(NamedTuple):
    """One call of ``tune``: selected blocks, pooled blocks or a window."""

    op: str
    form: Form
    G: int
    B: int = 8
    T: int = 4096
    window: int = 0


def shapes() -> list[Shape]:
    wide, _, _, latents = forms()
    separate = Form("keys of 96, values of 64", wide.blocks, 96)
    return [
        Shape("selected", latents, 4),
        Shape("selected", latents, 1),
        Shape("selected", wide, 1),
        Shape("selected", wide, 4),
        Shape("visible", latents, 4, 1, 65_536),
        Shape("visible", separate, H, 4, 8192, 512),
        Shape("visible", wide, 4, 1, 65_536),
    ]


def tune(shape: Shape) -> list[dict[str, Any]]:
    """Each kernel of a call with the current settings, then with those of CANDIDATES, fastest first; the settings of
    other kernels stay.

    Forward kernels are timed alone; the two kernels of a backward pass are timed within the whole pass.
    """
    from workbench.ops.sparse_attention import kernels
    from workbench.ops.sparse_attention.kernels.common import LAUNCH
    from workbench.ops.sparse_attention.kernels.selected import query_rows
    from workbench.ops.sparse_attention.layout import SelectedBlocks, VisibleBlocks, row_starts

    form, B, T, G = shape.form, shape.B, shape.T, shape.G
    tensors: list[Any] = [None if x is None else x.detach() for x in inputs(form, B, T, G)]
    q, k, v = tensors[:3]
    blocks, V, scale = form.blocks, form.V, form.K**-0.5
    start = document_starts(None, B, T, torch.device("cuda"))
    ck = pooled(k, blocks).contiguous()
    cv = None if v is None else pooled(v, blocks).contiguous()
    if shape.op == "selected":
        _, lse = visible_block_attention(
            q, ck, cv, start_BT=start, length=blocks.length, stride=blocks.stride, value_dim=V
        )
        indices = select_blocks(q, ck, lse, blocks=blocks, start_BT=start, num_keys=T)
        starts = row_starts(indices, start, blocks.block)
        sizes: tuple[Any, ...] = (V, SelectedBlocks(0, blocks.block, blocks.reuse, scale))
        forward: Callable[[], Any] = functools.partial(kernels.selected_forward, q, k, v, starts, start, *sizes)
        o, lse = forward()
        upstream = torch.randn_like(o), torch.zeros_like(lse)
        backward: Callable[[], Any] = functools.partial(
            kernels.selected_backward, *upstream, q, k, v, starts, start, o, lse, *sizes
        )
        rows = {
            "selected_forward": query_rows(blocks.reuse, H // G),
            "selected_keys": min(64, max(16, blocks.block)),
        }
        rows["selected_queries"] = rows["selected_forward"]
    else:
        keys, values = (k, v) if shape.window else (ck, cv)
        length, stride = (1, 1) if shape.window else (blocks.length, blocks.stride)
        sizes = (V, VisibleBlocks(0, length, stride, shape.window, scale, 0.0))
        forward = functools.partial(kernels.visible_forward, q, keys, values, start, *sizes)
        o, lse = forward()
        upstream = torch.randn_like(o), torch.zeros_like(lse)
        backward = functools.partial(kernels.visible_backward, *upstream, q, keys, values, start, o, lse, *sizes)
        rows = {}
    case = {"section": "tune", "form": form.name, "batch": B, "tokens": T, "kv_heads": G}
    expected = {call: [x.clone() for x in call()] for call in (forward, backward)}
    table: list[dict[str, Any]] = []
    for kernel in (name for name in CANDIDATES if name.startswith(shape.op)):
        call = forward if kernel.endswith("forward") else backward
        entry = f"{kernel} {rows[kernel]}" if kernel in rows else kernel
        current = LAUNCH.get(entry)
        table.append(
            {
                **case,
                "op": f"{entry}, current",
                "forward_ms": milliseconds(call),
                "settings": current or LAUNCH[kernel],
            }
        )
        tried: list[dict[str, Any]] = []
        for settings in CANDIDATES[kernel]:
            LAUNCH[entry] = settings
            row = {**case, "op": entry, "settings": settings}
            try:
                error = max(relative_error(a, b) for a, b in zip(call(), expected[call]) if b.numel())
                if error > ALLOWED:
                    tried.append({**row, "error": f"other values: relative error {error:.1e}"})
                else:
                    tried.append({**row, "forward_ms": milliseconds(call)})
            except Exception as problem:
                tried.append({**row, "error": f"{type(problem).__name__}: {str(problem)[:120]}"})
        if current is None:
            del LAUNCH[entry]
        else:
            LAUNCH[entry] = current
        table += sorted(tried, key=lambda row: float(row.get("forward_ms", "inf")))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="*", default=["check", "attention", "layers"])
    parser.add_argument("--lengths", nargs="*", help="BATCHxTOKENS, such as 8x4096; default 8x4096 1x32768 1x65536")
    parser.add_argument("--kv-heads", nargs="*", type=int, default=[1, 4])
    parser.add_argument("--output", default=str(OUTPUT))
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    lengths = [tuple(map(int, x.split("x"))) for x in arguments.lengths] if arguments.lengths else LENGTHS
    torch.manual_seed(0)
    if arguments.one is not None:
        print("RESULT", json.dumps({"rows": tune(shapes()[arguments.one])}))
        return
    rows: list[dict[str, Any]] = []
    start = time.time()

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print(f"{time.time() - start:6.1f} s", json.dumps(row), flush=True)
        where = {**environment(), "fla": version("fla-core"), "date": time.strftime("%Y-%m-%d")}
        path = Path(arguments.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps({"environment": where, "seconds": round(time.time() - start, 1), "rows": rows}, indent=1) + "\n"
        )

    failed = set()
    if "check" in arguments.sections:
        for form in forms():
            for G in arguments.kv_heads:
                try:
                    row = check(form, G)
                except Exception as error:
                    row = {
                        "section": "check",
                        "form": form.name,
                        "kv_heads": G,
                        "passed": False,
                        "error": f"{type(error).__name__}: {str(error)[:1500]}",
                    }
                add(row)
                if not row["passed"]:
                    failed.add((form.name, G))
    if "attention" in arguments.sections:
        for B, T in lengths:
            for G in arguments.kv_heads:
                for row in peers(B, T, G):
                    add(row)
                for form in forms():
                    if (form.name, G) in failed:
                        continue
                    for row in ours(form, B, T, G):
                        add(row)
                    torch.cuda.empty_cache()
    if "tune" in arguments.sections:
        for job, shape in enumerate(shapes()):  # an illegal memory access ends the process of one shape only
            result = run_in_process(__file__, str(job))
            for row in result.get(
                "rows",
                [
                    {
                        "section": "tune",
                        "op": shape.op,
                        "form": shape.form.name,
                        "batch": shape.B,
                        "tokens": shape.T,
                        "kv_heads": shape.G,
                        **result,
                    }
                ],
            ):
                add(row)
    if "layers" in arguments.sections:
        for B, T in ((4, 8192), (1, 32_768)):
            for name in LAYERS:
                add(layers(name, B, T))
    if "parts" in arguments.sections:
        for name in LAYERS:
            for row in parts(name, 4, 8192):
                add(row)
    print("\n| op | form | tokens | kv heads | forward / with backward, ms |\n|---|---|---|---|---|")
    for row in rows:
        if row["section"] != "check":
            shown = row.get("error", f"{row.get('forward_ms')} / {row.get('both_ms', '–')}")
            what = row.get("kernel", row.get("settings", row.get("form", "")))
            print(f"| {row['op']} | {what} | {row['batch']} × {row['tokens']} | {row.get('kv_heads', '')} | {shown} |")


if __name__ == "__main__":
    main()
