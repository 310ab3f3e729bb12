"""Mixture of experts: every token is sent to its top-k of E SwiGLU experts, none is dropped.

    p = softmax(W_r x) in fp32,  y = Σ_{i in top-k} g_i E_i(x),  g = p over the chosen, renormalised if asked
    balance loss = α E Σ_i f_i P_i,  f_i = share of choices, P_i = mean probability   (arXiv 2101.03961, eq. 4)

Legend: B batch, T time, N = B·T tokens, D model width, E experts, F hidden width of one expert, R = N·k routed rows.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from workbench.config import ConfigError
from workbench.contract import Capabilities, Cost, FeedForward, Range, Side, VariantConfig, feedforwards
from workbench.feedforwards.swiglu import default_hidden
from workbench.layers import INIT_SCALE, Linear
from workbench.ops.experts import swiglu_experts


@feedforwards.register
class MixtureOfExperts(FeedForward):
    """Top-k routed SwiGLU experts with a load-balancing loss."""

    capabilities = Capabilities(flops_from="forward")
    conformance_cases = ({}, {"experts": 6, "top_k": 3, "renormalise": False}, {"experts": 1, "top_k": 1})

    class Config(VariantConfig):
        """Top-k mixture of experts."""

        kind: Literal["moe"] = "moe"
        experts: int = 8
        """Experts E."""
        top_k: int = 2
        """Experts k used by one token."""
        hidden: int | None = None
        """Hidden width F of one expert, a multiple of 8. Default: k experts together are as wide as the default
        SwiGLU, so active parameters match up to the router."""
        renormalise: bool = True
        """Whether the k gate values are rescaled to sum to one."""
        balance_weight: float = 0.01
        """Weight α of the balance loss; 0 switches it off."""

        scales: ClassVar[dict[str, dict[str, Any]]] = {"tiny": {"experts": 4}}

        def resolved(self, width: int) -> Self:
            if self.experts < 1:
                raise ConfigError.at("experts", got=self.experts, expected="at least 1")
            if not 1 <= self.top_k <= self.experts:
                raise ConfigError.at("top_k", got=self.top_k, expected=f"between 1 and experts={self.experts}")
            if width % 8:
                raise ConfigError.at("width", got=width, expected="a multiple of 8 (grouped products align rows)")
            hidden = self.hidden or max(8, round(default_hidden(width) / self.top_k / 8) * 8)
            if hidden % 8 or hidden < 8:
                raise ConfigError.at("hidden", got=hidden, expected="a positive multiple of 8",
                                     do=f"Nearest: {max(8, round(hidden / 8) * 8)}.")  # fmt: skip
            return self.changed(hidden=hidden)

    def __init__(self, config: Any, width: int):
        super().__init__()
        self.E, self.k, self.F = config.experts, config.top_k, config.hidden
        self.renormalise, self.balance_weight = config.renormalise, config.balance_weight
        self.router = Linear(width, self.E)
        self.up = nn.Parameter(torch.empty(self.E, width, 2 * self.F))
        self.down = nn.Parameter(torch.empty(self.E, self.F, width))
        self.writes_residual = ("down",)

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        parameter.normal_(0.0, INIT_SCALE / math.sqrt(parameter.shape[1]), generator=generator)

    def forward(self, x_BTD: Tensor, *, side: Side | None = None) -> Tensor:
        B, T, D = x_BTD.shape
        x_ND = x_BTD.reshape(-1, D)
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        probability_NE = F.linear(x_ND.to(wide), self.router.weight.to(wide)).softmax(dim=-1)
        gate_Nk, expert_Nk = probability_NE.topk(self.k, dim=-1)
        if self.renormalise:
            gate_Nk = gate_Nk / gate_Nk.sum(-1, keepdim=True)
        chosen_R = expert_Nk.flatten()
        order_R = chosen_R.argsort(stable=True)  # rows of one expert stand together, in token order
        token_R = order_R // self.k
        counts_E = F.one_hot(chosen_R, self.E).sum(0)
        y_RD = swiglu_experts(x_ND[token_R], self.up, self.down, counts_E)
        y_RD = y_RD * gate_Nk.flatten()[order_R, None].to(y_RD.dtype)
        # back to token order and summed over the k choices: a gather, so that the sum is always in the same order
        back_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))
        y_ND = y_RD[back_R].unflatten(0, (-1, self.k)).sum(1)
        share_E = counts_E.to(wide) / chosen_R.numel()
        if side is not None and self.balance_weight > 0:
            side.losses.append(self.balance_weight * self.E * (share_E * probability_NE.mean(0)).sum())
        if side is not None and side.watch:
            side.metrics["max_violation"] = share_E.max().detach() * self.E - 1
            log_p = probability_NE.detach().clamp_min(1e-20).log()
            side.metrics["routing_entropy"] = -(probability_NE.detach() * log_p).sum(-1).mean()
        return y_ND.view(B, T, D).to(x_BTD.dtype)

    @classmethod
    def cost(cls, config: Any, width: int, length: int, element_bytes: int = 2) -> Cost:
        router, expert = width * config.experts, 3 * width * config.hidden
        active = router + config.top_k * expert
        return Cost(router + config.experts * expert, active, flops=2.0 * active)

    @classmethod
    def search_space(cls, config: Any, width: int) -> dict[str, Range]:
        return {"balance_weight": Range(low=1e-3, high=0.1, log=True)}
