"""Grouped latent attention, GLA (arXiv 2505.21487): several latents per token, each for one group of heads.

The definitions are those of :mod:`workbench.mixers.families.latent` with h_c > 1. Every group of heads has separate
keys, so that the cache can be split over devices. (Not Gated Linear Attention, which is called GLA as well.)
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from workbench.contract import Range, mixers
from workbench.mixers.families.latent import LatentAttention, LatentAttentionConfig


@mixers.register
class GroupedLatent(LatentAttention):
    """Grouped latent attention: a few latents per token, each for one group of heads."""

    conformance_cases = ({}, {"latents": 4, "latent_dim": 12, "window": 9, "sink": True})

    class Config(LatentAttentionConfig):
        """Grouped latent attention."""

        kind: Literal["grouped_latent"] = "grouped_latent"
        latents: int = 2
        """Latents h_c per token; a divisor of heads. The paper's GLA-2 has 2 of 2 · head_dim channels."""

        scales: ClassVar[dict[str, dict[str, Any]]] = {
            scale: {**fields, "latents": 2 if scale == "tiny" else 4}
            for scale, fields in LatentAttentionConfig.scales.items()
        }

    @classmethod
    def search_space(cls, config: Any, width: int) -> dict[str, Range]:
        divisors = tuple(g for g in range(1, config.heads + 1) if config.heads % g == 0)
        return {**super().search_space(config, width), "latents": Range(values=divisors)}
