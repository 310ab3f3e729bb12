"""Softmax attention as a policy sees it, whether a cache has keys and values or latents.

A latent layer is read in its absorbed form: its keys are [latent ; rotated key], its values the latents, and the
queries those that meet latents (:mod:`workbench.mixers.families.latent`).

Legend: B sequences, T tokens, S cached tokens, H query heads, G groups of heads that share keys, K key channels, V
value channels of a row, n chosen tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from workbench.contract import Mixer
from workbench.mixers.families.latent import LatentAttention, LatentCache
from workbench.mixers.families.softmax import KeyValueCache, SoftmaxAttention
from workbench.ops.sparse_decoding import Pool, gathered_attention


class View(ABC):
    """How one layer's cache is read."""

    cache: ClassVar[type]
    """Class of the mixer's own cache."""
    default_channels: ClassVar[int]
    """Channels of a token index (AsyncTLS, arXiv 2604.07815, §4.1)."""

    def __init__(self, mixer: Any, H: int, G: int, K: int, row_channels: int, scale: float):
        self.mixer, self.H, self.G, self.K, self.scale = mixer, H, G, K, scale
        self.row_channels = row_channels
        """Numbers that attention reads of a token, per group."""

    @abstractmethod
    def queries(self, *queries: Tensor) -> Tensor:
        """(B, T, H, K) from what the mixer passes to its cache."""

    @abstractmethod
    def keys(self, *new: Tensor) -> Tensor:
        """(B, T, G, K) from the new rows of a cache."""

    @abstractmethod
    def packed(self, *new: Tensor) -> Tensor:
        """(B, T, G, X) all that attention reads of new tokens, in one row per group."""

    @abstractmethod
    def unpacked(self, packed_BSGX: Tensor) -> list[Tensor]:
        """Packed rows in the form of the layer's cache."""

    @abstractmethod
    def read_packed(
        self, q_BHK: Tensor, packed_BSGX: Tensor, tokens_BGn: Tensor, block: int, lengths_B: Tensor, pool: Pool
    ) -> Tensor:
        """As :meth:`read`, from packed rows.

        Args:
            packed_BSGX: rows of slots.
            tokens_BGn: positions of tokens, or numbers of blocks, -1 for none.
            block, lengths_B: as of :meth:`read`.
            pool: in which slots they are.
        """

    @abstractmethod
    def read(
        self, q_BHK: Tensor, rows: list[Tensor], tokens_BGn: Tensor, block: int = 1, lengths_B: Tensor | None = None
    ) -> Tensor:
        """What the layer's cache returns for one token: (B, 1, H, V).

        Args:
            rows: tensors of the cache, (B, S, …).
            tokens_BGn: rows to attend, -1 for none; with ``block``, numbers of blocks of so many rows.
            block: attend to all tokens of blocks.
            lengths_B: tokens of every sequence, where blocks are read.
        """


class HeadsView(View):
    """Keys and values per head or group."""

    cache = KeyValueCache
    default_channels = 32

    def __init__(self, mixer: SoftmaxAttention):
        # a parametrisation's multiplier is in the queries
        super().__init__(mixer, mixer.H, mixer.G, mixer.K, 2 * mixer.K, mixer.K**-0.5)

    def queries(self, *queries: Tensor) -> Tensor:
        (q_BTHK,) = queries
        return q_BTHK

    def keys(self, *new: Tensor) -> Tensor:
        return new[0]

    def packed(self, *new: Tensor) -> Tensor:
        return torch.cat(new, dim=-1)

    def unpacked(self, packed_BSGX: Tensor) -> list[Tensor]:
        return list(packed_BSGX.split(self.K, dim=-1))

    def read_packed(
        self, q_BHK: Tensor, packed_BSGX: Tensor, tokens_BGn: Tensor, block: int, lengths_B: Tensor, pool: Pool
    ) -> Tensor:
        return self._attend(q_BHK, self.unpacked(packed_BSGX), tokens_BGn, block, lengths_B, pool)

    def read(
        self, q_BHK: Tensor, rows: list[Tensor], tokens_BGn: Tensor, block: int = 1, lengths_B: Tensor | None = None
    ) -> Tensor:
        return self._attend(q_BHK, rows, tokens_BGn, block, lengths_B, None)

    def _attend(
        self,
        q_BHK: Tensor,
        rows: list[Tensor],
        tokens_BGn: Tensor,
        block: int,
        lengths_B: Tensor | None,
        pool: Pool | None,
    ) -> Tensor:
        where: dict[str, Any] = {"block": block, "lengths_B": lengths_B, "pool": pool}
        settings = {"scale": self.scale, "softcap": self.mixer.softcap, "sink_H": self.mixer.sink}
        return gathered_attention(q_BHK, rows[0], rows[1], tokens_BGn, **where, **settings)[:, None]


