"""Comba (arXiv 2506.02475): the gated delta rule with feedback on the state and on the output.

    S_t = (I - b β k kᵀ) exp(g) S_{t-1} + β k vᵀ        o_t = S_tᵀ (q - d k)
    b = σ(b̂) and d, one number per head each

Published: a transition of a scalar plus a matrix of rank one, whose erasure is weaker than the write by a learned b in
(0, 1), and the output correction d; both help. Read in public code (flash-linear-attention): the decay acts before the
edit, where the paper writes (α - b β k kᵀ) S; q - d b k of the convolved heads is taken before q is scaled to unit
length; b̂ starts at 1, d at 1 (0.02 is said to suit small models). That code scales the
erase key to unit length after its factor b, which cancels b; here b acts, as published.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from workbench.contract import Cost, Role, mixers
from workbench.mixers.families.delta_rule import DeltaRuleConfig, DeltaRuleMixer
from workbench.ops.short_convolution import to_length


@mixers.register
class Comba(DeltaRuleMixer):
    """Comba layer."""

    roles = DeltaRuleMixer.roles | {"feedback": Role.VECTOR, "correction": Role.VECTOR}
    conformance_cases = (
        {},
        {"feedback": False, "heads": 3, "head_dim": 16, "value_dim": 24},
        {"correction": None, "negative_eigenvalues": True, "chunk": 8},
    )

    class Config(DeltaRuleConfig):
        """Comba."""

        kind: Literal["comba"] = "comba"
        decay: Literal["none", "scalar", "channel"] = "scalar"
        """Decay of the state: none, one number per head, or one per key channel."""
        erase: Literal["scalar"] = "scalar"
        """Axis of the erase gate: one number per head."""
        write: Literal["scalar"] = "scalar"
        """Axis of the write gate: one number per head."""
        tied: Literal[True] = True
        """Erase and write gate are one; the feedback b makes the erasure weaker."""
        erase_gate_on: Literal["key"] = "key"
        """Factor of (I - p eᵀ) that the erase gate multiplies: the erase key e."""
        qk_norm: Literal["l2"] = "l2"
        """Normalisation of q and k per head."""
        output_gate_rank: int | None = 0
        """Rank of the output gate's projection, whose second factor has a bias; 0 is a full matrix without one."""
        feedback: bool = True
        """Whether the erasure has a factor b of its own (without it and correction: `gdn` with another output gate)."""
        correction: float | None = 1.0
        """Initial value of the output correction d; null: none."""

    def __init__(self, config: Any, width: int):
        super().__init__(config, width)
        if config.feedback:
            self.feedback = nn.Parameter(torch.empty(self.H))
        if config.correction is not None:
            self.correction = nn.Parameter(torch.empty(self.H))

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        if name == "feedback":
            parameter.fill_(1.0)
        elif name == "correction":
            parameter.fill_(self.config.correction)
        else:
            super().init_parameter(name, parameter, generator)

    def heads(
        self, raw_BTC: Tensor, segments: Tensor | None, tail_BWC: Tensor | None, *, normalise: bool = True
    ) -> list[Tensor]:
        q_BTHK, k_BTHK, v_BTHV = super().heads(raw_BTC, segments, tail_BWC, normalise=False)
        dtype, wide = q_BTHK.dtype, torch.promote_types(q_BTHK.dtype, torch.float32)
        q_BTHK, k_BTHK = q_BTHK.to(wide), k_BTHK.to(wide)  # where q and k are alike, little is left of q - d b k
        if self.config.correction is not None:
            q_BTHK = q_BTHK - self.correction.to(wide)[:, None] * self._erased(k_BTHK)
        return [to_length(q_BTHK, self.K**-0.5).to(dtype), to_length(k_BTHK, 1.0).to(dtype), v_BTHV]

    def edit(
        self, k_BTHK: Tensor, v_BTHV: Tensor, erase: Tensor, write: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        write_key_BTHK, _, value_BTHV, beta_BTH = super().edit(k_BTHK, v_BTHV, erase, write)
        erase_key_BTHK = self._erased(k_BTHK) if self.config.feedback else None
        return write_key_BTHK, erase_key_BTHK, value_BTHV, beta_BTH

    def _erased(self, k_BTHK: Tensor) -> Tensor:
        """b k."""
        return k_BTHK * self.feedback.sigmoid().to(k_BTHK.dtype)[:, None] if self.config.feedback else k_BTHK

    @classmethod
    def cost(cls, config: Any, width: int, length: int, element_bytes: int = 2) -> Cost:
        vectors = config.heads * (config.feedback + (config.correction is not None))
        return super().cost(config, width, length, element_bytes).plus(parameters=vectors)
