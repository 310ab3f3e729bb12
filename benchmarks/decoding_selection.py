"""How much of the attention each decoding policy covers, and what the lag costs, on made-up queries and keys.

    python benchmarks/decoding_selection.py

One group of four heads of 64 channels, 8,192 cached tokens, 48 steps. Queries follow q_t = ρ q_{t-1} + sqrt(1 - ρ²) ε,
or turn into an independent query every 8 steps ("abrupt"). Keys drift along the sequence (correlation 0.95 between
neighbours), and a few channels are larger than others, as calibration expects. Scores have a standard deviation of 3.
Every policy keeps 512 tokens; blocks have 64, and two levels search 2,048 tokens. Selections are made by the policies'
own selectors.

- mass: share of the exact attention that falls on the tokens read, mean over heads;
- recall: share of the 512 tokens with the largest exact weights (mean over heads) that are read;
- error: norm of the difference of outputs over the norm of the exact output;
- overlap: share of a step's blocks (tokens) that the step before chose as well.

CPU emulation: it compares policies on one distribution, and says nothing about speed or the quality of a trained model.
Results go to results/calibration/decoding_selection.json.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import write_report
from torch import Tensor

from workbench.contract import mixers
from workbench.decoding.calibration import Calibration
from workbench.decoding.policy import policies
from workbench.decoding.reads import FIELDS
from workbench.decoding.view import View, view_of
from workbench.ops.sparse_decoding import gathered_attention, read_numbers

OUTPUT = Path(__file__).parents[1] / "results" / "calibration" / "decoding_selection.json"
HEADS, CHANNELS, CACHED, STEPS, KEPT, SEARCHED, BLOCK = 4, 64, 8192, 48, 512, 2048, 64
DRIFT, SCORE_SD, ABRUPT_EVERY = 0.95, 3.0, 8
CORRELATIONS: dict[str, float] = {"0": 0.0, "0.9": 0.9, "0.99": 0.99, "abrupt": 1.0}
MEAN = {"block_index": "mean", "sub_block": 8}
LEVELS = {"kind": "two_level", "tokens": KEPT, "candidates": SEARCHED, "block": BLOCK}
POLICIES: dict[str, dict[str, Any]] = {
    "streaming": {"kind": "streaming", "tokens": KEPT},
    "quest, minmax": {"kind": "quest", "tokens": KEPT, "block": BLOCK},
    "quest, mean": {"kind": "quest", "tokens": KEPT, "block": BLOCK, **MEAN},
    "double_sparsity": {"kind": "double_sparsity", "tokens": KEPT},
    "double_sparsity, dc": {"kind": "double_sparsity", "tokens": KEPT, "fine_scale": "dc"},
    "double_sparsity, exact": {"kind": "double_sparsity", "tokens": KEPT, "channels": "all", "bits": 16},
    "two_level, minmax, synchronous": {**LEVELS, "lagged": False},
    "two_level, minmax, lagged": LEVELS,
    "two_level, mean, synchronous": {**LEVELS, **MEAN, "lagged": False},
    "two_level, mean, lagged": {**LEVELS, **MEAN},
}


def layer_view() -> View:
    """One group of heads without positions."""
    mixer = mixers["full"]
    fields = {"heads": HEADS, "head_dim": CHANNELS, "kv_heads": 1}
    found = view_of(mixer(mixer.Config.parse(fields).resolved(HEADS * CHANNELS), HEADS * CHANNELS))
    assert found is not None
    return found


def drifting(length: int, correlation: float, generator: torch.Generator, *shape: int) -> Tensor:
    """(T, …) a Gaussian sequence whose neighbours have this correlation."""
    noise = torch.randn(length, *shape, generator=generator)
    rows = [noise[0]]
    for t in range(1, length):
        rows.append(correlation * rows[-1] + math.sqrt(1 - correlation**2) * noise[t])
    return torch.stack(rows)


def queries(name: str, generator: torch.Generator) -> Tensor:
    """(T, H, K), the first one that of the prompt."""
    if name != "abrupt":
        return drifting(STEPS + 1, CORRELATIONS[name], generator, HEADS, CHANNELS)
    changes = torch.randn(-(-(STEPS + 1) // ABRUPT_EVERY), HEADS, CHANNELS, generator=generator)
    return changes.repeat_interleave(ABRUPT_EVERY, 0)[: STEPS + 1]


def made_up(name: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (T, H, K), keys and values (S, K), in channels of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    size_K = torch.exp(torch.randn(CHANNELS, generator=generator))
    q, k = queries(name, generator) * size_K, drifting(CACHED + STEPS, DRIFT, generator, CHANNELS) * size_K
    # scores q · k / sqrt(K) get the wanted deviation
    q = q * SCORE_SD * CHANNELS**0.5 / size_K.pow(4).sum().sqrt()
    return q, k, torch.randn(CACHED + STEPS, CHANNELS, generator=generator)


def measure(fields: dict[str, Any], view: View, q: Tensor, k: Tensor, v: Tensor) -> Iterator[dict[str, float]]:
    """Numbers of every step."""
    policy: Any = policies[fields["kind"]](policies.parse(fields))
    importance_1K = (q.abs().amax(0).mean(0) * k.abs().amax(0))[None]
    policy.calibration = Calibration({0: importance_1K}, {})
    selector = policy.selector(0, view, (1, CACHED + STEPS, "cpu", torch.float32))
    start, rows = torch.tensor([0]), k[None, :, None]
    selector.append(rows[:, :CACHED], start)
    selector.observe(q[:1], start + CACHED)
    for t in range(STEPS):
        length = start + CACHED + t + 1
        selector.append(rows[:, CACHED + t : CACHED + t + 1], length - 1)
        selection = selector.select(q[t + 1 : t + 2], length)
        numbers_F = read_numbers(
            selection.tokens_BGn,
            selection.units_BGm,
            selector.previous_BGm,
            length,
            row_bytes=0.0,
            index=selection.indices,
        )
        read = selection.positions(length)[0, 0]
        read = read[read >= 0]
        weights_HS = (q[t + 1] @ k[: int(length)].T * view.scale).softmax(-1)
        exact, best = weights_HS @ v[: int(length)], weights_HS.mean(0).topk(KEPT).indices
        output = gathered_attention(q[t + 1 : t + 2], rows, v[None, :, None], read[None, None], scale=view.scale)[0]
        yield {
            "mass": float(weights_HS[:, read].sum(-1).mean()),
            "recall": float(torch.isin(best, read).double().mean()),
            "error": float((output - exact).norm() / exact.norm()),
            "overlap": float(numbers_F[FIELDS.index("overlap")]),
        }


def cell(policy: str, correlation: str, seeds: int) -> dict[str, Any]:
    """Means over steps and seeds, and the standard error of the mass and the error over seeds."""
    view, of_seeds = layer_view(), []
    for seed in range(seeds):
        steps = list(measure(POLICIES[policy], view, *made_up(correlation, seed)))
        of_seeds.append({name: torch.tensor([step[name] for step in steps]).nanmean() for name in steps[0]})
    table = {name: torch.stack([row[name] for row in of_seeds]) for name in of_seeds[0]}
    means = {name: round(float(values.mean()), 4) for name, values in table.items()}
    errors = {f"{name}_se": round(float(table[name].std() / seeds**0.5), 4) for name in ("mass", "error")}
    return {"policy": policy, "correlation": correlation, **means, **errors}


@torch.inference_mode()
def write(path: Path, seeds: int) -> dict[str, Any]:
    """Every policy on every kind of queries."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    cells = [cell(policy, correlation, seeds) for correlation in CORRELATIONS for policy in POLICIES]
    report = {"seeds": seeds, "steps": STEPS, "cached": CACHED, "kept": KEPT, "searched": SEARCHED, "cells": cells}
    write_report(path, report, started)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    for row in write(options.output, options.seeds)["cells"]:
        print(
            f"{row['correlation']:7} {row['policy']:32} mass {row['mass']:.3f} ± {row['mass_se']:.3f}, recall "
            f"{row['recall']:.3f}, error {row['error']:.3f}, overlap {row['overlap']:.3f}"
        )


if __name__ == "__main__":
    main()
