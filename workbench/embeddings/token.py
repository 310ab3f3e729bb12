"""One vector per token id. Legend: B batch, T time, D model width, V vocabulary."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from workbench.contract import Cache, Cost, Embedding, EmbeddingConfig, Role, embeddings
from workbench.layers import INIT_SCALE, RMSNorm


class EmptyCache(Cache):
    """The cache of an embedding that reads no earlier token."""

    ragged = True

    def tensors(self) -> list[Tensor]:
        return []

    def store_in(self, dtype: torch.dtype) -> str | None:
        return None


@embeddings.register
class TokenEmbedding(Embedding):
    """One table with a row per token id."""

    conformance_cases: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"amplify": "norm"})
    roles = {"weight": Role.EMBEDDING}

    class Config(EmbeddingConfig):
        """One vector per token id."""

        kind: Literal["token"] = "token"
        amplify: Literal["none", "sqrt", "norm"] = "none"
        """Amplification before the first block: none, multiplication by sqrt(D), or RMSNorm with a gain (said to help,
        as attention's output is some ten times larger at the start: arXiv 2601.21204, second-hand)."""

    def __init__(self, config: Any, width: int, vocabulary: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, width))
        self.factor = math.sqrt(width) if config.amplify == "sqrt" else 1.0
        self.norm = RMSNorm(width) if config.amplify == "norm" else None

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        # As if the fan-in were D: a tied head then starts with logits of standard deviation INIT_SCALE.
        parameter.normal_(0.0, INIT_SCALE / math.sqrt(self.weight.shape[1]), generator=generator)

    def forward(self, tokens_BT: Tensor, *, segments: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        return self.amplified(F.embedding(tokens_BT, self.weight))

    def amplified(self, e_BTD: Tensor) -> Tensor:
        """The vectors as the first block reads them."""
        if self.norm is not None:
            return self.norm(e_BTD)
        return e_BTD * self.factor if self.factor != 1 else e_BTD

    def transfer_constants(self) -> dict[str, float]:
        return {"amplify": self.factor}

    def new_cache(self, batch: int, device: torch.device | str) -> Cache:
        return EmptyCache()

    @classmethod
    def cost(cls, config: Any, width: int, vocabulary: int) -> Cost:
        gain = width if config.amplify == "norm" else 0
        return Cost(parameters=vocabulary * width + gain, active_parameters=gain, flops=0.0)
