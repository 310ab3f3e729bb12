"""Layers whose tokens a learned index selects, beside dense attention: time and memory of training on this GPU.

    python benchmarks/learned_indices.py                       # results/benchmarks/learned_indices.json
    python benchmarks/learned_indices.py --lengths 512 --width 64 --heads 4 --head-dim 16 --top-k 64 --repeats 1
    python benchmarks/learned_indices.py --lengths 8192 --backend torch     # without kernels

One mixer of width 1,024 as a training step runs it (compiled on a GPU, bf16 autocast, one row, 4 key–value heads, with
the loss of the index), in these stages:

warm-up    dense attention, divergence over all tokens
selected   selection, attention to the selected tokens, divergence over them

``forward_ms`` and ``both_ms`` (forward and backward) are medians; ``peak_mib`` is what a forward and backward pass
allocates at most on top of weights and inputs, ``table_mib`` what one T × T table in bf16 would take. ``select``,
``divergence`` and ``attention`` time the operators alone on the same shapes, forward and backward where there is one.
``backends`` are those that computed the operators.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
OUTPUT = ROOT / "results" / "benchmarks" / "learned_indices.json"

from common import merge_results  # noqa: E402

from workbench.contract import AuxOutputs  # noqa: E402
from workbench.model import LanguageModel, ModelConfig  # noqa: E402
from workbench.ops import dispatch  # noqa: E402
from workbench.ops.sparse_attention import document_starts, selected_attention  # noqa: E402
from workbench.ops.token_index import IndexKeys, index_divergence, select_tokens  # noqa: E402

INDEXED = ("dsa", "dsa_latent", "lsa", "lsa_latent")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def milliseconds(call: Callable[[], Any], repeats: int) -> float:
    """Median of ``repeats`` calls, after two that compile and allocate."""
    times = []
    for number in range(repeats + 2):
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        if number >= 2:
            times.append(1e3 * (time.perf_counter() - started))
    return round(statistics.median(times), 2)


def peak_mib(call: Callable[[], Any]) -> float | None:
    """MiB that ``call`` allocates at most on top of what is allocated before."""
    if DEVICE.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def timed(forward: Callable[[], torch.Tensor], inputs: list[torch.Tensor], repeats: int) -> dict[str, Any]:
    def both() -> None:
        for x in inputs:
            x.grad = None
        forward().backward()

    try:
        with torch.no_grad():
            forward_ms = milliseconds(forward, repeats)
        return {"forward_ms": forward_ms, "both_ms": milliseconds(both, repeats), "peak_mib": peak_mib(both)}
    except torch.OutOfMemoryError as error:
        return {"error": f"out of memory: {str(error)[:200]}"}


def layer(kind: str, stage: str, T: int, options: argparse.Namespace) -> dict[str, Any]:
    """One mixer, forward and backward of a weighted sum of its output and its losses."""
    fields: dict[str, Any] = {"heads": options.heads, "head_dim": options.head_dim}
    if not kind.endswith("_latent"):
        fields["kv_heads"] = min(4, options.heads)
    if kind in INDEXED:
        fields["top_k"] = options.top_k
    config = ModelConfig(
        scale="340m", width=options.width, depth=1, vocabulary=256, pattern=kind, mixers={kind: fields}
    )
    torch._dynamo.reset()
    mixer = LanguageModel(config, seed=0).to(DEVICE).blocks[0].get_submodule("mixer")
    call = torch.compile(mixer, fullgraph=True, dynamic=False) if DEVICE.type == "cuda" else mixer
    x = torch.randn(1, T, options.width, device=DEVICE, requires_grad=True)
    weights = torch.randn(1, T, options.width, device=DEVICE)

    def forward() -> torch.Tensor:
        aux = AuxOutputs(collect_metrics=False, warming_up=stage == "warm-up")
        with torch.autocast(DEVICE.type, torch.bfloat16):
            y = call(x, aux=aux)
        return (y * weights).sum() + sum(aux.losses)

    return timed(forward, [x, *mixer.parameters()], options.repeats)


def operators(T: int, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Selection, divergence over selected and over all tokens, and attention to selected tokens, alone."""
    torch.manual_seed(0)
    heads, groups, K, J, X = options.heads, min(4, options.heads), options.head_dim, 4, 64

    def rows(*shape: int) -> torch.Tensor:
        return torch.randn(1, T, *shape, device=DEVICE, dtype=torch.bfloat16).requires_grad_()

    index = IndexKeys(rows(J, X), rows(X), rows(J))
    q, k, v = rows(heads, K), rows(groups, K), rows(groups, K)
    start = document_starts(None, 1, T, DEVICE)
    tokens = select_tokens(index, count=options.top_k, start_BT=start)
    calls: dict[str, tuple[Callable[[], torch.Tensor], list[torch.Tensor]]] = {
        "divergence": (lambda: index_divergence(index, q, k, tokens, start_BT=start).sum(), list(index)),
        "divergence over all tokens": (lambda: index_divergence(index, q, k, start_BT=start).sum(), list(index)),
        "attention": (
            lambda: selected_attention(q, k, v, tokens[:, :, None], block=1, start_BT=start)[0].sum(),
            [q, k, v],
        ),
    }
    result: dict[str, dict[str, Any]] = {
        "select": {
            "forward_ms": milliseconds(
                lambda: select_tokens(index, count=options.top_k, start_BT=start), options.repeats
            ),
            "peak_mib": peak_mib(lambda: select_tokens(index, count=options.top_k, start_BT=start)),
        }
    }
    for name, (call, inputs) in calls.items():
        result[name] = timed(call, inputs, options.repeats)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16_384, 32_768])
    parser.add_argument("--kinds", nargs="+", default=["full", "dsa", "lsa", "dsa_latent", "lsa_latent"])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=1024)
    parser.add_argument("--backend", choices=["torch"], help="instead of the one for the device")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()

    def add(T: int, op: str, stage: str, figures: dict[str, Any]) -> None:
        shape = {"width": options.width, "heads": options.heads, "head_dim": options.head_dim, "top_k": options.top_k}
        used = {name: dispatch.recorded().get(name, []) for name in ("token_index", "sparse_attention")}
        row = {"tokens": T, "op": op, "stage": stage, "backend": options.backend, **shape}
        row |= {"table_mib": round(T * T * 2 / 2**20, 1), "backends": used, **figures}
        print(row, flush=True)
        keys = ("tokens", "op", "stage", "width", "top_k", "backend")
        merge_results(options.output, [row], lambda r: tuple(map(r.get, keys)))

    with dispatch.force_backend(options.backend):
        for T in options.lengths:
            for kind in options.kinds:
                for stage in ("warm-up", "selected") if kind in INDEXED else ("dense",):
                    dispatch.reset()
                    add(T, kind, stage, layer(kind, stage, T, options))
            dispatch.reset()
            for name, figures in operators(T, options).items():
                add(T, name, "operator", figures)


if __name__ == "__main__":
    main()
