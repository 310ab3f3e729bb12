"""Multi-head latent attention (arXiv 2405.04434, §2.1): keys and values are computed from a small latent.

    c_s = RMSNorm(W_d x_s)      kr_s = rotate(W_kr x_s), shared by all heads      [q_n ; q_r] = W_q x, q_r rotated
    expanded:  k = [W_uk c ; kr],  v = W_uv c,  scores (q_n·k_n + q_r·kr) / sqrt(dn + dr)
    absorbed:  the same with queries [W_ukᵀ q_n ; q_r], keys [c ; kr] and values c; o = W_uv (Σ p c)

Both forms are one function. Training takes the expanded form (fewer FLOPs per key), one-token decode the absorbed one
(it reads only the cache). The cache holds the normalised latent and the rotated key.

With h_c latents head i reads latent floor(i / (H / h_c)): :mod:`workbench.mixers.grouped_latent`.

Legend: B batch, T queries, S keys, D model width, H heads, g latents h_c, C latent channels dc, N content channels dn
of a head, V value channels (= dn), R rotary channels dr.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from workbench.config import require
from workbench.contract import (
    AuxOutputs,
    Cache,
    Capabilities,
    Cost,
    Mixer,
    Range,
    RescalingPair,
    Role,
    Scores,
    VariantConfig,
)
from workbench.layers import Linear, Rotary, RotaryScaling, RowCache, ScaledScores, linear_flops
from workbench.mixers.families.softmax import channel_scales, heads_of, nearest_divisor
from workbench.ops.attention import score_maxima
from workbench.ops.decode_attention import decode_attention
from workbench.ops.sparse_attention import document_starts, visible_block_attention, visible_pairs


class LatentConfig(VariantConfig):
    """Fields that every attention over latents shares."""

    heads: Annotated[int | None, Field(ge=1)] = None
    """Query heads H. Default: width / head_dim."""
    head_dim: Annotated[int | None, Field(ge=1)] = None
    """Content channels dn per head, and value channels. Default: width / heads, or 64 where neither is given."""
    latents: Annotated[int, Field(ge=1)] = 1
    """Latents h_c per token; a divisor of heads."""
    latent_dim: Annotated[int | None, Field(ge=1)] = None
    """Channels dc of one latent. Default: 4 · head_dim, over the number of latents (arXiv 2405.04434 has 4 ·
    head_dim)."""
    rotary_dim: Annotated[int | None, Field(ge=0, multiple_of=2)] = None
    """Rotated channels dr that all heads share, even; 0 leaves the layer without positions. Default: head_dim / 2."""
    rotary_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rotary_scaling: RotaryScaling | None = None
    """Scaling of the rotary positions to a longer context: {kind: linear, factor: 4}, llama3 or yarn. Default: none."""
    query_latent: Annotated[int | None, Field(ge=1)] = None
    """Channels of a normalised latent that queries are computed from. Default: from the input."""
    latent_scale: bool = False
    """Whether a normalised latent of d channels is multiplied by sqrt(D / d) (LongCat-Flash, arXiv 2509.01322, eq. 7).
    There all matrices start with one variance, so that without the factor what is computed from a small latent starts
    smaller than what is computed from the input. Here a matrix starts by its fan-in, which makes them equal without
    the factor; with it, the matrices out of the latent start as if their fan-in were D (ours). The start is thus the
    same function either way, and an update of these matrices acts sqrt(D / d) times as strongly with the factor."""

    scales: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"head_dim": 16},
        "340m": {"head_dim": 64},
        "1.3b": {"head_dim": 128},
    }

    def canonical(self) -> dict[str, Any]:
        plain = super().canonical()
        if self.rotary_scaling is None:
            del plain["rotary_scaling"]  # off: the model is the same
        return plain

    def resolved(self, width: int) -> Self:
        head_dim = self.head_dim or (width // self.heads if self.heads else min(64, width))
        require(
            self.heads or width % head_dim == 0,
            "head_dim",
            got=head_dim,
            expected=f"a divisor of width={width}, or heads given",
            do=f"Nearest: {nearest_divisor(width, head_dim)}.",
        )
        heads = self.heads or width // head_dim
        require(
            heads % self.latents == 0,
            "latents",
            got=self.latents,
            expected=f"a divisor of heads={heads}",
            do=f"Nearest: {nearest_divisor(heads, self.latents)}.",
        )
        rotary_dim = max(2, head_dim // 4 * 2) if self.rotary_dim is None else self.rotary_dim
        return self.changed(
            heads=heads,
            head_dim=head_dim,
            rotary_dim=rotary_dim,
            latent_dim=self.latent_dim or max(1, 4 * head_dim // self.latents),
        )


class LatentNorm(nn.Module):
    """RMSNorm of each latent with its own gain, times a constant."""

    roles = {"weight": Role.NORM}

    def __init__(self, latents: int, channels: int, factor: float):
        super().__init__()
        self.factor = factor
        self.weight = nn.Parameter(torch.empty(latents, channels))

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        parameter.fill_(1.0)

    def forward(self, c_BTgC: Tensor) -> Tensor:
        return nn.functional.rms_norm(c_BTgC, c_BTgC.shape[-1:], eps=1e-6).to(c_BTgC.dtype) * (
            self.weight * self.factor
        ).to(c_BTgC.dtype)


class LatentProjections(ScaledScores, nn.Module):
    """Queries, latents and rotated keys of the tokens, and the two ways to heads and back."""

    def __init__(self, config: Any, width: int):
        super().__init__()
        self.H, self.g, self.C = config.heads, config.latents, config.latent_dim
        self.N, self.R = config.head_dim, config.rotary_dim
        self.score_channels = self.N + self.R
        self.down = Linear(width, self.g * self.C + self.R, parts=((self.g, self.C), (1, self.R)))
        scale_square = width / self.C if config.latent_scale else 1.0
        self.norm = LatentNorm(self.g, self.C, math.sqrt(scale_square))
        # of each head its keys, then its values
        self.up = Linear(self.C, 2 * self.H * self.N, input_square=scale_square, parts=((2 * self.H, self.N),))
        self.q_down = self.q_norm = None
        source, scale_square = width, 1.0
        if config.query_latent:
            source = config.query_latent
            scale_square = width / source if config.latent_scale else 1.0
            self.q_down = Linear(width, source)
            self.q_norm = LatentNorm(1, source, math.sqrt(scale_square))
        self.q = Linear(
            source, self.H * (self.N + self.R), input_square=scale_square, parts=((self.H, self.N + self.R),)
        )
        self.rotary = Rotary(self.R, config.rotary_theta, config.rotary_scaling) if self.R else None
        self.roles = {
            "down.weight": self.down.role(Role.LATENT_DOWN),
            "q_down.weight": Role.LATENT_DOWN,
            "up.weight": self.up.role(Role.LATENT_UP),
            "q.weight": self.q.role(Role.LATENT_UP if config.query_latent else Role.HIDDEN),
        }

    @property
    def scale(self) -> float:
        """Factor of the scores, in both forms: 1/sqrt(dn + dr), unless a parametrisation multiplies it."""
        return self.score_multiplier / math.sqrt(self.N + self.R)

    def transfer_constants(self) -> dict[str, float]:
        """See :meth:`workbench.contract.Component.transfer_constants`."""
        of_queries = {} if self.q_norm is None else {"query_latent": self.q_norm.factor}
        return {"latent_scale": self.norm.factor, **of_queries}

    def query_source(self, x_BTD: Tensor) -> Tensor:
        """What queries are computed from: a normalised latent, or the input."""
        if self.q_down is None or self.q_norm is None:
            return x_BTD
        latent: Tensor = self.q_norm(self.q_down(x_BTD)[:, :, None])[:, :, 0]
        return latent

    def forward(
        self, x_BTD: Tensor, source: Tensor | None = None, **positions: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries (B, T, H, N) and (B, T, H, R), latents (B, T, g, C), rotated keys (B, T, 1, R). ``source`` may have
        what :meth:`query_source` returns."""
        B, T, _ = x_BTD.shape
        source = self.query_source(x_BTD) if source is None else source
        q_n, q_r = self.q(source).view(B, T, self.H, self.N + self.R).split((self.N, self.R), dim=-1)
        c, kr = self.down(x_BTD).split((self.g * self.C, self.R), dim=-1)
        c, kr = self.norm(c.view(B, T, self.g, self.C)), kr[:, :, None]
        if self.rotary is not None:
            q_r, kr = self.rotary.pair(q_r, kr, **positions)
        return q_n, q_r, c, kr

    def heads_of_latents(self) -> tuple[Tensor, Tensor]:
        """W_uk and W_uv, (g, H/g, N, C) each."""
        weight = self.up.weight.view(self.g, self.H // self.g, 2 * self.N, self.C)
        return weight[:, :, : self.N], weight[:, :, self.N :]

    def scores(self, x_BTD: Tensor, window: int | None = None, **positions: Any) -> list[Scores]:
        """Queries and keys in the expanded form. Arguments as of :meth:`forward`, and the window."""
        q_n, q_r, c, kr = self.forward(x_BTD, **positions)
        return [Scores(torch.cat((q_n, q_r.to(q_n.dtype)), dim=-1), self.expanded(c, kr)[0], self.scale, window)]

    def expanded(self, c_BSgC: Tensor, kr_BS1R: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (B, S, H, N + R) and values (B, S, H, N)."""
        weight = self.up.weight.view(self.g, -1, self.C)
        kv = (
            torch.einsum("bsgc,gmc->bsgm", c_BSgC, weight.to(c_BSgC.dtype))
            .unflatten(-1, (-1, 2 * self.N))
            .flatten(2, 3)
        )
        k, v = kv.split((self.N, self.N), dim=-1)
        return torch.cat((k, kr_BS1R.expand(-1, -1, self.H, -1).to(k.dtype)), dim=-1), v

    def absorbed(self, q_n: Tensor, q_r: Tensor) -> Tensor:
        """Queries that meet latents: (B, T, H, C + R)."""
        up_k, _ = self.heads_of_latents()
        grouped = q_n.unflatten(2, (self.g, -1))
        q_c = torch.einsum("btgrn,grnc->btgrc", grouped, up_k.to(q_n.dtype)).flatten(2, 3)
        return torch.cat((q_c, q_r.to(q_c.dtype)), dim=-1)

    def latent_keys(self, c_BSgC: Tensor, kr_BS1R: Tensor) -> Tensor:
        """(B, S, g, C + R), whose first C channels are the values too."""
        return torch.cat((c_BSgC, kr_BS1R.expand(-1, -1, self.g, -1).to(c_BSgC.dtype)), dim=-1)

    def from_latents(self, o_BTHC: Tensor) -> Tensor:
        """Weighted latents to the heads' values: (B, T, H, N)."""
        _, up_v = self.heads_of_latents()
        return torch.einsum("btgrc,grvc->btgrv", o_BTHC.unflatten(2, (self.g, -1)), up_v.to(o_BTHC.dtype)).flatten(2, 3)

    def rescaling_pairs(self) -> list[RescalingPair]:
        """Pairs of a mixer that has this module as ``project`` and whose ``out.weight`` reads the heads.

        Content keys with their queries and values with the output matrix, per head and channel; rotated keys with their
        queries, per rotary pair and over all heads, which share them. None across the norm of a latent, which would
        undo the scale.
        """
        H, N, R = self.H, self.N, self.R
        scale_HN = channel_scales(H, N)
        none_HN, none_HR = torch.full((H, N), -1), torch.full((H, R), -1)

        def rows(*parts: Tensor) -> Tensor:
            return torch.cat(parts, dim=1).flatten()[:, None]

        content = {"project.q.weight": rows(scale_HN, none_HR)}
        values = {"project.up.weight": rows(none_HN, scale_HN)}
        pairs = [
            RescalingPair("qk", content, {"project.up.weight": rows(scale_HN, none_HN)}, heads_of(scale_HN)),
            RescalingPair("vo", values, {"out.weight": scale_HN.flatten()[None]}, heads_of(scale_HN)),
        ]
        if self.rotary is not None:
            scale_1R = channel_scales(1, R, self.rotary)
            rotated = {"project.q.weight": rows(none_HN, scale_1R.expand(H, R))}
            keys = torch.cat((torch.full((1, self.g * self.C), -1), scale_1R), dim=1)
            pairs.append(RescalingPair("qk_rotary", rotated, {"project.down.weight": rows(keys)}, heads_of(scale_1R)))
        return pairs

    @staticmethod
    def shapes(config: Any, width: int) -> list[tuple[int, int]]:
        """(d_in, d_out) of what is applied to every token, the way up left out."""
        H, g, C, N, R = config.heads, config.latents, config.latent_dim, config.head_dim, config.rotary_dim
        source = config.query_latent or width
        query = [(width, source)] if config.query_latent else []
        return [(width, g * C + R), *query, (source, H * (N + R))]

    @staticmethod
    def parameters_of(config: Any, width: int) -> int:
        """Stored parameters."""
        up, gains = 2 * config.heads * config.head_dim * config.latent_dim, config.latents * config.latent_dim
        matrices = sum(a * b for a, b in LatentProjections.shapes(config, width))
        return matrices + up + gains + (config.query_latent or 0)


class LatentCache(RowCache):
    """Latents (B, T, g, C) and rotated keys (B, T, 1, R) of the tokens that later queries of ``mixer`` see.

    The cache owns the read, as :class:`workbench.mixers.families.softmax.KeyValueCache` does.

    Args:
        mixer: layer whose projections, window and sinks apply.
        batch: sequences B.
        length: largest number of tokens.
    """

    eight_bits = (0,)  # rotated keys, a few channels, decide positions

    def __init__(self, mixer: LatentAttention, batch: int, length: int, device: torch.device | str, dtype: torch.dtype):
        shapes = [(mixer.project.g, mixer.project.C), (1, mixer.project.R)]
        super().__init__(batch, length, shapes, device, dtype, mixer.window)
        self.mixer = mixer

    def attend(self, q_n: Tensor, q_r: Tensor, c_BTgC: Tensor, kr_BT1R: Tensor) -> Tensor:
        """Append T latents and rotated keys, and attend from their queries to all that they see: (B, T, H, N).

        A single token is read in the absorbed form, which touches nothing but the cache.
        """
        if self.positions_B is not None:
            lengths_B, project = self.append(c_BTgC, kr_BT1R), self.mixer.project
            q_BHK = project.absorbed(q_n, q_r)[:, 0].to(self.dtype)
            o_BHC, _ = decode_attention(
                q_BHK,
                self.rows[0],
                None,
                lengths_B,
                scale=project.scale,
                shared_BS1R=self.rows[1] if project.R else None,
                k_steps_BSG=self.steps[0],
                sink_H=self.mixer.sink,
            )
            return project.from_latents(o_BHC[:, None]).to(q_n.dtype)
        c_BSgC, kr_BS1R = self.extend(c_BTgC, kr_BT1R)
        return self.mixer.attend(q_n, q_r, c_BSgC, kr_BS1R, absorbed=q_n.shape[1] == 1).to(q_n.dtype)


class LatentAttention(Mixer):
    """Attention over latents; ``window`` is None for all tokens."""

    capabilities = Capabilities(flops_check="forward")
    roles = {"sink": Role.VECTOR}
    conformance_cases: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {"window": 7, "form": "absorbed", "query_latent": 24, "latent_scale": True, "rotary_dim": 0},
    )

    def __init__(self, config: Any, width: int):
        super().__init__()
        self.window, self.form = config.window, config.form
        self.project = LatentProjections(config, width)
        self.out = Linear(config.heads * config.head_dim, width, writes_residual=True)
        self.sink = nn.Parameter(torch.empty(config.heads)) if config.sink else None

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        parameter.zero_()  # the sink starts as a key of score 0

    def forward(
        self,
        x_BTD: Tensor,
        *,
        segments: Tensor | None = None,
        cache: Cache | None = None,
        aux: AuxOutputs | None = None,
    ) -> Tensor:
        B, T, _ = x_BTD.shape
        q_n, q_r, c, kr = self.project(x_BTD, **({} if cache is None else cache.rotary()))
        if cache is None:
            if aux is not None and aux.score_maxima is not None:
                queries, (k, v) = torch.cat((q_n, q_r.to(q_n.dtype)), dim=-1), self.project.expanded(c, kr)
                scale, window = self.project.scale, self.window
                maxima_H = score_maxima(queries.to(v.dtype), k, scale=scale, window=window, segments=segments)
                aux.score_maxima.append(maxima_H)
            o = self.attend(q_n, q_r, c, kr, segments=segments)
        else:
            assert isinstance(cache, LatentCache)
            o = cache.attend(q_n, q_r, c, kr)
        return self.out(o.reshape(B, T, -1))

    def scores(self, x_BTD: Tensor, *, segments: Tensor | None = None) -> list[Scores]:
        return self.project.scores(x_BTD, self.window, offset=0)

    def attend(
        self,
        q_n: Tensor,
        q_r: Tensor,
        c_BSgC: Tensor,
        kr_BS1R: Tensor,
        *,
        segments: Tensor | None = None,
        absorbed: bool = False,
    ) -> Tensor:
        """Attention of T queries over S ≥ T latents, the last T of which belong to the queries: (B, T, H, N).

        Args:
            q_n: content part of the queries, (B, T, H, N).
            q_r: rotated part of the queries, (B, T, H, R).
            c_BSgC: normalised latents.
            kr_BS1R: rotated keys.
            segments: (B, T) document numbers, only with S = T.
            absorbed: take the absorbed form whatever the configuration says.
        """
        project, (B, T) = self.project, q_n.shape[:2]
        settings: dict[str, Any] = {
            "start_BT": document_starts(segments, B, T, q_n.device),
            "offset": c_BSgC.shape[1] - T,
            "window": self.window,
            "scale": project.scale,
            "sink_H": self.sink,
        }
        if absorbed or self.form == "absorbed":
            q, k = project.absorbed(q_n, q_r), project.latent_keys(c_BSgC, kr_BS1R)
            o, _ = visible_block_attention(q, k, value_dim=project.C, **settings)
            return project.from_latents(o)
        k, v = project.expanded(c_BSgC, kr_BS1R)
        return visible_block_attention(torch.cat((q_n, q_r.to(q_n.dtype)), dim=-1), k, v, **settings)[0]

    def rescaling_pairs(self) -> list[RescalingPair]:
        return self.project.rescaling_pairs()

    def score_obstacle(self) -> str | None:
        return None

    def policy_obstacle(self) -> str | None:
        """Why a decoding policy cannot replace this layer's cache; None where it can."""
        return None

    def score_factors(self, factors_H: Tensor) -> dict[str, Tensor]:
        N, R = self.project.N, self.project.R
        content_HN = factors_H.sqrt()[:, None].expand(-1, N)
        queries = torch.cat((content_HN, factors_H[:, None].expand(-1, R)), dim=1)  # all heads share the rotated key
        keys_and_values = torch.cat((content_HN, torch.ones_like(content_HN)), dim=1)
        return {
            "project.q.weight": queries.reshape(-1, 1),
            "project.up.weight": keys_and_values.reshape(-1, 1),
        }

    def new_cache(self, batch: int, length: int, device: torch.device | str, dtype: torch.dtype) -> Cache:
        return LatentCache(self, batch, length, device, dtype)

    @classmethod
    def cost(cls, config: Any, width: int, length: int, element_bytes: int = 2) -> Cost:
        H, g, C, N, R = config.heads, config.latents, config.latent_dim, config.head_dim, config.rotary_dim
        parameters = LatentProjections.parameters_of(config, width) + H * N * width + (H if config.sink else 0)
        keys = visible_pairs(length, length, 1, 1, config.window or 0) / length
        # expanding keys and values, or absorbing queries and expanding outputs: equal products
        up = 2 * C * 2 * H * N
        flops_per_key = 2 * (2 * C + R) if config.form == "absorbed" else 2 * (2 * N + R)
        cached = length if config.window is None else min(length, config.window)
        return Cost(
            parameters=parameters,
            active_parameters=parameters,
            flops=linear_flops(*LatentProjections.shapes(config, width), (H * N, width))
            + up
            + H * flops_per_key * keys,
            cache_bytes=(g * C + R) * cached * element_bytes,
            unevicted_bytes=(g * C + R) * length * element_bytes,
        )

    @classmethod
    def search_space(cls, config: Any, width: int) -> dict[str, Range]:
        sizes = sorted({max(8, config.latent_dim // 2), config.latent_dim, config.latent_dim * 2})
        return {"latent_dim": Range(values=tuple(sizes)), "latent_scale": Range(values=(False, True))}


class LatentAttentionConfig(LatentConfig):
    """Fields of attention over latents by itself."""

    implementation = frozenset({"form"})

    window: Annotated[int | None, Field(ge=1)] = None
    """Keys that a query sees, its own included. Default: all."""
    sink: bool = False
    """Whether every head has a learned score of value zero in its softmax; see ``full``."""
    form: Literal["expanded", "absorbed"] = "expanded"
    """Order of the products where several tokens are computed together; one function, differing in rounding and
    FLOPs."""
