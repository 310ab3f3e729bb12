"""What a trained sequence mixer reads and caches, as tables: keys by query, selected blocks, cache size against length.

Legend: B batch, T time, D model width, G groups of heads, n blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import polars as pl
import torch

from workbench.accounting import account
from workbench.contract import Mixer
from workbench.model import ModelConfig

INPUTS = 4
"""Random inputs that are averaged, so that data-dependent selection appears as shades."""


def reads(mixer: Mixer, width: int, length: int, seed: int = 0) -> pl.DataFrame:
    """How strongly the output at each query position depends on the input at each key position: the gradient norm.

    Exactly zero where a query does not read a key. Discrete choices (which blocks are selected) have no gradient and do
    not count.

    Args:
        mixer: the layer, on the CPU.
        width: model width D.
        length: positions T.
        seed: seed of the random inputs.

    Returns:
        One row per pair with key <= query: query, key (positions), strength (fraction of the query's total).
    """
    generator = torch.Generator().manual_seed(seed)
    x_BTD = torch.randn(INPUTS, length, width, generator=generator).requires_grad_()
    weight_BD = torch.randn(INPUTS, width, generator=generator)
    y_BTD = mixer.float()(x_BTD)
    rows = []
    for t in range(length):
        (gradient_BTD,) = torch.autograd.grad((y_BTD[:, t] * weight_BD).sum(), x_BTD, retain_graph=True)
        strength_T = gradient_BTD.norm(dim=-1).mean(0)[: t + 1]
        rows.append(strength_T / strength_T.sum().clamp_min(1e-30))
    queries = [t for t in range(length) for _ in range(t + 1)]
    keys = [s for t in range(length) for s in range(t + 1)]
    return pl.DataFrame({"query": queries, "key": keys, "strength": torch.cat(rows).tolist()})


def selected(mixer: Any, width: int, length: int, seed: int = 0) -> pl.DataFrame:
    """Blocks that a mixer with block selection picks for one random input: columns query, group, block."""
    x_BTD = torch.randn(1, length, width, generator=torch.Generator().manual_seed(seed))
    chosen_TGn = mixer.float().selection(x_BTD).indices[0]
    valid_TGn = chosen_TGn >= 0
    positions = valid_TGn.nonzero()
    blocks = chosen_TGn[valid_TGn].tolist()
    return pl.DataFrame({"query": positions[:, 0].tolist(), "group": positions[:, 1].tolist(), "block": blocks})


def cache_table(models: Mapping[str, ModelConfig], lengths: Iterable[int], element_bytes: int = 2) -> pl.DataFrame:
    """Cache size of one sequence: columns arm, length, bytes, unevicted (bytes if windows evicted nothing)."""
    rows = []
    for length in lengths:
        for arm, config in models.items():
            cost = account(config, length, element_bytes)
            rows.append({"arm": arm, "length": length, "bytes": cost.cache_bytes, "unevicted": cost.unevicted_bytes})
    return pl.DataFrame(rows)
