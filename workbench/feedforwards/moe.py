"""Mixture of experts: every token is sent to K of its experts, and none is dropped.

    y = γ Σ_{i in S} g_i E_i(x) + shared experts        S and g by the router (workbench/feedforwards/router.py)
    E_i(x) = W_d (silu(W_g x) * W_u x) for the N experts,   E_i(x) = x for Z zero-computation experts   (arXiv 2509.01322, eq. 1)

x is the layer's normalised input. A zero-computation expert has no weights and no row in a product: together they are
x times the sum of their gates. Of K choices K_e are expected to be real experts; balance (the bias, or the loss with its
group of zero experts) brings that about, and accounting counts K_e.

Legend: B batch, T time, N = B·T tokens, D model width, E experts, F hidden width of one expert, K choices of a token.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Generator, Tensor, nn

from workbench.config import ConfigError
from workbench.contract import AuxOutputs, Cost, FeedForward, Range, VariantConfig, feedforwards
from workbench.feedforwards.router import Router, Routing, measured_gamma
from workbench.feedforwards.swiglu import SwiGLU, default_hidden
from workbench.layers import INIT_SCALE
from workbench.ops.experts import routed_experts

STEPS = {
    ("softmax", "proportional"): 0.2,
    ("sigmoid", "proportional"): 2.0,
    ("sigmoid", "sign"): 1e-3,
    ("softmax", "sign"): 1e-4,
}
"""Steps of the bias. Ours, from a synthetic router (docs/moe.md), except 1e-3, which is published for sigmoid scores."""


@feedforwards.register
class MixtureOfExperts(FeedForward):
    """Top-K routed SwiGLU experts, dropless, with zero-computation and shared ones where asked."""

    conformance_cases: ClassVar[tuple[dict[str, Any], ...]] = (
        {},
        {
            "experts": 6,
            "top_k": 3,
            "renormalise": False,
            "score": "sigmoid",
            "bias": "sign",
            "gamma": "measured",
            "balance_over": "micro_batch",
            "groups": 2,
            "count": "indicator",
            "shared": 1,
        },
        {"zero_experts": 2, "top_k": 6, "bias": "proportional", "renormalise": False, "z_weight": 1e-3},
    )

    class Config(VariantConfig):
        """Top-K mixture of experts."""

        kind: Literal["moe"] = "moe"
        experts: int = 8
        """Experts N."""
        top_k: int = 2
        """Choices K of one token, among experts and zero-computation experts."""
        hidden: int | None = None
        """Hidden width F of one expert, a multiple of 8. Default: the experts that one token is expected to use (with the
        shared ones) are together as wide as the default SwiGLU, so active parameters match up to the router."""
        zero_experts: int = 0
        """Zero-computation experts Z: their output is their input."""
        expected: float | None = None
        """Experts K_e that one token is expected to use, the aim of balance. Default: K N / (N + Z)."""
        random_zero: bool = False
        """Control: how many zero-computation experts a token gets, and which, is left to chance, with the same mean."""
        shared: int = 0
        """Experts beside them that every token uses, as one of so many times the width; neither gated nor scaled."""
        score: Literal["softmax", "sigmoid"] = "softmax"
        """Scores of a token: softmax over all experts, or a sigmoid each."""
        renormalise: bool = True
        """Whether the K gate values are rescaled to sum to one."""
        gamma: float | Literal["closed", "measured"] = 1.0
        """Factor γ of the experts' sum: a number; `closed`, the root of `split` (softmax scores that are not renormalised
        only); or `measured`, which makes the experts' part start as large as a dense SwiGLU."""
        split: int = 1
        """Into how many of these experts one expert of a coarser mixture was cut, for the closed form."""
        balance_weight: float = 0.01
        """Weight α of the balance loss; 0 switches it off."""
        balance_over: Literal["micro_batch", "step"] = "step"
        """Tokens whose choices the balance loss counts: of this micro-batch on this device, or of the step so far on all
        devices (arXiv 2501.11873)."""
        groups: int | None = None
        """Groups D of neighbouring experts that the balance loss balances. Default: every expert by itself."""
        count: Literal["multiplicity", "indicator"] = "multiplicity"
        """How the loss counts a token with several experts in one group: as often, or once."""
        bias: Literal["none", "sign", "proportional"] = "none"
        """Bias on the selection that moves once per optimiser step: by the sign of what an expert lacks, or in proportion
        to it and to the learning rate."""
        bias_step: float | None = None
        """Step μ of the bias. Default by score and rule: softmax 0.2 proportional, 1e-4 sign; sigmoid 2.0 and 1e-3."""
        z_weight: float = 0.0
        """Weight of the router's z-loss, the mean of logsumexp(l)²."""
        backend: Literal["grouped_mm", "loop"] = "grouped_mm"
        """Products of all experts at once, or one by one (the definition; slow, and it waits for the device)."""

        scales: ClassVar[dict[str, dict[str, Any]]] = {"tiny": {"experts": 4}}

        def resolved(self, width: int) -> Self:
            for name in ("zero_experts", "shared", "balance_weight", "z_weight"):
                if getattr(self, name) < 0:
                    raise ConfigError.at(name, got=getattr(self, name), expected="0 or more")
            for name, given in (("bias_step", self.bias_step), ("gamma", self.gamma)):
                if isinstance(given, int | float) and not given > 0:
                    raise ConfigError.at(name, got=given, expected="more than 0")
            if self.split < 1:
                raise ConfigError.at("split", got=self.split, expected="at least 1")
            N, Z, K = self.experts, self.zero_experts, self.top_k
            if N + Z >= 2**15 - 1:
                raise ConfigError.at("experts", got=N + Z, expected=f"fewer than {2**15 - 1}, zero_experts included")
            if N < 1:
                raise ConfigError.at(
                    "experts",
                    got=N,
                    expected="at least 1",
                    do="Zero-computation experts alone would leave the layer nothing to learn.",
                )
            if not 1 <= K <= N + Z:
                several = f" + zero_experts={Z}" if Z else ""
                raise ConfigError.at("top_k", got=K, expected=f"between 1 and experts={N}{several}")
            expected = K * N / (N + Z) if self.expected is None else self.expected
            if Z == 0 and expected != K:
                raise ConfigError.at("expected", got=expected, expected=f"top_k={K} where there are no zero_experts")
            if (Z and not 0 < expected < K) or expected > N or K - expected > Z:
                raise ConfigError.at(
                    "expected",
                    got=expected,
                    expected=f"more than {max(0, K - Z)}, less than top_k={K}, at most experts={N}",
                )
            if self.random_zero and Z == 0:
                raise ConfigError.at("random_zero", got=True, expected="false where there are no zero_experts")
            if self.groups is not None and (self.groups < 1 or N % self.groups):
                raise ConfigError.at("groups", got=self.groups, expected=f"a divisor of experts={N}")
            if width % 8:
                raise ConfigError.at(
                    "width",
                    got=width,
                    expected="a multiple of 8: grouped products read rows in pieces of 16 bytes",
                    do=f"Nearest: {max(8, round(width / 8) * 8)}.",
                )
            hidden = self.hidden or max(8, round(default_hidden(width) / (expected + self.shared) / 8) * 8)
            if hidden % 8 or hidden < 8:
                raise ConfigError.at(
                    "hidden",
                    got=hidden,
                    expected="a positive multiple of 8: grouped products read rows in pieces of 16 bytes",
                    do=f"Nearest: {max(8, round(hidden / 8) * 8)}.",
                )
            step = self.bias_step
            if self.bias == "none" and step is not None:
                raise ConfigError.at("bias_step", got=step, expected="nothing where bias=none")
            if self.bias != "none":
                step = STEPS[self.score, self.bias] if step is None else step
            return self.changed(
                hidden=hidden, expected=float(expected), gamma=self._gamma(), bias_step=step, groups=self.groups or N
            )

        def _gamma(self) -> float:
            if self.gamma == "measured":
                return measured_gamma(self.experts, self.zero_experts, self.top_k, self.score, self.renormalise)
            if self.gamma == "closed":
                if self.score != "softmax" or self.renormalise:
                    raise ConfigError.at(
                        "gamma",
                        got=f"closed with score={self.score}, renormalise={self.renormalise}",
                        expected="softmax scores, not renormalised: others do not shrink by a known factor",
                        do="Use gamma=measured.",
                    )
                return math.sqrt(self.split)
            return self.gamma

    def __init__(self, config: Any, width: int):
        super().__init__()
        self.config = config
        E, F = config.experts, config.hidden
        self.router = Router(config, width)
        self.up = nn.Parameter(torch.empty(E, width, 2 * F))
        self.down = nn.Parameter(torch.empty(E, F, width))
        self.writes_residual = ("down",)
        self.shared = SwiGLU(SwiGLU.Config(hidden=config.shared * F), width) if config.shared else None

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        parameter.normal_(0.0, INIT_SCALE / math.sqrt(parameter.shape[1]), generator=generator)

    def forward(self, x_BTD: Tensor, *, aux: AuxOutputs | None = None) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        y_ND = self.mix(x_ND, self.router(x_ND, aux), aux)
        if aux is not None and aux.collect_metrics:
            router, expert = x_ND.shape[1] * self.router.categories, 3 * x_ND.shape[1] * self.config.hidden
            aux.metrics["forward_flops"] = 2.0 * (router + (aux.metrics["ffn_experts"] + self.config.shared) * expert)
        y_BTD = y_ND.view_as(x_BTD)
        return y_BTD if self.shared is None else y_BTD + self.shared(x_BTD)

    def mix(self, x_ND: Tensor, routing: Routing, aux: AuxOutputs | None) -> Tensor:
        """Weighted sum of the chosen experts' outputs."""
        chosen_NK, gate_NK = routing.chosen_NK, routing.gate_NK * self.config.gamma
        y_ND = routed_experts(x_ND, chosen_NK, gate_NK, routing.routes, self.up, self.down, self.config.backend)
        if self.config.zero_experts:
            zero_N1 = torch.where(chosen_NK >= self.config.experts, gate_NK, 0.0).sum(-1, keepdim=True)
            y_ND = y_ND + zero_N1 * x_ND
        return y_ND.to(x_ND.dtype)

    @classmethod
    def cost(cls, config: Any, width: int, length: int, element_bytes: int = 2) -> Cost:
        router, expert = width * (config.experts + config.zero_experts), 3 * width * config.hidden
        active = router + (config.expected + config.shared) * expert
        return Cost(router + (config.experts + config.shared) * expert, round(active), flops=2.0 * active)

    @classmethod
    def search_space(cls, config: Any, width: int) -> dict[str, Range]:
        space = {}
        if config.balance_weight > 0:
            space["balance_weight"] = Range(low=1e-3, high=0.1, log=True)
        if config.bias != "none":
            space["bias_step"] = Range(low=config.bias_step / 4, high=config.bias_step * 4, log=True)
        return space
