"""Options of softmax attention that act around the softmax: on keys, on values and on the output.

    output_gate     o ← o · σ(W x), per head or per channel of a head (arXiv 2505.06708, position G1; Qwen3-Next)
    exclusive       o_t ← o_t - (o_t · u_t) u_t with u_t = v_t / |v_t|, per head (exclusive self-attention, arXiv
                    2603.09078)
    value_residual  v ← λ₁ v¹ + λ₂ v with the values v¹ of the model's first such layer (arXiv 2410.17897, the form with
                    learned λ, which start at ½)
    convolution     k ← k + conv(k), and the same of v: depthwise, causal, over four tokens, without an activation
                    (Canon layers at position B, arXiv 2512.17351; depthwise convolutions there: Primer, arXiv
                    2109.08668)
    shared_kv       k and v, and their cache, are those of an earlier layer (cross-layer attention, arXiv 2405.12981;
                    with one giver for the upper half of the layers YOCO, arXiv 2405.05254)

Ours: the order (project, convolve, mix values, norm and rotate; attend, exclude, gate); convolutions of keys and values
but not of queries, with taps that start at zero; the first layer mixes its values with themselves; in grouped attention
a head excludes the value of its group; an excluded output below the rounding of what it is the difference of is zero,
as it is for the first token of a document.

Legend: B batch, T time, S seen tokens, H query heads, G key–value heads, K head channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.config import require
from workbench.contract import Cache, VariantConfig
from workbench.layers import RowCache

CONV_WIDTH = 4
"""Taps W of a convolution."""
VALUES = "values"
"""Name of the values that a value residual mixes in."""


class AttentionOptions(VariantConfig):
    """Fields of the options; the defaults are plain attention."""

    output_gate: Literal["none", "head", "channel"] = "none"
    """Sigmoid gate on the output of every head, from the layer's input: one number per head or per channel
    (arXiv 2505.06708)."""
    exclusive: bool = False
    """Whether the output of a head loses its component along the token's own value (arXiv 2603.09078)."""
    value_residual: bool = False
    """Whether the values of the first layer that has this option are mixed into those of the others, in learned shares
    (arXiv 2410.17897)."""
    convolution: Literal["none", "keys", "keys_values"] = "none"
    """What a causal convolution over four tokens is added to, before the rotation (arXiv 2512.17351)."""
    shared_kv: bool = False
    """Whether keys and values are those of the nearest earlier layer of this kind that has some of its own
    (arXiv 2405.12981). Needs such a layer in the pattern."""

    def canonical(self) -> dict[str, Any]:
        defaults = {name: field.default for name, field in AttentionOptions.model_fields.items() if name != "kind"}
        return {name: value for name, value in super().canonical().items() if value != defaults.get(name, ...)}

    def resolved(self, width: int) -> Self:
        beside = [name for name in ("exclusive", "value_residual") if getattr(self, name)]
        beside += ["convolution"] if self.convolution != "none" else []
        require(
            not (self.shared_kv and beside),
            "shared_kv",
            got=f"true beside {', '.join(beside)}",
            expected="a layer that only reads keys and values",
            do="Set these in the layer that gives them.",
        )
        return super().resolved(width)

    @property
    def convolved(self) -> tuple[str, ...]:
        """What is convolved: "k", "v"."""
        return {"none": (), "keys": ("k",), "keys_values": ("k", "v")}[self.convolution]


class KeysAndValues(NamedTuple):
    """What the queries of a pass see, in the layer that has it and in those that share it."""

    k_BSGK: Tensor
    v_BSGK: Tensor
    lengths_B: Tensor | None = None
    """Of a step: how many rows of every sequence are seen, the first ones. None: all, the last T for the T queries."""
    k_steps_BSG: Tensor | None = None
    v_steps_BSG: Tensor | None = None
    """Of a cache in eight bits, as of :func:`workbench.ops.decode_attention.decode_attention`."""
    dtype: torch.dtype | None = None
    """Of the products of a step. Default: that of the queries."""


class TakerCache(Cache):
    """The cache of a layer that reads the keys and values of another one: nothing but its place in the sequences.

    Args:
        name: of what it takes.
    """

    ragged = True

    def __init__(self, name: str):
        self.name = name
        self.giver: RowCache | None = None

    def take_from(self, givers: Mapping[str, Cache]) -> None:
        giver = givers[self.name]
        assert isinstance(giver, RowCache)
        self.giver = giver

    def step_bytes(self, lengths: Sequence[int]) -> float:
        """Of the rows of the other cache, which are read once more."""
        return 0.0 if self.giver is None else self.giver.row_bytes(lengths)

    def tensors(self) -> list[Tensor]:
        return []

    def store_in(self, dtype: torch.dtype) -> str | None:
        return None


def excluded(o_BTHK: Tensor, v_BTGK: Tensor) -> Tensor:
    """o - (o · u) u with u = v / |v| of a head's group, (B, T, H, K); in at least fp32."""
    wide = torch.promote_types(o_BTHK.dtype, torch.float32)
    o_BTGRK = o_BTHK.to(wide).unflatten(2, (v_BTGK.shape[2], -1))
    u_BTG1K = F.normalize(v_BTGK.to(wide), dim=-1, eps=1e-12)[..., None, :]
    z_BTGRK = o_BTGRK - (o_BTGRK * u_BTG1K).sum(-1, keepdim=True) * u_BTG1K
    # where the output is along the value (a first token sees itself alone), what remains is rounding, not signal
    rounding = (64 * torch.finfo(wide).eps) ** 2
    is_left = z_BTGRK.detach().square().sum(-1, keepdim=True) > rounding * o_BTGRK.detach().square().sum(
        -1, keepdim=True
    )
    return torch.where(is_left, z_BTGRK, 0.0).flatten(2, 3).to(o_BTHK.dtype)
