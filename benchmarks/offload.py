"""Decoding with rows on the host, on this GPU: time of a step, bytes, hit rate, overlap and memory.

    python benchmarks/offload.py                                  # results/benchmarks/offload.json
    python benchmarks/offload.py --sections methods
    python benchmarks/offload.py --sections steps --models 340m --tokens 32768 --batch 4

methods   one layer's blocks from pinned memory by each method (`kernel`, `gather`, `blocks`): milliseconds until all
          have arrived, with the host's work, for a number of blocks per sequence and group
steps     milliseconds of a step of whole models, bf16, random weights, at equal batch
largest   the same at the largest batch whose weights and caches fit into the memory of a smaller device (8, 10 and 24
          GiB for the three models, or ``--memory``), found from the bytes of one sequence; the host has at most
          ``--host-memory`` GiB, where a layer takes the next power of two

Policies: dense; two levels with all rows on the device, synchronous (B1) and lagged; the token level alone (B2) and the
block level alone (B3, blocks of 16 and 64); two levels with rows on the host synchronous (B4), lagged with full
transfers (B5) and incremental (B6, exact and lru); dense with everything streamed (B7). All keep 1,024 tokens, two
levels of 8,192 searched ones in blocks of 64.

``times_dense`` is the ratio of tokens per second to those of dense, measured before in the same section; in ``largest``
each has the largest batch of its policy. ``index_gib`` is what indices take of ``cache_gib``.

Caches are filled with made-up rows: keys of a block have a common part (correlation 0.9), and prompts are not computed.
Queries are those of the model for a new token at every step ("random": hidden states of random weights depend on the
newest token most) or for the same token at every step ("repeated"), so that choices change little.

``ms`` is the median between events on the device, of steps replayed from a CUDA graph. ``copy_ms`` is the time that the
copy stream works in a step of the same state without a graph, ``compute_ms`` the time of a replayed step without
copies, and overlap = 1 - (ms - compute_ms) / copy_ms between 0 and 1, NaN without copies. The file is written after
every case.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
OUTPUT = ROOT / "results" / "benchmarks" / "offload.json"

from common import merge_results, synchronise  # noqa: E402

from workbench.decoding.policy import policies  # noqa: E402
from workbench.decoding.reads import FIELDS, host_bytes, index_bytes  # noqa: E402
from workbench.decoding.residency import Copies  # noqa: E402
from workbench.decoding.selective import SelectiveCache  # noqa: E402
from workbench.decoding.transfer import Memory, host_memory, timed  # noqa: E402
from workbench.model import LanguageModel, ModelConfig  # noqa: E402

MODELS: dict[str, dict[str, Any]] = {
    "340m": {"scale": "340m", "vocabulary": 32_000},
    "1.3b": {"scale": "1.3b", "vocabulary": 32_000, "mixers": {"full": {"kv_heads": 8}}},
    "qwen3_8b": {
        "width": 4096,
        "depth": 36,
        "vocabulary": 151_936,
        "tied": False,
        "mixers": {"full": {"heads": 32, "kv_heads": 8, "head_dim": 128, "qk_norm": True}},
        "feedforwards": {"swiglu": {"hidden": 12_288}},
    },
}
LEVELS = {"kind": "two_level", "tokens": 1024, "candidates": 8192, "block": 64, "channels": 32}
POLICIES: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense"},
    "B1 two_level synchronous": {**LEVELS, "lagged": False},
    "two_level lagged": LEVELS,
    "B2 double_sparsity": {"kind": "double_sparsity", "tokens": 1024, "channels": 32},
    "B3 quest, blocks of 16": {"kind": "quest", "tokens": 1024, "block": 16},
    "B3 quest, blocks of 64": {"kind": "quest", "tokens": 1024, "block": 64},
    "B4 synchronous offload": {**LEVELS, "lagged": False, "offload": {}},
    "B5 lagged, full": {**LEVELS, "offload": {"transfer": "full"}},
    "B6 lagged, incremental": {**LEVELS, "offload": {}},
    "B6 lagged, lru": {**LEVELS, "offload": {"resident": "lru"}},
    "B7 streamed": {"kind": "streamed"},
}
MEMORY = {"340m": 8.0, "1.3b": 10.0, "qwen3_8b": 24.0}
"""GiB of the device, for ``largest``."""
KEY = ("section", "model", "policy", "queries", "batch", "tokens", "method", "blocks")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def free(*, host: bool) -> None:
    """Give memory back that nothing uses. Pinned memory takes seconds to get, and is kept for pieces of its size unless
    ``host``."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        empty = getattr(torch.accelerator, "empty_host_cache", None) or getattr(torch._C, "_host_emptyCache", None)
        if host and empty is not None:
            empty()


