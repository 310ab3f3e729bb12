"""A step's attention over a long cache on this GPU: policies that read a part of it, compared with dense attention.

    python benchmarks/decoding.py                                   # results/benchmarks/decoding_operators.json
    python benchmarks/decoding.py --sections table --batches 8 --contexts 98304
    python benchmarks/decoding.py --sections sweep table            # with the fastest launch settings

From queries to outputs, without projections and without writing new tokens to caches and indices, in bf16, captured in
a CUDA graph of several layers whose inputs differ, so that no layer finds its inputs in the L2 cache. Milliseconds are
medians over replays, divided by layers.

gqa     32 query heads, 8 groups of 128 channels; token index of 32 channels
mla     32 heads that share a latent of 512 channels and 64 rotated ones; token index of 128 channels

dense       the fastest of: SDPA (flash, cuDNN, efficient), our split-KV kernel, two matrix products around a softmax
quest       (B3) minmax blocks of 64, as in the comparison of AsyncTLS (arXiv 2604.07815), and of 16, as published
            (arXiv 2406.10774)
double_sparsity (B2) four-bit channels of every token
two_level   (AsyncTLS) minmax or mean blocks of 64, 8,192 candidates in four-bit channels; synchronous, lagged, and
            lagged with the choice of blocks on a stream of its own

All keep 1,024 tokens, of which the first 16 and the newest 64 whatever their score. "bytes" is what one step must read;
"of_bandwidth" the share of 4.2 TB/s at which it does. "times" is the speed over that of dense attention, and of each
policy that is compared with, in the same run. On a CPU the operators run in their plain forms, once each, to check this
script: --batches 1 --contexts 8192.

sweep runs each kernel with other launch settings than those of workbench.ops.sparse_decoding.kernels, and prints the
fastest first. ``--compile`` only compiles, so that several processes can fill Triton's cache ahead.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
OUTPUT = ROOT / "results" / "benchmarks" / "decoding_operators.json"

from common import provenance, synchronise  # noqa: E402

from workbench.ops.sparse_decoding import (  # noqa: E402
    Forced,
    Searched,
    TokenKeys,
    channel_tokens,
    gathered_attention,
    mean_blocks,
    minmax_blocks,
    new_tickets,
    quantised,
)

BANDWIDTH = 4.2e12
BLOCK, CANDIDATES, KEPT, FORCED = 64, 8192, 1024, Forced(16, 64)
CONTEXTS = [32_768, 49_152, 65_536, 98_304, 131_072]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Form(NamedTuple):
    """Query heads, groups, channels of keys and of what all groups share, channels of the token index."""

    H: int
    G: int
    K: int
    shared: int
    c: int

    @property
    def scale(self) -> float:
        return (192 if self.shared else self.K) ** -0.5

    def row_bytes(self) -> int:
        """Of a token, all groups."""
        return 2 * (self.K + self.shared if self.shared else 2 * self.G * self.K)


FORMS = {"gqa": Form(32, 8, 128, 0, 32), "mla": Form(32, 1, 512, 64, 128)}


class Layer(NamedTuple):
    """Inputs of one layer."""

    form: Form
    q: Tensor
    k: Tensor
    v: Tensor | None
    shared: Tensor | None
    lengths: Tensor
    upper: Tensor
    lower: Tensor
    means: Tensor | None
    keys: TokenKeys
    previous: Tensor
    tickets: tuple[Tensor, Tensor]
    every_key: Tensor
    """(B, S, G, K) with the shared channels."""


def layer_of(form: Form, B: int, S: int, means: bool) -> Layer:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)

    k, shared = random(B, S, form.G, form.K), random(B, S, 1, form.shared) if form.shared else None
    v, q = None if form.shared else random(B, S, form.G, form.K), random(B, form.H, form.K + form.shared)
    keys = k if shared is None else torch.cat((k, shared), dim=-1)
    blocks = keys.unflatten(1, (-1, BLOCK))
    upper, lower = (x.transpose(1, 2).contiguous() for x in (blocks.amax(2), blocks.amin(2)))
    mean = keys.unflatten(1, (-1, 8)).mean(2).transpose(1, 2).contiguous() if means else None
    channels = torch.stack([torch.randperm(keys.shape[-1])[: form.c].sort().values for _ in range(form.G)]).to(DEVICE)
    chosen = [keys[b].transpose(0, 1).gather(-1, channels[:, None].expand(-1, S, -1)) for b in range(B)]
    packed = [quantised(x) for x in chosen]
    codes, steps = torch.stack([x[0] for x in packed]), torch.stack([x[1] for x in packed])
    lengths = torch.full((B,), S, device=DEVICE)
    tickets = (new_tickets(B, form.H, DEVICE), new_tickets(B, form.H, DEVICE))
    previous = minmax_blocks(
        random(*q.shape), upper, lower, lengths - 1, block=BLOCK, count=CANDIDATES // BLOCK, forced=FORCED
    )
    return Layer(
        form, q, k, v, shared, lengths, upper, lower, mean, TokenKeys(codes, steps, channels), previous, tickets, keys
    )


# -- what is compared ------------------------------------------------------------------------------------------------


def attend(x: Layer, tokens: Tensor, block: int = 1) -> Tensor:
    return gathered_attention(
        x.q,
        x.k,
        x.v,
        tokens,
        block=block,
        lengths_B=x.lengths,
        shared_BS1R=x.shared,
        scale=x.form.scale,
    )


def blocks_of(x: Layer, count: int, ticket: int = 0) -> Tensor:
    options: dict[str, Any] = {"block": BLOCK, "count": count, "forced": FORCED, "tickets": x.tickets[ticket]}
    return minmax_blocks(x.q, x.upper, x.lower, x.lengths, **options)


def tokens_in(x: Layer, searched: Searched | None) -> Tensor:
    return channel_tokens(
        x.q,
        x.keys,
        x.lengths,
        searched=searched,
        scale=x.form.scale,
        count=KEPT,
        forced=FORCED,
        tickets=x.tickets[0],
    )


def quest(x: Layer) -> Tensor:
    return attend(x, blocks_of(x, KEPT // BLOCK), BLOCK)


def quest_16(x: Layer) -> Tensor:
    blocks = minmax_blocks(
        x.q, x.upper, x.lower, x.lengths, block=16, count=KEPT // 16, forced=FORCED, tickets=x.tickets[0]
    )
    return attend(x, blocks, 16)


def double_sparsity(x: Layer) -> Tensor:
    return attend(x, tokens_in(x, None))


def two_level(x: Layer) -> Tensor:
    return attend(x, tokens_in(x, Searched(blocks_of(x, CANDIDATES // BLOCK), None, BLOCK, False)))


def two_level_mean(x: Layer) -> Tensor:
    assert x.means is not None
    options: dict[str, Any] = {"sub_block": 8, "scale": x.form.scale, "forced": FORCED, "tickets": x.tickets[0]}
    blocks = mean_blocks(x.q, x.means, x.lengths, block=BLOCK, count=CANDIDATES // BLOCK, **options)
    return attend(x, tokens_in(x, Searched(blocks, None, BLOCK, False)))


def lagged(x: Layer) -> Tensor:
    blocks_of(x, CANDIDATES // BLOCK)
    return attend(x, tokens_in(x, Searched(x.previous, None, BLOCK, True)))


SIDE: list[Any] = []


def lagged_beside(x: Layer) -> Tensor:
    """The choice of blocks, which only the next step needs, beside everything else."""
    if not SIDE:
        return lagged(x)
    main = torch.cuda.current_stream()
    SIDE[0].wait_stream(main)
    with torch.cuda.stream(SIDE[0]):
        blocks_of(x, CANDIDATES // BLOCK, 1)
    return attend(x, tokens_in(x, Searched(x.previous, None, BLOCK, True)))


def sdpa(x: Layer, backend: str) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    v = x.every_key if x.v is None else x.v  # of equal width; the rotated channels are cut off
    with sdpa_kernel(getattr(SDPBackend, backend)):
        return F.scaled_dot_product_attention(
            x.q[:, :, None], x.every_key.transpose(1, 2), v.transpose(1, 2), scale=x.form.scale, enable_gqa=True
        )[:, :, 0, : x.form.K]


def products(x: Layer) -> Tensor:
    """Two matrix products; the latent ones read latents twice."""
    B, H, K = x.q.shape
    G = x.form.G
    q = x.q.view(B, G, H // G, K)
    k, v = x.k.transpose(1, 2), (x.k if x.v is None else x.v).transpose(1, 2)
    scores = q[..., : x.form.K] @ k.transpose(2, 3)
    if x.shared is not None:
        scores = scores + q[..., x.form.K :] @ x.shared.transpose(1, 2).transpose(2, 3)
    return ((scores.float() * x.form.scale).softmax(-1).to(v.dtype) @ v).flatten(1, 2)


def split_kv(x: Layer) -> Tensor:
    from workbench.ops.decode_attention import decode_attention

    options: dict[str, Any] = {"scale": x.form.scale, "shared_BS1R": x.shared}
    return decode_attention(x.q, x.k, x.v, x.lengths, **options)[0]


def split_every_token(x: Layer) -> Tensor:
    """The kernel of chosen tokens, given every block."""
    every = torch.arange(x.k.shape[1] // BLOCK, device=DEVICE).expand(len(x.q), x.form.G, -1).contiguous()
    return attend(x, every, BLOCK)


DENSE: dict[str, Callable[[Layer], Tensor]] = {
    "SDPA flash": lambda x: sdpa(x, "FLASH_ATTENTION"),
    "SDPA cuDNN": lambda x: sdpa(x, "CUDNN_ATTENTION"),
    "SDPA efficient": lambda x: sdpa(x, "EFFICIENT_ATTENTION"),
    "split-KV": split_kv,
    "two products": products,
    "every block": split_every_token,
}
PEERS: dict[str, Callable[[Layer], Tensor]] = {
    "quest 64": quest,
    "quest 16": quest_16,
    "double_sparsity": double_sparsity,
}
LEVELS: dict[str, Callable[[Layer], Tensor]] = {
    "two_level": two_level,
    "two_level lagged": lagged,
    "two_level lagged, own stream": lagged_beside,
    "two_level mean": two_level_mean,
}


def bytes_of(name: str, form: Form, S: int) -> float:
    """Bytes that a step of one sequence must read."""
    channels, rows = form.G * (form.K + form.shared), KEPT * form.row_bytes()
    minmax, codes = 2 * 2 * channels, form.G * (form.c // 2 + 2)
    if name.startswith("quest"):
        return S / int(name.split()[1]) * minmax + rows
    if name == "double_sparsity":
        return S * codes + rows
    if name.startswith("two_level"):
        index = S / 8 * 2 * channels if name.endswith("mean") else S / BLOCK * minmax
        return index + CANDIDATES * codes + rows
    return S * form.row_bytes()


# -- measuring -------------------------------------------------------------------------------------------------------


def captured(call: Callable[[Layer], Any], layers: list[Layer]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for x in layers[:2]:
            call(x)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for x in layers:
            call(x)
        if SIDE and call is lagged_beside:
            torch.cuda.current_stream().wait_stream(SIDE[0])
    return graph


def milliseconds(call: Callable[[Layer], Any], layers: list[Layer], repeats: int = 15) -> float:
    if DEVICE.type == "cpu":
        started = time.perf_counter()
        for x in layers:
            call(x)
        return 1e3 * (time.perf_counter() - started) / len(layers)
    graph = captured(call, layers)
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / len(layers))
    return statistics.median(times)


def error_of(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def exact(x: Layer, tokens: Tensor | None = None) -> Tensor:
    """Attention in fp64, of the first sequence, over chosen tokens or all."""
    k, v = x.every_key[0].double().transpose(0, 1), (x.k if x.v is None else x.v)[0].double().transpose(0, 1)
    q = x.q[0].double().unflatten(0, (x.form.G, -1))
    if tokens is not None:
        k, v = (y.gather(1, tokens[0][..., None].expand(-1, -1, y.shape[-1])) for y in (k, v))
    return ((q @ k.transpose(1, 2) * x.form.scale).softmax(-1) @ v).flatten(0, 1)


def quest_16_layer(x: Layer) -> Layer:
    blocks = x.every_key.unflatten(1, (-1, 16))
    upper, lower = (y.transpose(1, 2).contiguous() for y in (blocks.amax(2), blocks.amin(2)))
    return x._replace(upper=upper, lower=lower)


def cases(name: str, B: int, S: int, compile_only: bool) -> Iterator[dict[str, Any]]:
    """One row per operator."""
    form = FORMS[name]
    size = B * S * (form.row_bytes() * 1.2 + 2 * form.G * (form.K + form.shared) / 4)
    count = max(3, min(16, int(60e9 / size))) if DEVICE.type == "cuda" and not compile_only else 1
    layers = [layer_of(form, B, S, True) for _ in range(count)]
    common: dict[str, Any] = {"section": "table", "form": name, "batch": B, "context": S, "layers": len(layers)}
    everything = None if compile_only else exact(layers[0])
    reference: dict[str, float] = {}
    for kind, calls in (("dense", DENSE), ("peer", PEERS), ("levels", LEVELS)):
        for operator, call in calls.items():
            row = {**common, "operator": operator}
            inputs = [quest_16_layer(x) for x in layers] if operator == "quest 16" else layers
            try:
                out = call(inputs[0])
                if compile_only:
                    continue
                if kind == "dense":
                    row["error"] = error_of(out[0], everything)  # type: ignore[arg-type]
                    assert row["error"] < 2e-2, row
                elif operator in ("two_level", "two_level lagged", "double_sparsity"):
                    searched = {
                        "two_level": lambda x: Searched(blocks_of(x, CANDIDATES // BLOCK), None, BLOCK, False),
                        "two_level lagged": lambda x: Searched(x.previous, None, BLOCK, True),
                    }.get(operator, lambda _: None)(layers[0])
                    row["error"] = error_of(out[0], exact(layers[0], tokens_in(layers[0], searched)))
                    assert row["error"] < 2e-2, row
                ms = milliseconds(call, inputs)
                needed = B * bytes_of(operator, form, S)
                row |= {"ms": ms, "bytes": needed, "of_bandwidth": needed / (ms / 1e3) / BANDWIDTH}
            except Exception as error:
                row["failure"] = f"{type(error).__name__}: {str(error)[:300]}"
                synchronise()
            del inputs
            if "ms" in row:
                if kind != "dense":
                    row["times"] = {other: ms / row["ms"] for other, ms in reference.items()}
                if kind != "levels":
                    name_of = "dense" if kind == "dense" else operator
                    reference[name_of] = min(row["ms"], reference.get(name_of, row["ms"]))
            yield row
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


# -- launch settings -------------------------------------------------------------------------------------------------


def grid(**options: list[int]) -> list[dict[str, int]]:
    return [dict(zip(options, values)) for values in itertools.product(*options.values())]


def stages_of(x: Layer) -> dict[str, Callable[[Layer], Tensor]]:
    searched = Searched(x.previous, None, BLOCK, True)
    tokens = tokens_in(x, searched)
    return {
        "minmax": lambda y: blocks_of(y, CANDIDATES // BLOCK),
        "minmax latents": lambda y: blocks_of(y, CANDIDATES // BLOCK),
        "scores": lambda y: tokens_in(y, Searched(y.previous, None, BLOCK, True)),
        "weights": lambda y: tokens_in(y, Searched(y.previous, None, BLOCK, True)),
        "attend": lambda y: attend(y, tokens),
        "attend latents": lambda y: attend(y, tokens),
        "all": two_level,
        "topk": lambda y: torch_topk(y),
    }


def torch_topk(x: Layer) -> Tensor:
    """Scores of blocks as here, their choice by torch.topk."""
    from workbench.ops.sparse_decoding.kernels import blocks as kernels

    before = kernels.select
    try:
        kernels.select = lambda scores, lengths, count, forced, block: scores.topk(count).indices  # type: ignore
        return minmax_blocks(
            x.q, x.upper, x.lower, x.lengths, block=BLOCK, count=CANDIDATES // BLOCK, forced=FORCED, tickets=None
        )
    finally:
        kernels.select = before


def variants(stage: str) -> list[dict[str, dict[str, int]]]:
    """Changes of the launch settings, by kernel; the first are those in use."""
    changes: list[dict[str, dict[str, int]]]
    match stage:
        case "minmax" | "minmax latents":
            changes = [{stage: s} for s in grid(BN=[16, 32, 64], num_warps=[2, 4, 8])]
            changes.append({stage: {"fused": 0}})
        case "scores":
            changes = [{"scores": s} for s in grid(BM=[64, 128, 256, 512], num_warps=[2, 4, 8])]
        case "weights":
            changes = [{"weights": s} for s in grid(BN=[1024, 2048, 4096, 8192], num_warps=[8, 16])]
        case "attend":
            changes = [{"attend": s} for s in grid(BT=[16, 32, 64], programs=[132, 264, 528], num_warps=[2, 4])]
            changes.append({"attend": {"num_stages": 3}})
        case "attend latents":
            shapes = grid(BT=[16, 32, 64], heads=[16, 32], programs=[66, 132, 264], num_warps=[4, 8])
            changes = [{"attend latents": s} for s in (*shapes, {"num_stages": 1}, {"num_stages": 3})]
        case _:
            changes = []
    return [{}, *changes]


@contextlib.contextmanager
def launched_with(changes: dict[str, dict[str, int]]) -> Iterator[None]:
    from workbench.ops.sparse_decoding.kernels import LAUNCH

    before = {kernel: dict(settings) for kernel, settings in LAUNCH.items()}
    apply(changes)
    try:
        yield
    finally:
        LAUNCH.update(before)


def apply(changes: dict[str, dict[str, int]]) -> None:
    from workbench.ops.sparse_decoding.kernels import LAUNCH

    for kernel, settings in changes.items():
        LAUNCH[kernel] = {**LAUNCH[kernel], **settings}


def is_same(actual: Tensor, expected: Tensor | None) -> bool:
    """Up to rounding, which may exchange a chosen token."""
    assert expected is not None
    if actual.is_floating_point():
        return error_of(actual, expected) < 1e-2
    return float(torch.isin(actual[0, 0], expected[0, 0]).double().mean()) > 0.99


def sweep(name: str, B: int, S: int, stages: list[str], compile_only: bool) -> Iterator[dict[str, Any]]:
    """Rows of every stage, fastest first. The fastest settings of a stage stay in use."""
    layers = [layer_of(FORMS[name], B, S, False) for _ in range(1 if compile_only else 8)]
    calls = stages_of(layers[0])
    for stage in stages:
        if stage in (("minmax latents", "attend latents") if name == "gqa" else ("minmax", "attend")):
            continue
        rows: list[dict[str, Any]] = []
        expected = None if compile_only else calls[stage](layers[0])
        for changes in variants(stage):
            where = {"section": "sweep", "form": name, "batch": B, "context": S}
            row: dict[str, Any] = {**where, "stage": stage, "settings": changes}
            try:
                with launched_with(changes):
                    if compile_only:
                        calls[stage](layers[0])
                        continue
                    row["same"] = is_same(calls[stage](layers[0]), expected)
                    row["ms"] = milliseconds(calls[stage], layers)
            except Exception as error:
                row["failure"] = f"{type(error).__name__}: {str(error)[:200]}"
                if not compile_only:
                    torch.cuda.synchronize()
            rows.append(row)
        rows.sort(key=lambda row: row["ms"] if row.get("same") and "ms" in row else float("inf"))
        if rows and "ms" in rows[0]:
            apply(rows[0]["settings"])
        yield from rows
    del layers
    torch.cuda.empty_cache()


LARGE = (8, 98_304)
"""Sequences and context at which launch settings are compared."""
FIRST = [LARGE, (8, 49_152), (1, 98_304), (8, 131_072), (1, 32_768), (8, 32_768), (4, 98_304), (1, 131_072)]
"""What is measured first, where time is short."""
STAGES = ["minmax", "minmax latents", "topk", "scores", "weights", "attend", "attend latents", "all"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", default=["table"], choices=["table", "sweep"])
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS)
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--compile", action="store_true", help="compile the kernels without measuring")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further case after so many seconds")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    torch.manual_seed(0)
    if DEVICE.type == "cuda":
        SIDE.append(torch.cuda.Stream())
    started, rows = time.perf_counter(), []
    fastest: dict[str, dict[str, dict[str, int]]] = {}

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        form, B, S = row["form"], row["batch"], row["context"]
        shown = row.get("failure") or f"{row['ms'] * 1e3:8.1f} us"
        what = row.get("operator") or f"{row['stage']} {row['settings']} {'' if row.get('same') else 'OTHER VALUES'}"
        more = ", ".join(f"x{times:.2f} {other}" for other, times in row.get("times", {}).items())
        print(f"{form} {B} x {S} {what:30} {shown} {more} {row.get('of_bandwidth', 0):.0%}", flush=True)
        if not options.compile:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            where = provenance(seconds=round(time.perf_counter() - started, 1))
            report = {"environment": where, "bandwidth": BANDWIDTH, "settings": fastest, "rows": rows}
            options.output.write_text(json.dumps(report, indent=1) + "\n")

    if "sweep" in options.sections:
        from workbench.ops.sparse_decoding.kernels import LAUNCH

        for form in options.forms:
            with launched_with({}):
                for row in sweep(form, *LARGE, options.stages, options.compile):
                    add(row)
                fastest[form] = {kernel: dict(settings) for kernel, settings in LAUNCH.items()}
    cases_of = list(itertools.product(options.batches, options.contexts))
    cases_of.sort(key=lambda case: FIRST.index(case) if case in FIRST else len(FIRST))
    for (B, S), form in itertools.product(cases_of, options.forms):
        if "table" not in options.sections or time.perf_counter() - started > options.seconds:
            break
        with launched_with(fastest.get(form, {})):
            for row in cases(form, B, S, options.compile):
                add(row)


if __name__ == "__main__":
    main()