class LatentView(View):
    """Latents, each for a group of heads, and one rotated key."""

    cache = LatentCache
    default_channels = 128

    def __init__(self, mixer: LatentAttention):
        project = mixer.project
        K = project.C + project.R
        super().__init__(mixer, project.H, project.g, K, K, project.scale)

    def queries(self, *queries: Tensor) -> Tensor:
        return self.mixer.project.absorbed(*queries)

    def keys(self, *new: Tensor) -> Tensor:
        return self.mixer.project.latent_keys(*new)

    def packed(self, *new: Tensor) -> Tensor:
        return self.keys(*new)  # with the rotated key once per group

    def unpacked(self, packed_BSGX: Tensor) -> list[Tensor]:
        C = self.mixer.project.C
        return [packed_BSGX[..., :C], packed_BSGX[:, :, :1, C:]]

    def read_packed(
        self, q_BHK: Tensor, packed_BSGX: Tensor, tokens_BGn: Tensor, block: int, lengths_B: Tensor, pool: Pool
    ) -> Tensor:
        latents_BSGC, shared_BS1R = self.unpacked(packed_BSGX)
        where: dict[str, Any] = {"block": block, "lengths_B": lengths_B, "pool": pool}
        if self.G == 1:
            return self._attend(q_BHK, latents_BSGC, None, tokens_BGn, shared_BS1R=shared_BS1R, **where)
        # groups have different tokens in a slot, and so different rotated keys
        return self._attend(q_BHK, packed_BSGX, latents_BSGC, tokens_BGn, **where)

    def read(
        self, q_BHK: Tensor, rows: list[Tensor], tokens_BGn: Tensor, block: int = 1, lengths_B: Tensor | None = None
    ) -> Tensor:
        where: dict[str, Any] = {"block": block, "lengths_B": lengths_B}
        return self._attend(q_BHK, rows[0], None, tokens_BGn, shared_BS1R=rows[1], **where)

    def _attend(self, *inputs: Any, **where: Any) -> Tensor:
        o_BHC = gathered_attention(*inputs, scale=self.scale, sink_H=self.mixer.sink, **where)
        return self.mixer.project.from_latents(o_BHC[:, None])


def view_of(mixer: Mixer) -> View | None:
    """The view of a layer that keeps all tokens and reads them through its cache; None for every other layer."""
    if getattr(mixer, "window", None) is not None or _obstacle(mixer) is not None:
        return None
    if isinstance(mixer, SoftmaxAttention):
        return HeadsView(mixer)
    return LatentView(mixer) if isinstance(mixer, LatentAttention) else None


def unread(mixer: Mixer) -> str:
    """Why a layer has no view."""
    if (obstacle := _obstacle(mixer)) is not None:
        return obstacle
    if isinstance(mixer, SoftmaxAttention | LatentAttention):
        return "attention to all tokens; a window already bounds what this layer reads"
    return "attention to all tokens; what this layer reads is part of its definition"


def _obstacle(mixer: Mixer) -> str | None:
    return mixer.policy_obstacle() if isinstance(mixer, SoftmaxAttention | LatentAttention) else None
