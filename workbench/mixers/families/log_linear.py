"""What mixers with a state for every bucket of 1, 2, 4, … tokens before share: ``log_linear`` and ``log_linear_gdn``.

Legend: B batch, T time, H heads, K key channels, V value channels, J levels, I states.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from workbench.contract import Cost, ParameterRole, Range, Role, VariantConfig
from workbench.layers import softplus
from workbench.mixers.families.recurrent import RecurrentMixer, StateCache
from workbench.ops.log_linear_attention import log_linear_attention, state_count


class LevelsConfig(VariantConfig):
    """The number of levels."""

    levels: Annotated[int, Field(ge=2, le=32)] = 15
    """Levels J, that of the token itself included; tokens 2^(J-2) or more positions away share the last one."""


class LogLinearMixer(RecurrentMixer):
    """A layer whose cache has a state for every bit of the number of tokens. The constructor of a subclass calls
    :meth:`add_levels`."""

    level_roles: ClassVar[dict[str, Role | ParameterRole]] = {"level_scale": Role.VECTOR}

    def add_levels(self, heads: int, levels: int) -> None:
        self.level_scale = nn.Parameter(torch.empty(heads, levels))

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        if name == "level_scale":
            parameter.fill_(1.0)
        else:
            super().init_parameter(name, parameter, generator)  # type: ignore[misc]

    def attend_to_levels(
        self,
        operands: tuple[Tensor, Tensor, Tensor, Tensor],
        raw: Tensor,
        segments: Tensor | None,
        cache: StateCache | None,
        beta_BTH: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Outputs (B, T, H, V), and the states after the last token (B, H, I K, V), None without a cache.

        Args:
            operands: q, k, v and g of :func:`workbench.ops.log_linear_attention.log_linear_attention`.
            raw: (B, T, H J), of which and ``level_scale`` λ is the softplus.
            segments: (B, T) document numbers.
            cache: with the states before the first token.
            beta_BTH: as of the operation.
        """
        wide, (H, _) = operands[3].dtype, self.level_scale.shape
        scales_BTHJ = softplus(self.level_scale.to(wide) * raw.to(wide).unflatten(-1, (H, -1)))
        options, K = self.operation_options(segments, cache), operands[1].shape[-1]
        states = options.pop("state_BHKV")
        positions_B = None
        if cache is not None and not cache.is_empty:
            positions_B = cache.positions_B
            if positions_B is None:
                positions_B = torch.full((len(raw),), cache.length, device=raw.device)
        out_BTHV, states = log_linear_attention(
            *operands,
            scales_BTHJ,
            beta_BTH=beta_BTH,
            states_BHIKV=None if states is None else states.unflatten(2, (-1, K)),
            positions_B=positions_B,
            **options,
        )
        return out_BTHV, None if states is None else states.flatten(2, 3)

    def new_cache(self, batch: int, length: int, device: torch.device | str, dtype: torch.dtype) -> StateCache:
        cache = super().new_cache(batch, length, device, dtype)
        states = state_count(length, self.level_scale.shape[1])
        return StateCache(cache.state_BHKV.repeat(1, 1, states, 1), cache.tail_BWC)


def with_levels(cost: Cost, config: Any, H: int, K: int, V: int, length: int, saved: float) -> Cost:
    """The cost of a layer with one state, with that of its states.

    Args:
        saved: FLOPs of the operation on one state less those on several, per token.
    """
    states = 4 * H * K * V * (state_count(length, config.levels) - 1)
    return cost.plus(parameters=H * config.levels, flops=-saved, cache_bytes=states)


def level_range() -> dict[str, Range]:
    """Of a search space."""
    return {"levels": Range(values=(2, 5, 10, 15))}
