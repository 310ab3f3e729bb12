"""Attention to the latents of the tokens that a learned index selects: what ``dsa_latent`` and ``lsa_latent`` share.

All heads of a query attend the latents of the same tokens. Index queries are computed from the latent of the queries
where the layer has one (``query_latent``). Attention to all tokens (the warm-up, and rows of at most ``top_k`` tokens)
takes the expanded form of :mod:`workbench.mixers.families.latent`, to selected ones the absorbed form.

Legend: as of :mod:`workbench.mixers.families.indexed` and :mod:`workbench.mixers.families.latent`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from workbench.contract import Cost, Range
from workbench.mixers.families.indexed import Attended, IndexedCache, IndexOptions, LearnedIndex, with_index
from workbench.mixers.families.latent import LatentAttention, LatentConfig
from workbench.mixers.families.sparse import Positions
from workbench.ops.decode_attention import decode_attention
from workbench.ops.sparse_attention import chosen_block_attention, selected_attention, selected_pairs


class IndexedLatentConfig(IndexOptions, LatentConfig):
    """Fields of attention over latents with a learned index."""

    window: ClassVar[None] = None
    sink: ClassVar[bool] = False
    form: ClassVar[str] = "expanded"


class IndexedLatentAttention(LearnedIndex, LatentAttention):
    """Attention to the latents of the tokens that an index selects."""

    def __init__(self, config: Any, width: int):
        super().__init__(config, width)
        source = config.query_latent or width
        self.add_index(config, width, source=source, rotates=config.rotary_dim > 0)

    def attended(self, x_BTD: Tensor, cache: IndexedCache | None) -> Attended:
        source = self.project.query_source(x_BTD)
        q_n, q_r, c, kr = self.project(x_BTD, source, **({} if cache is None else cache.rotary()))
        return Attended((q_n, q_r), (c, kr), source)

    def attend_all(self, attended: Attended, segments: Tensor | None, *, cached: bool) -> Tensor:
        return self.attend(
            *attended.queries, *attended.rows, segments=segments, absorbed=cached and attended.source.shape[1] == 1
        )

    def attend_selected(self, attended: Attended, tokens_BTn: Tensor, positions: Positions) -> Tensor:
        q, k, scale = self.compared(attended)
        options: dict[str, Any] = {"scale": scale, "value_dim": self.project.C, **positions.settings}
        return self.project.from_latents(selected_attention(q, k, None, tokens_BTn[:, :, None], block=1, **options)[0])

    def attend_in_step(self, attended: Attended, tokens_Bn: Tensor | None, positions_B: Tensor) -> Tensor:
        project, (c, kr) = self.project, attended.rows
        q_BHK, shared = project.absorbed(*attended.queries)[:, 0].to(c.dtype), kr if project.R else None
        options: dict[str, Any] = {"scale": project.scale, "shared_BS1R": shared}
        if tokens_Bn is None:
            o_BHC, _ = decode_attention(q_BHK, c, None, positions_B + 1, **options)
        else:
            chosen = tokens_Bn[:, None].expand(-1, project.g, -1)
            o_BHC = chosen_block_attention(q_BHK, c, None, chosen, positions_B, block=1, **options)
        return project.from_latents(o_BHC[:, None])

    def compared(self, attended: Attended) -> tuple[Tensor, Tensor, float]:
        project = self.project
        return project.absorbed(*attended.queries), project.latent_keys(*attended.rows), project.scale

    def row_shapes(self) -> list[tuple[int, ...]]:
        return [(self.project.g, self.project.C), (1, self.project.R)]

    @classmethod
    def cost(cls, config: Any, width: int, length: int, element_bytes: int = 2) -> Cost:
        T, n, cost = length, config.top_k, super().cost(config, width, length, element_bytes)
        if n < T:  # absorbed, and selected pairs alone
            expanded, absorbed = (2 * (2 * C + config.rotary_dim) for C in (config.head_dim, config.latent_dim))
            pairs = absorbed * selected_pairs(T, T, 1, n) - expanded * (T * (T + 1) // 2)
            cost = cost.plus(flops=config.heads * pairs / T)
        return with_index(cost, config, width, config.query_latent or width, T, element_bytes)

    @classmethod
    def search_space(cls, config: Any, width: int) -> dict[str, Range]:
        return {**LatentAttention.search_space(config, width), **super().search_space(config, width)}
