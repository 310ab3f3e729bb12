"""Expert choice (arXiv 2202.09368): every expert takes the tokens it scores highest. Not causal; a baseline.

    s = softmax(W_r x)
    expert i takes the N K / E of N tokens with the largest s_i
    y = Σ_{i that took the token} s_i E_i(x)

Balanced by construction. The N tokens are those of a micro-batch on one device, without padding. Whether a token is
taken depends on all of them, later ones included: in a language model this leaks the future, in training and in
evaluation, so its loss cannot be compared with that of a causal model.

Legend: N positions, D model width, E experts, F hidden width of one expert, M tokens per expert, R = E·M rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from workbench.contract import AuxOutputs, Capabilities, Cost, FeedForward, RescalingPair, VariantConfig, feedforwards
from workbench.feedforwards.moe import EXPERT_UP, MixtureOfExperts, expert_pair
from workbench.feedforwards.router import Router
from workbench.ops.experts import swiglu_experts
from workbench.pooled import deviation_of, mean_of


@feedforwards.register
class ExpertChoice(FeedForward):
    """Experts choose tokens; not causal."""

    capabilities = Capabilities(causal=False, segments=False, decode=False)
    roles = MixtureOfExperts.roles
    widens = MixtureOfExperts.widens

    class Config(VariantConfig):
        """Mixture in which experts choose tokens; not causal."""

        kind: Literal["moe_expert_choice"] = "moe_expert_choice"
        experts: Annotated[int, Field(ge=1)] = 8
        """Experts E."""
        top_k: Annotated[int, Field(ge=1)] = 2
        """Experts K that one token gets on average."""
        hidden: Annotated[int | None, Field(ge=8, multiple_of=8)] = None
        """Hidden width F of one expert, a multiple of 8. Default: as `moe`."""

        scales = MixtureOfExperts.Config.scales

        def as_token_choice(self) -> MixtureOfExperts.Config:
            """The `moe` of equal size, whose checks, router and accounting this variant uses."""
            return MixtureOfExperts.Config(experts=self.experts, top_k=self.top_k, hidden=self.hidden)

        def resolved(self, width: int) -> Self:
            return self.changed(hidden=self.as_token_choice().resolved(width).hidden)

    def __init__(self, config: Any, width: int):
        super().__init__()
        self.config = config
        self.router = Router(config.as_token_choice().resolved(width), width)
        self.up = nn.Parameter(torch.empty(config.experts, width, 2 * config.hidden))
        self.down = nn.Parameter(torch.empty(config.experts, config.hidden, width))
        # gate and value of every expert
        self.roles = {**type(self).roles, "up": replace(EXPERT_UP, parts=((1, config.hidden),) * 2)}

    init_parameter = MixtureOfExperts.init_parameter
    num_experts = MixtureOfExperts.num_experts

    def forward(self, x_BTD: Tensor, *, segments: Tensor | None = None, aux: AuxOutputs | None = None) -> Tensor:
        x_ND, E, K = x_BTD.flatten(0, 1), self.config.experts, self.config.top_k
        valid_N = None if segments is None else segments.flatten() >= 0
        M = min(len(x_ND), -(-len(x_ND) * K // E))
        _, scores_NE = self.router.scores(x_ND)
        if valid_N is None:
            gates_EM, token_EM = scores_NE.t().topk(M, dim=-1)
            taken_EM = torch.ones_like(token_EM, dtype=torch.bool)
        else:  # padding comes last, and of M tokens an expert takes its share of those that are none
            token_EM = torch.where(valid_N[:, None], scores_NE, -1.0).t().topk(M, dim=-1).indices
            tokens = valid_N.sum()
            taken_M = torch.arange(M, device=x_ND.device) < torch.minimum(-(-tokens * K // E), tokens)
            taken_EM = taken_M.expand(E, M)
            gates_EM = torch.where(taken_EM, scores_NE.t().gather(1, token_EM), 0.0)
        token_R = token_EM.flatten()
        counts_E = torch.full((E,), M, device=x_ND.device)
        y_RD = swiglu_experts(x_ND[token_R], self.up, self.down, counts_E, gates_EM.flatten())
        y_ND = torch.zeros_like(x_ND, dtype=y_RD.dtype).index_add(0, token_R, y_RD)
        if aux is not None and aux.collect_metrics:
            experts_N = torch.zeros(len(x_ND), device=x_ND.device).index_add(0, token_R, taken_EM.flatten().float())
            aux.metrics |= {
                "ffn_experts": mean_of(experts_N, valid_N),
                "ffn_experts_sd": deviation_of(experts_N, valid_N),
                "dropped_share": mean_of(experts_N == 0, valid_N),
            }
        return y_ND.view_as(x_BTD).to(x_BTD.dtype)

    def rescaling_pairs(self) -> list[RescalingPair]:
        return [expert_pair(self.config.experts, self.config.hidden)]

    @classmethod
    def cost(cls, config: Any, width: int, length: int, element_bytes: int = 2) -> Cost:
        return MixtureOfExperts.cost(config.as_token_choice().resolved(width), width, length, element_bytes)