def built(name: str) -> LanguageModel:
    """A model in bf16 whose weights are drawn on the device."""
    with torch.device(DEVICE):
        model = LanguageModel(ModelConfig.parse(MODELS[name]))
    model = model.to(torch.bfloat16)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    return model.requires_grad_(False).eval()


def prepared(model: LanguageModel, fields: dict[str, Any]) -> Any:
    """The policy, with channels of equal importance."""
    from workbench.decoding.calibration import Calibration

    policy = policies[fields["kind"]](policies.parse(fields))
    if hasattr(policy, "calibration"):
        mixers = [block.get_submodule("mixer") for block in model.blocks]
        importance = {n: torch.rand(mixer.G, mixer.K) for n, mixer in enumerate(mixers)}
        policy.calibration = Calibration(importance, {})
    policy.prepare(model)
    return policy


def rows(batch: int, tokens: int, like: Any, block: int = 64) -> list[Tensor]:
    """Made-up keys and values, (B, T, G, K) each, of unit variance."""
    size = batch, tokens, like.G, like.K
    common = torch.randn(batch, -(-tokens // block), like.G, like.K, device=DEVICE, dtype=torch.bfloat16)
    keys = torch.randn(size, device=DEVICE, dtype=torch.bfloat16).mul_(0.1**0.5)
    keys += common.mul_(0.9**0.5).repeat_interleave(block, 1)[:, :tokens]
    return [keys, torch.randn(size, device=DEVICE, dtype=torch.bfloat16)]


class Run:
    """Sequences whose caches are full, and their steps.

    Args:
        model: the model.
        policy: prepared.
        batch: sequences.
        capacity: tokens of every cache.
        steps: how many of them are left for steps.
    """

    def __init__(self, model: LanguageModel, policy: Any, batch: int, capacity: int, steps: int):
        self.model, self.policy, self.batch = model, policy, batch
        self.caches, tokens = model.new_caches(batch, capacity, policy.cache_for), capacity - steps
        for cache, block in zip(self.caches, model.blocks):
            mixer: Any = block.get_submodule("mixer")
            new = rows(batch, tokens, mixer)
            cache.extend(*new)
            if isinstance(cache, SelectiveCache):
                start_B = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
                cache.selector.append(new[0], start_B)
                query = torch.randn(batch, mixer.H, mixer.K, device=DEVICE, dtype=torch.bfloat16)
                cache.selector.observe(query, start_B + tokens)
            del new
        self.tokens_B1 = torch.zeros(batch, 1, dtype=torch.int64, device=DEVICE)
        self.positions_B = torch.full((batch,), tokens, device=DEVICE)
        for cache in self.caches:
            cache.step_from(self.positions_B)
        self.graph: Any = None

    @property
    def changed(self) -> list[Any]:
        """Caches that the policy replaces."""
        return [cache for cache in self.caches if getattr(cache, "latest_read", None) is not None]

    def step(self) -> None:
        """One step, without sampling."""
        self.model.logits(self.model(self.tokens_B1, caches=self.caches))
        self.positions_B.add_(1)

    def capture(self) -> None:
        """Replay steps from a CUDA graph from here on."""
        if DEVICE.type == "cuda":
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.step()

    def run(self) -> None:
        """One step, replayed where it was captured."""
        self.step() if self.graph is None else self.graph.replay()

    def next_token(self, queries: str) -> None:
        """The token of the next step."""
        if queries == "random":
            self.tokens_B1.random_(0, self.model.config.vocabulary)

    def times(self, queries: str, count: int) -> tuple[float, dict[str, float]]:
        """Median milliseconds of steps, and means of what they read."""
        reads = []
        marks: list[Any] = []
        for _ in range(count + 1):
            self.next_token(queries)
            if DEVICE.type == "cuda":
                marks.append(torch.cuda.Event(enable_timing=True))
                marks[-1].record()
            else:
                marks.append(time.perf_counter())
            self.run()
            reads.append([cache.latest_read.clone() for cache in self.changed])
        synchronise()
        spans = [a.elapsed_time(b) if DEVICE.type == "cuda" else 1e3 * (b - a) for a, b in pairwise(marks)]
        means: dict[str, float] = {}
        if reads[-1]:
            table = torch.stack([torch.stack(layers) for layers in reads[2:]]).nanmean((0, 1)).tolist()
            means = {f"read_{name}": value for name, value in zip(FIELDS, table)}
        return sorted(spans)[len(spans) // 2], means


@contextmanager
def without_copies() -> Iterator[None]:
    """Steps plan their copies and make none."""
    fetch = Memory.fetch
    Memory.fetch = lambda self, copies: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Memory.fetch = fetch  # type: ignore[method-assign]


def measured(model: LanguageModel, name: str, batch: int, tokens: int, count: int) -> Iterator[dict[str, Any]]:
    """Results of one policy for both kinds of queries."""
    fields = POLICIES[name]
    policy = prepared(model, fields)
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = time.perf_counter()
    run = Run(model, policy, batch, tokens, 2 * (2 * count + 16))
    synchronise()
    filled = time.perf_counter() - before
    for queries in ("repeated", "random"):
        run.graph = None
        for _ in range(3):
            run.next_token(queries)
            run.run()
        copy_ms = None
        if hasattr(policy, "copy_stream") and run.changed and hasattr(run.changed[0], "host_tensors"):
            with timed(policy.copy_stream(DEVICE)) as milliseconds:
                for _ in range(4):
                    run.next_token(queries)
                    run.run()
                copy_ms = milliseconds() / 4
        run.capture()
        for _ in range(3):
            run.next_token(queries)
            run.run()
        ms, means = run.times(queries, count)
        result: dict[str, Any] = {"queries": queries, "ms": ms, "tokens_per_second": 1e3 * batch / ms, **means}
        if copy_ms is not None and fields.get("offload") is not None:
            run.graph = None
            with without_copies():
                run.run()
                run.capture()
                compute_ms, _ = run.times(queries, count)
            overlap = max(0.0, min(1.0, 1 - (ms - compute_ms) / copy_ms)) if copy_ms else math.nan
            result |= {"copy_ms": copy_ms, "compute_ms": compute_ms, "overlapped": overlap}
        elif copy_ms is not None:
            result["copy_ms"] = copy_ms
        run.graph = None
        yield result | bytes_of(run) | {"fill_s": filled}


def bytes_of(run: Run) -> dict[str, float]:
    """GiB of the caches on the device, of the indices in them, of caches on the host, and the peak of the device."""
    on_host = host_bytes(run.caches)
    tensors = {t.data_ptr(): t.nbytes for cache in run.caches for t in cache.tensors()}
    peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0
    sizes = {
        "cache_gib": sum(tensors.values()) - on_host,
        "index_gib": index_bytes(run.caches),
        "host_gib": on_host,
        "peak_gib": peak,
    }
    return {name: size / 2**30 for name, size in sizes.items()}


def sequence_bytes(model: LanguageModel, name: str, tokens: int) -> tuple[float, float]:
    """Bytes of one sequence on the device and on the host, from caches of one and of two short sequences."""
    sizes = []
    for batch in (1, 2):
        caches = model.new_caches(batch, 4096, prepared(model, POLICIES[name]).cache_for)
        on_host = host_bytes(caches)
        total = sum({t.data_ptr(): t.nbytes for cache in caches for t in cache.tensors()}.values())
        sizes.append((total - on_host, on_host))
        del caches
    scale = tokens / 4096
    device, host = (b - a for a, b in zip(*sizes))
    # slots have a fixed number of blocks, which 4,096 tokens do not fill
    if POLICIES[name].get("offload") is not None:
        index_device = _index_bytes(model, tokens)
        mixer: Any = model.blocks[0].get_submodule("mixer")
        slots = 128 * (2 if POLICIES[name]["offload"].get("resident") == "lru" else 1) + 2
        slots = min(slots, tokens // 64 + 2)
        device = index_device + len(model.blocks) * mixer.G * slots * 64 * 2 * mixer.K * 2
        return device, host * scale
    return device * scale, host * scale


def pinned_bytes(model: LanguageModel, host: float, batch: int) -> float:
    """Bytes that ``batch`` sequences take of the host, given those of one: pinned memory is given out in powers of two,
    and every layer asks for its own."""
    layers = len(model.blocks)
    return layers * 2.0 ** math.ceil(math.log2(batch * host / layers)) if host else 0.0


def _index_bytes(model: LanguageModel, tokens: int) -> float:
    mixer: Any = model.blocks[0].get_submodule("mixer")
    per_token = mixer.G * (LEVELS["channels"] / 2 + 2 + 2 * mixer.K * 2 / LEVELS["block"])
    return len(model.blocks) * tokens * per_token


def methods(report: Callable[..., None], tokens: int, counts: list[int], batch: int = 4) -> None:
    """Copies of blocks of one layer: 8 groups, 64 tokens of keys and values of 128 channels in bf16, 32 KB."""
    G, b, X, N = 8, 64, 256, tokens // 64
    host = host_memory(batch, G, N, b, X, dtype=torch.bfloat16, device=DEVICE)
    host.copy_(torch.randn(1, 1, 1, b, X, dtype=torch.bfloat16))
    hot = torch.empty(batch, G, max(counts), b, X, dtype=torch.bfloat16, device=DEVICE)
    for count in counts:
        blocks = torch.stack([torch.randperm(N, device=DEVICE)[:count] for _ in range(batch * G)]).view(batch, G, count)
        slots = torch.arange(count, device=DEVICE).expand(batch, G, count).contiguous()
        nothing = torch.zeros((), device=DEVICE)
        copies = Copies(blocks, slots, nothing, nothing)
        size = batch * G * count * b * X * 2
        for method in ("kernel", "gather", "blocks"):
            memory = Memory(method, host, hot, count)
            for _ in range(2):
                memory.fetch(copies)
            synchronise()
            repeats = 5
            start = time.perf_counter()
            for _ in range(repeats):
                memory.fetch(copies)
                synchronise()
            ms = 1e3 * (time.perf_counter() - start) / repeats
            sizes = {"method": method, "blocks": count, "batch": batch, "tokens": tokens, "mib": size / 2**20}
            report(section="methods", **sizes, ms=ms, gb_per_second=size / ms / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--sections", nargs="+", default=["methods", "steps", "largest"])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--memory", type=float, help="GiB of the device, for `largest`. Default: by model")
    parser.add_argument("--host-memory", type=float, default=48.0, help="GiB of the host, for `largest`")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 4, 16, 64], help="blocks, for `methods`")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()

    def report(**result: Any) -> None:
        print({name: round(v, 4) if isinstance(v, float) else v for name, v in result.items()}, flush=True)
        merge_results(options.output, [result], key=lambda r: tuple(r.get(name) for name in KEY))

    if "methods" in options.sections:
        methods(report, options.tokens, options.counts)
    for name in options.models if {"steps", "largest"} & set(options.sections) else ():
        with torch.inference_mode():
            model = built(name)
            weights = sum(parameter.nbytes for parameter in model.parameters())
            for section in (section for section in ("steps", "largest") if section in options.sections):
                dense: dict[str, float] = {}
                before = 0
                for policy in options.policies:
                    batch, sizes = options.batch, {}
                    if section == "largest":
                        device, host = sequence_bytes(model, policy, options.tokens)
                        memory = options.memory or MEMORY[name]
                        room = (memory * 2**30 - weights) / max(device, 1.0)
                        batch = int(min(room, 64))
                        while batch and pinned_bytes(model, host, batch) > options.host_memory * 2**30:
                            batch -= 1
                        sizes = {
                            "memory_gib": memory,
                            "device_bytes_per_sequence": device,
                            "limit": "host" if room > batch + 1 else "device",
                        }
                        if batch < 1:
                            report(section=section, model=name, policy=policy, tokens=options.tokens, batch=0)
                            continue
                    about = {"section": section, "model": name, "policy": policy, "tokens": options.tokens}
                    free(host=batch != before)
                    before = batch
                    try:
                        for result in measured(model, policy, batch, options.tokens, options.steps):
                            if policy == "dense":
                                dense[result["queries"]] = result["tokens_per_second"]
                            elif result["queries"] in dense:
                                result["times_dense"] = result["tokens_per_second"] / dense[result["queries"]]
                            report(**about, batch=batch, **sizes, **result)
                    except Exception as error:  # the other cases are measured
                        report(**about, batch=batch, error=f"{type(error).__name__}: {error}"[:500])
            del model
        free(host=True)


if __name__ == "__main__":
    main()
