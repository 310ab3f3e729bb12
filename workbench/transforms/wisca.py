"""WISCA: paired weights get equal L1 norms (arXiv 2508.16676)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from workbench.contract import RescalingPair
from workbench.transforms.base import Weights, transforms
from workbench.transforms.pairs import ATTENTION, PairConfig, PairRescaling


@transforms.register
class Wisca(PairRescaling):
    """s = sqrt(‖second‖₁ / ‖first‖₁) multiplies the first side of a pair and divides the second: queries by s and keys
    by 1/s, values by s and the output matrix by 1/s. Both sides then have the same norm.

    From the paper as its notes state it (no code is published): the formula, tensor-wise and row-wise scales, attention
    pairs alone, every 250 steps or once at the start. Ours: a mean norm, one scale per head, powers of two, other
    pairs, and every choice about the optimiser's state, on which the paper is silent.
    """

    conformance_cases = (
        {"source": {"mixers": {"full": {"heads": 4, "kv_heads": 2, "softcap": 2.0}}}},
        {
            "source": {"pattern": "mla sliding", "feedforward": "swiglu moe"},
            "config": {"granularity": "row", "pairs": ["qk", "qk_rotary", "vo", "up_down"], "state": "rescale"},
        },
        {
            "source": {"pattern": "full gdn", "mixers": {"full": {"heads": 4, "kv_heads": 2}}},
            "config": {"granularity": "head", "norm": "mean", "state": "reset", "missing": "skip"},
        },
        {"source": {}, "config": {"state": "compensate", "power_of_two": True}},
    )

    names_field = "pairs"
    variant_configs = (
        {"granularity": "row"},
        {"pairs": ["up_down"], "norm": "mean", "power_of_two": True},
    )

    class Config(PairConfig):
        """Balance paired weights."""

        kind: Literal["wisca"] = "wisca"
        pairs: tuple[str, ...] = ATTENTION
        """Pairs that are balanced, by the names that components declare: qk, qk_rotary (rotated channels of latent
        attention) and vo; also up_down of a feed-forward, tables_mix of an n-gram embedding."""
        granularity: Literal["tensor", "head", "row"] = "tensor"
        """What shares a scale: a tensor; a head, key–value group or expert; or the smallest part that is exact, which
        is a rotary pair of channels for queries and keys, and a channel for values and hidden units."""
        norm: Literal["sum", "mean"] = "sum"
        """Norm of a side: the sum of magnitudes (the paper), or their mean. Where sides differ in size, as with fewer
        keys than queries, the sum scales even balanced weights; the mean does not."""
        power_of_two: bool = False
        """Whether scales are rounded to powers of two, with which every number format rescales exactly."""

        def canonical(self) -> dict[str, Any]:
            return {**super().canonical(), "pairs": sorted(self.pairs)}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.config.pairs)

    def scales(self, pair: RescalingPair, weights: Weights) -> Tensor:
        group_S = {
            "tensor": torch.zeros_like(pair.heads),
            "head": pair.heads,
            "row": torch.arange(len(pair.heads)),
        }[self.config.granularity]
        first_G, second_G = (self._norms(side, group_S, weights) for side in (pair.first, pair.second))
        ratio_G = (second_G / first_G).sqrt()
        ratio_G = torch.where(ratio_G.isfinite() & (ratio_G > 0), ratio_G, 1.0)  # a side of zeros is left alone
        if self.config.power_of_two:
            ratio_G = ratio_G.log2().round().exp2()
        return ratio_G[group_S]

    def _norms(self, side: Mapping[str, Tensor], group_S: Tensor, weights: Weights) -> Tensor:
        """(G,) fp64 L1 norm of the numbers of one side that share a scale."""
        groups = int(group_S.max()) + 1
        sums_G, counts_G = torch.zeros(2, groups, dtype=torch.float64).unbind()
        for name, index in side.items():
            magnitudes = weights[name].detach().double().abs().sum_to_size(index.shape).flatten().cpu()
            chosen = index.flatten() >= 0
            group = group_S[index.flatten()[chosen]]
            sums_G = sums_G.index_add(0, group, magnitudes[chosen])
            numbers = weights[name].numel() / index.numel()
            counts_G = counts_G.index_add(0, group, torch.full(group.shape, numbers, dtype=torch.float64))
        return sums_G / counts_G if self.config.norm == "mean" else sums_G
