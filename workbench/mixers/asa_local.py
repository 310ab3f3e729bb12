"""Local layer of alternating sparse attention, ASA (arXiv 2511.00819): multi-head latent attention in a sliding window.

The abstract: local layers are sliding windows with MLA. We do not know the sizes; those here are ours, as is the order
of the layers: ``pattern: asa_local asa_global`` starts with a local layer, 1:1. Other orders and ratios are other
patterns.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from workbench.contract import Range, mixers
from workbench.mixers.families.latent import LatentAttention, LatentAttentionConfig


@mixers.register
class ASALocal(LatentAttention):
    """Local layer of ASA: latent attention in a window."""

    conformance_cases = ({},)

    class Config(LatentAttentionConfig):
        """Local layer of ASA."""

        kind: Literal["asa_local"] = "asa_local"
        window: Annotated[int | None, Field(ge=1)] = 512
        """Keys that a query sees, its own included."""

        scales: ClassVar[dict[str, dict[str, Any]]] = {
            scale: {**fields, "window": 32 if scale == "tiny" else 512}
            for scale, fields in LatentAttentionConfig.scales.items()
        }

    @classmethod
    def search_space(cls, config: Any, width: int) -> dict[str, Range]:
        windows = {max(1, (config.window or 512) * n // 2) for n in (1, 2, 4)}
        return {**super().search_space(config, width), "window": Range(values=tuple(sorted(windows)))}
