"""Sliding-window attention: every token sees exactly the last w tokens, itself included (arXiv 2004.05150)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from workbench.contract import Range, mixers
from workbench.mixers.families.softmax import AttentionConfig, SoftmaxAttention


@mixers.register
class Sliding(SoftmaxAttention):
    """Softmax attention inside a window; the cache has at most w tokens."""

    conformance_cases = (
        {},
        {"window": 1},
        {"window": 7, "kv_heads": 1},
        {"window": 7, "exclusive": True, "convolution": "keys_values", "output_gate": "head", "value_residual": True},
    )

    class Config(AttentionConfig):
        """Sliding-window softmax attention."""

        kind: Literal["sliding"] = "sliding"
        window: Annotated[int, Field(ge=1)] = 512
        """Keys w that a query sees, its own included; for no window, use mixer 'full'."""

        scales: ClassVar[dict[str, dict[str, Any]]] = {
            scale: {**fields, "window": 64 if scale == "tiny" else 512}
            for scale, fields in AttentionConfig.scales.items()
        }

    @classmethod
    def search_space(cls, config: Any, width: int) -> dict[str, Range]:
        windows = sorted({max(1, config.window // 4), max(1, config.window // 2), config.window, config.window * 2})
        return {**super().search_space(config, width), "window": Range(values=tuple(windows))}
