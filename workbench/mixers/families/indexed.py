"""Softmax attention to the tokens that a learned index selects: what ``dsa``, ``lsa`` and
their forms on latents share.

    I_{t,s} = Σ_j w_{t,j} ReLU(q_{t,j} · k_s)       q = rot(W_q x_t), k = rot(LayerNorm(W_k x_s)),
                                                    w = W_w x_t / sqrt(J X)
    S_t     = the top_k tokens s ≤ t of the document with the largest I_{t,s}; all while there are no more
    o_t     = attention of t over S_t
    loss    = mean over t of KL(p_t ‖ softmax over S_t of I_{t,s}), p_t the attention over S_t, the mean over its heads

The index reads its inputs without gradients, and p is a constant: the loss trains the index alone, and the loss of the
model never reaches it. In the warm-up (:class:`workbench.contract.WarmUp`) attention is dense, and S_t is everything
visible.

Legend: B batch, T time, D model width, H query heads, G key–value heads, K head channels, J index heads, X index
channels, n selected tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from workbench.config import require
from workbench.contract import (
    AuxOutputs,
    Cache,
    Cost,
    Mixer,
    ParameterRole,
    Range,
    Role,
    Shared,
    Taken,
    VariantConfig,
    WarmUp,
)
from workbench.layers import LayerNorm, Linear, Rotary, RowCache, linear_flops
from workbench.mixers.families.softmax import HeadsConfig, SoftmaxAttention
from workbench.mixers.families.sparse import COVERED_QUERIES, Positions
from workbench.ops.decode_attention import decode_attention
from workbench.ops.sparse_attention import chosen_block_attention, selected_attention, selected_pairs
from workbench.ops.sparse_decoding import Forced, indexer_tokens
from workbench.ops.token_index import (
    IndexKeys,
    index_divergence,
    index_recall,
    scored_pairs,
    select_tokens,
)
from workbench.pooled import is_token, mean_of

FORCED = {"initial": "sink_tokens", "local": "window_tokens"}
"""Tokens that are selected whatever their scores: argument of the selection -> field of the configuration."""
AGREED = ("top_k", *FORCED.values(), "warm_up", "warm_up_trains")
"""Fields in which a layer that reads an index agrees with the one that has it."""
SIZES = ("index_heads", "index_dim", "index_rotary_dim")
"""Fields that a layer without an index of its own does not use."""


class IndexOptions(VariantConfig):
    """Fields of a learned index."""

    top_k: Annotated[int, Field(ge=1)] = 2048
    """Tokens n that a query attends."""
    index_heads: Annotated[int, Field(ge=1)] = 64
    """Index heads J."""
    index_dim: Annotated[int, Field(ge=2, multiple_of=2)] = 128
    """Channels X of an index head."""
    index_rotary_dim: Annotated[int | None, Field(ge=2, multiple_of=2)] = None
    """Rotated channels of an index head, the first ones, where the layer has rotary positions. Default: half of them,
    rounded up to an even number."""
    index_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the index's loss. Optimisers that normalise their updates, and clipping, see ratios of it alone."""
    warm_up: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Fraction of the run's steps, at its start, with dense attention."""
    warm_up_trains: Literal["model", "index"] = "model"
    """What the warm-up trains: the whole model, for a model that starts from random weights; or the index alone, for
    one that is trained already."""

    scales: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"head_dim": 16, "top_k": 64, "index_heads": 2, "index_dim": 16},
        "340m": {"head_dim": 64, "top_k": 1024, "index_heads": 4, "index_dim": 64},
        "1.3b": {"head_dim": 128, "top_k": 1024, "index_heads": 8, "index_dim": 64},
    }

    def resolved(self, width: int) -> Self:
        rotary_dim = self.index_rotary_dim or 2 * -(-self.index_dim // 4)
        require(
            rotary_dim <= self.index_dim,
            "index_rotary_dim",
            got=rotary_dim,
            expected=f"an even number from 2 to index_dim={self.index_dim}",
            do="Leave it out: the default is half of them.",
        )
        return super().resolved(width).changed(index_rotary_dim=rotary_dim)


class IndexedConfig(IndexOptions, HeadsConfig):
    """Fields of attention with plain heads and a learned index."""

    scales: ClassVar[dict[str, dict[str, Any]]] = {
        scale: fields if scale == "tiny" else {**fields, "kv_heads": 4} for scale, fields in IndexOptions.scales.items()
    }


class LSAOptions(IndexOptions):
    """Fields of LongCat sparse attention: :mod:`workbench.mixers.lsa`."""

    sink_tokens: Annotated[int, Field(ge=0)] = 16
    """First tokens of the document that every query attends, among the ``top_k``."""
    window_tokens: Annotated[int, Field(ge=1)] = 1024
    """Last tokens that a query attends, its own included, among the ``top_k``."""
    shared_index: bool = False
    """Whether the tokens are those that the nearest earlier layer of this kind with an index of its own selects. Needs
    such a layer in the pattern."""

    scales: ClassVar[dict[str, dict[str, Any]]] = {
        scale: {**fields, "sink_tokens": 4 if scale == "tiny" else 16, "window_tokens": fields["top_k"] // 2}
        for scale, fields in IndexOptions.scales.items()
    }

    def canonical(self) -> dict[str, Any]:
        plain = super().canonical()  # a layer without an index of its own has no sizes of one
        return {name: value for name, value in plain.items() if not (self.shared_index and name in SIZES)}

    def resolved(self, width: int) -> Self:
        forced = self.sink_tokens + self.window_tokens
        require(
            forced < self.top_k,
            "top_k",
            got=self.top_k,
            expected=f"more than sink_tokens={self.sink_tokens} and window_tokens={self.window_tokens} together",
            do=f"Set top_k: {forced + 1} or more.",
        )
        return super().resolved(width)


class Index(NamedTuple):
    """What a layer with an index gives to those that read it."""

    scored: IndexKeys | None
    """With gradients; None where a cache is read."""
    tokens: Tensor | None
    """(B, T, n) selected tokens, (B, n) of a step; None where every query attends all tokens."""


class TokenIndex(nn.Module):
    """Projections of index queries, index keys and weights of the index heads.

    Args:
        config: with the resolved fields of :class:`IndexOptions`.
        width: D.
        source: width of what index queries are computed from.
        rotates: whether queries and keys have rotary positions.
    """

    def __init__(self, config: Any, width: int, source: int, rotates: bool):
        super().__init__()
        self.J, self.X = config.index_heads, config.index_dim
        self.q = Linear(source, self.J * self.X, parts=((self.J, self.X),))
        self.k = Linear(width, self.X)
        self.k_norm = LayerNorm(self.X)
        self.weights = Linear(width, self.J)
        self.rotary = None
        if rotates:
            self.rotary = Rotary(config.index_rotary_dim, config.rotary_theta, config.rotary_scaling)
        self.roles = {"weights.weight": ParameterRole(Role.ROUTER)}
        for projection in (self.q, self.k, self.weights):
            projection.sensitive = True  # rounding would choose other tokens

    def forward(self, x_BTD: Tensor, source: Tensor | None = None, **positions: Any) -> IndexKeys:
        """Of a normalised input and what index queries are computed from (the input by default), without gradients."""
        x_BTD, source = x_BTD.detach(), (x_BTD if source is None else source).detach()
        q_BTJX, k_BT1X = self.q(source).unflatten(-1, (self.J, self.X)), self.k_norm(self.k(x_BTD))[:, :, None]
        if self.rotary is not None:
            q_BTJX, k_BT1X = self.rotary.pair(q_BTJX, k_BT1X, **positions)
        return IndexKeys(q_BTJX, k_BT1X[:, :, 0], self.weights(x_BTD) * (self.J * self.X) ** -0.5)


class IndexedCache(RowCache):
    """What is attended of every token, and its index key (B, T, X) where the layer has an index. A step scores all
    index keys and reads the rest of the selected tokens alone. A subclass with another ``select`` scores fewer (see
    ``workbench.decoding.policies``).

    Args:
        attended, scored: shapes of one token in each tensor.
        top_k: tokens that a query attends.
    """

    def __init__(
        self,
        batch: int,
        length: int,
        attended: list[tuple[int, ...]],
        scored: list[tuple[int, ...]],
        top_k: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ):
        super().__init__(batch, length, [*attended, *scored], device, dtype)
        self.num_attended, self.top_k = len(attended), top_k

    def select(self, index: IndexKeys, lengths_B: Tensor, forced: Forced) -> Tensor:
        """The tokens that the query of a step attends, (B, n) int64, ascending, -1 behind them.

        Args:
            index: of the step's token, which is cached already.
            lengths_B: tokens of every sequence.
            forced: tokens that are selected whatever their scores.
        """
        k_BSX = self.rows[-1]
        if self.positions_B is None:  # counted on the host, which knows how many there are
            k_BSX = k_BSX[:, : self.length].contiguous()
        of_step = index.q_BTJX[:, 0], index.w_BTJ[:, 0], k_BSX[:, None]
        return indexer_tokens(*of_step, lengths_B, count=self.top_k, forced=forced)[:, 0]

    def step_bytes(self, lengths: Sequence[int]) -> float:
        sizes, split = [x[0, 0].nbytes for x in self.rows], self.num_attended
        attended = sum(sizes[:split]) * sum(min(length, self.top_k) for length in lengths)
        return attended + (sum(sizes[split:]) * sum(lengths) if self.capacity > self.top_k else 0)


class Attended(NamedTuple):
    """What attention is computed from."""

    queries: tuple[Tensor, ...]
    rows: tuple[Tensor, ...]
    """What is cached of a token and attended: of T tokens, then of all that they see."""
    source: Tensor
    """What queries, and index queries, are computed from."""


class LearnedIndex(Mixer):
    """What attention to the tokens that an index selects does whatever its keys and values are: an index of its own, or
    that of an earlier layer. A subclass attends, to all tokens and to selected ones."""

    chosen_by = ("index.",)
    out: Linear

    def add_index(self, config: Any, width: int, *, source: int, rotates: bool) -> None:
        """Called once by the constructor. Fields that ``config`` lacks (``sink_tokens``, ``window_tokens``,
        ``shared_index``) are off; arguments as of :class:`TokenIndex`."""
        self.top_k: int = config.top_k
        self.forced: dict[str, Any] = {name: getattr(config, field, 0) for name, field in FORCED.items()}
        self.index_name = index_name(config)
        self.index = None if getattr(config, "shared_index", False) else TokenIndex(config, width, source, rotates)
        self.index_weight: float = config.index_weight
        self.stage = WarmUp(config.warm_up, config.warm_up_trains == "index")

    @abstractmethod
    def attended(self, x_BTD: Tensor, cache: IndexedCache | None) -> Attended:
        """Of the layer's input."""

    @abstractmethod
    def attend_all(self, attended: Attended, segments: Tensor | None, *, cached: bool) -> Tensor:
        """Attention to all tokens that a query sees: (B, T, H, V)."""

    @abstractmethod
    def attend_selected(self, attended: Attended, tokens_BTn: Tensor, positions: Positions) -> Tensor:
        """Attention to the selected tokens: (B, T, H, V)."""

    @abstractmethod
    def attend_in_step(self, attended: Attended, tokens_Bn: Tensor | None, positions_B: Tensor) -> Tensor:
        """Attention of one query per sequence, to the selected tokens or, with None, to all: (B, 1, H, V).

        Args:
            attended: with the memory of the cache as ``rows``.
        """

    @abstractmethod
    def compared(self, attended: Attended) -> tuple[Tensor, Tensor, float]:
        """Queries (B, T, H, K), keys (B, T, G, K) and the factor on their products, whose softmax the index learns."""

    @abstractmethod
    def row_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of one token in :attr:`Attended.rows`."""

    @property
    def forced_tokens(self) -> Forced:
        """Tokens that are selected whatever their scores, for operators of steps."""
        return Forced(self.forced["initial"], self.forced["local"])

    def warm_up(self) -> WarmUp:
        return self.stage

    @classmethod
    def gives(cls, config: Any) -> Mapping[str, Mapping[str, Any]]:
        return {} if getattr(config, "shared_index", False) else {index_name(config): _agreed(config)}

    @classmethod
    def takes(cls, config: Any) -> Mapping[str, Taken]:
        reads = getattr(config, "shared_index", False)
        return {index_name(config): Taken("nearest", True, _agreed(config))} if reads else {}

    def forward(
        self,
        x_BTD: Tensor,
        *,
        segments: Tensor | None = None,
        cache: Cache | None = None,
        aux: AuxOutputs | None = None,
        shared: Shared | None = None,
    ) -> Tensor:
        assert cache is None or isinstance(cache, IndexedCache)
        B, T, _ = x_BTD.shape
        attended = self.attended(x_BTD, cache)
        place = {} if cache is None else cache.rotary()
        scored = None if self.index is None else self.index(x_BTD, attended.source, **place)
        taken: Index = Index(None, None) if shared is None else shared.taken.get(self.index_name, Index(None, None))
        if cache is not None and cache.positions_B is not None:
            tokens, o_BTHV = self._step(attended, scored, taken.tokens, cache)
            index = Index(None, tokens)
        else:
            positions = Positions.of(x_BTD, segments, cache)
            if cache is not None:
                rows = cache.extend(*attended.rows, *(() if scored is None else (scored.k_BSX,)))
                attended = attended._replace(rows=rows[: cache.num_attended])
                scored = None if scored is None else scored._replace(k_BSX=rows[-1])
            warms_up, sees_all = aux is not None and aux.warming_up, positions.end <= self.top_k
            measures = aux is not None and aux.collect_metrics
            tokens = taken.tokens
            if scored is not None and not sees_all and (measures or not warms_up):
                if cache is not None and T == 1:  # a step whose position is counted on the host
                    lengths_B = torch.full((B,), cache.length, device=x_BTD.device)
                    tokens = cache.select(scored, lengths_B, self.forced_tokens)[:, None].to(torch.int32)
                else:
                    tokens = select_tokens(scored, count=self.top_k, **self.forced, **positions.settings)
            index = Index(scored, tokens) if self.index is not None else Index(taken.scored, tokens)
            if sees_all or warms_up:
                o_BTHV = self.attend_all(attended, segments, cached=cache is not None)
            else:
                assert tokens is not None
                o_BTHV = self.attend_selected(attended, tokens, positions)
            if cache is None and aux is not None:
                self._learn(aux, index, attended, positions)
        if self.index_name in self.given_to_later:
            assert shared is not None
            shared.given[self.index_name] = index if cache is None else index._replace(scored=None)
        return self.out(o_BTHV.flatten(2).to(x_BTD.dtype))

    def _step(
        self, attended: Attended, scored: IndexKeys | None, taken_Bn: Tensor | None, cache: IndexedCache
    ) -> tuple[Tensor | None, Tensor]:
        """Selected tokens (B, n), None for all, and (B, 1, H, V) of one token per sequence."""
        assert cache.positions_B is not None
        lengths_B = cache.append(*attended.rows, *(() if scored is None else (scored.k_BSX,)))
        attended, tokens_Bn = attended._replace(rows=tuple(cache.rows[: cache.num_attended])), taken_Bn
        if cache.capacity <= self.top_k:
            tokens_Bn = None
        elif scored is not None:
            tokens_Bn = cache.select(scored, lengths_B, self.forced_tokens)
        return tokens_Bn, self.attend_in_step(attended, tokens_Bn, cache.positions_B)

    def _learn(self, aux: AuxOutputs, index: Index, attended: Attended, positions: Positions) -> None:
        """Append the index's loss of this layer, and how much of its attention the index finds."""
        if index.scored is None:  # built without the layer that has the index
            return
        valid_BT, start_BT = is_token(positions.segments), positions.start_BT
        q, k, scale = self.compared(attended)
        tokens = None if aux.warming_up else index.tokens
        kl_BT = index_divergence(index.scored, q, k, tokens, start_BT=start_BT, scale=scale)
        valid_N = None if valid_BT is None else valid_BT.flatten()
        aux.losses.append(self.index_weight * aux.token_mean(kl_BT.flatten(), valid_N))
        if not aux.collect_metrics:
            return
        aux.metrics["index_divergence"] = mean_of(kl_BT, valid_BT)
        if index.tokens is not None:
            recall_BQ, mass_BQ, counts_BQ = index_recall(
                index.tokens, q, k, start_BT=start_BT, queries=COVERED_QUERIES, scale=scale, valid_BT=valid_BT
            )
            aux.metrics["index_recall"] = mean_of(recall_BQ, counts_BQ)
            aux.metrics["index_mass"] = mean_of(mass_BQ, counts_BQ)

    def transfer_constants(self) -> Mapping[str, float]:
        # factors of the index scores
        return {} if self.index is None else {"index_heads": self.index.J**-0.5, "index_dim": self.index.X**-0.5}

    def score_obstacle(self) -> str:
        return "queries meet the keys of selected tokens, whose largest score is not measured"

    def policy_obstacle(self) -> str:
        return "attention to all tokens; this layer reads those that a learned index selects"

    def new_cache(self, batch: int, length: int, device: torch.device | str, dtype: torch.dtype) -> IndexedCache:
        scored: list[tuple[int, ...]] = [] if self.index is None else [(self.index.X,)]
        return IndexedCache(batch, length, self.row_shapes(), scored, self.top_k, device, dtype)

    @classmethod
    def search_space(cls, config: Any, width: int) -> dict[str, Range]:
        if getattr(config, "shared_index", False):
            return {}  # the layer that has the index sets what they share
        least = 1 + sum(getattr(config, field, 0) for field in FORCED.values())
        return {"top_k": Range(values=tuple(sorted({max(least, config.top_k // 2), config.top_k, config.top_k * 2})))}


def with_index(cost: Cost, config: Any, width: int, source: int, length: int, element_bytes: int) -> Cost:
    """The cost of sparse attention with that of its index, which takes 2 J X FLOPs for every visible key of a query
    that sees more than top_k. The divergence, which training adds, computes scores again."""
    cost = replace(cost, unevicted_bytes=None)
    if getattr(config, "shared_index", False):
        return cost
    J, X = config.index_heads, config.index_dim
    shapes = ((source, J * X), (width, X), (width, J))
    return cost.plus(
        parameters=sum(a * b for a, b in shapes) + 2 * X,
        flops=linear_flops(*shapes) + 2 * J * X * scored_pairs(length, config.top_k) / length,
        cache_bytes=X * length * element_bytes,
    )


class IndexedAttention(LearnedIndex, SoftmaxAttention):
    """Attention with plain heads to the tokens that an index selects."""

    def __init__(self, config: Any, width: int):
        super().__init__(config, width)
        self.add_index(config, width, source=width, rotates=config.rotary)

    def attended(self, x_BTD: Tensor, cache: IndexedCache | None) -> Attended:
        q, k, v = self._project(x_BTD, cache=cache)
        return Attended((q,), (k, v), x_BTD)

    def attend_all(self, attended: Attended, segments: Tensor | None, *, cached: bool) -> Tensor:
        return self.attend(*attended.queries, *attended.rows, segments=segments, cached=cached)

    def attend_selected(self, attended: Attended, tokens_BTn: Tensor, positions: Positions) -> Tensor:
        (q,), (k, v) = attended.queries, attended.rows
        return selected_attention(q, k, v, tokens_BTn[:, :, None], block=1, **positions.settings)[0]

    def attend_in_step(self, attended: Attended, tokens_Bn: Tensor | None, positions_B: Tensor) -> Tensor:
        (q,), (k, v), scale = attended.queries, attended.rows, self.K**-0.5
        q_BHK = q[:, 0].to(k.dtype)
        if tokens_Bn is None:
            return decode_attention(q_BHK, k, v, positions_B + 1, scale=scale)[0][:, None]
        chosen = tokens_Bn[:, None].expand(-1, self.G, -1)
        return chosen_block_attention(q_BHK, k, v, chosen, positions_B, block=1, scale=scale)[:, None]

    def compared(self, attended: Attended) -> tuple[Tensor, Tensor, float]:
        return attended.queries[0], attended.rows[0], self.K**-0.5

    def row_shapes(self) -> list[tuple[int, ...]]:
        return [(self.G, self.K)] * 2

    @classmethod
    def cost(cls, config: Any, width: int, length: int, element_bytes: int = 2) -> Cost:
        left_out = length * (length + 1) // 2 - selected_pairs(length, length, 1, config.top_k)
        dense = super().cost(config, width, length, element_bytes)
        sparse = dense.plus(flops=-4 * config.heads * config.head_dim * left_out / length)
        return with_index(sparse, config, width, width, length, element_bytes)


def index_name(config: Any) -> str:
    """Name under which layers of this kind share an index."""
    return f"the index of {config.kind}"


def _agreed(config: Any) -> dict[str, Any]:
    return {field: getattr(config, field) for field in AGREED if hasattr(config, field)}
