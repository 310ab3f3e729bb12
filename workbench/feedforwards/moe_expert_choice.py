"""Expert choice (arXiv 2202.09368): every expert takes the tokens it scores highest. Not causal; an arm to compare with.

    s = softmax(W_r x),  expert i takes the N K / E tokens with the largest s_i,  y = Σ_{i that took the token} s_i E_i(x)

Balanced by construction. Whether a token is taken depends on all tokens of the micro-batch, later ones among them: in a language
model that leaks the future, in training and in measurement, so its loss is not comparable with that of a causal model.

Legend: N tokens, D model width, E experts, F hidden width of one expert, M tokens of one expert, R = E·M rows.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from workbench.contract import AuxOutputs, Capabilities, Cost, FeedForward, VariantConfig, feedforwards
from workbench.feedforwards.moe import MixtureOfExperts
from workbench.feedforwards.router import Router
from workbench.ops.experts import swiglu_experts


@feedforwards.register
class ExpertChoice(FeedForward):
    """Experts choose tokens; not causal."""

    capabilities = Capabilities(causal=False, segments=False, decode=False)

    class Config(VariantConfig):
        """Mixture in which experts choose tokens; not causal."""

        kind: Literal["moe_expert_choice"] = "moe_expert_choice"
        experts: int = 8
        """Experts E."""
        top_k: int = 2
        """Experts K that one token gets on average."""
        hidden: int | None = None
        """Hidden width F of one expert, a multiple of 8. Default: as `moe`."""

        scales = MixtureOfExperts.Config.scales

        def as_token_choice(self) -> MixtureOfExperts.Config:
            return MixtureOfExperts.Config(experts=self.experts, top_k=self.top_k, hidden=self.hidden)

        def resolved(self, width: int) -> Self:
            return self.changed(hidden=self.as_token_choice().resolved(width).hidden)

    def __init__(self, config: Any, width: int):
        super().__init__()
        like = config.as_token_choice().resolved(width)
        self.config = config
        self.router = Router(like, width)
        self.up = nn.Parameter(torch.empty(config.experts, width, 2 * config.hidden))
        self.down = nn.Parameter(torch.empty(config.experts, config.hidden, width))
        self.writes_residual = ("down",)

    init_parameter = MixtureOfExperts.init_parameter

    def forward(self, x_BTD: Tensor, *, aux: AuxOutputs | None = None) -> Tensor:
        x_ND, E = x_BTD.flatten(0, 1), self.config.experts
        M = min(len(x_ND), -(-len(x_ND) * self.config.top_k // E))
        _, score_NE = self.router.scores(x_ND)
        gate_EM, token_EM = score_NE.t().topk(M, dim=-1)
        token_R = token_EM.flatten()
        counts_E = torch.full((E,), M, device=x_ND.device)
        y_RD = swiglu_experts(x_ND[token_R], self.up, self.down, counts_E, gate_EM.flatten())
        y_ND = torch.zeros_like(x_ND, dtype=y_RD.dtype).index_add(0, token_R, y_RD)
        if aux is not None and aux.collect_metrics:
            taken_N = torch.zeros(len(x_ND), device=x_ND.device).index_add(0, token_R, torch.ones_like(token_R).float())
            aux.metrics |= {
                "ffn_experts": taken_N.mean(),
                "ffn_experts_sd": taken_N.std(correction=0),
                "dropped_share": (taken_N == 0).float().mean(),
            }
        return y_ND.view_as(x_BTD).to(x_BTD.dtype)

    @classmethod
    def cost(cls, config: Any, width: int, length: int, element_bytes: int = 2) -> Cost:
        return MixtureOfExperts.cost(config.as_token_choice().resolved(width), width, length, element_bytes)
