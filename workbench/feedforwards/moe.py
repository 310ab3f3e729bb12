"""Mixture of experts: each token is sent to K of the experts; no token is dropped.

    y = γ Σ_{i in S} g_i E_i(x) + shared experts        choices S and gates g from the router (router.py)
    E_i(x) = W_d (silu(W_g x) * W_u x) for the E experts
    E_i(x) = x                         for the Z zero-computation experts              (arXiv 2509.01322, eq. 1)

x is the layer's normalised input. Zero-computation experts have no weights and no rows in a matrix product: their sum
is x times the sum of their gates. Of a token's K choices, K_e are expected to be real experts: the target of balance
(the bias, or the loss with its group of zero-computation experts), and what accounting counts.

Legend: B batch, T time, N = B·T tokens, D model width, E experts, F hidden width of one expert, K choices per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from workbench.config import require
from workbench.contract import (
    AuxOutputs,
    Cost,
    FeedForward,
    ParameterRole,
    Range,
    RescalingPair,
    Role,
    VariantConfig,
    feedforwards,
)
from workbench.feedforwards.router import Router, Routing
from workbench.feedforwards.swiglu import SwiGLU, default_hidden
from workbench.layers import INIT_SCALE
from workbench.ops.experts import routed_experts
from workbench.pooled import Mean

BIAS_STEPS = {
    ("softmax", "proportional"): 0.2,
    ("sigmoid", "proportional"): 2.0,
    ("sigmoid", "sign"): 1e-3,
    ("softmax", "sign"): 1e-4,
}
"""Default step μ of the bias by score and rule. Ours, from a synthetic router (docs/moe.md); 1e-3 is published."""
MAX_CANDIDATES = 2**15 - 2
"""Choices are sorted as 16-bit integers, with one id for dropped choices."""
EXPERT_UP = ParameterRole(Role.EXPERT, fan_in=-2, fan_out=-1)


def expert_pair(experts: int, hidden: int) -> RescalingPair:
    """The value half of ``up`` with ``down``, per expert and hidden channel; the gate half passes a SiLU."""
    scale_EF = torch.arange(experts * hidden).view(experts, hidden)
    up_E1F = torch.cat((torch.full_like(scale_EF, -1), scale_EF), dim=1)[:, None]
    heads = torch.arange(experts).repeat_interleave(hidden)
    return RescalingPair("up_down", {"up": up_E1F}, {"down": scale_EF[..., None]}, heads)


@feedforwards.register
class MixtureOfExperts(FeedForward):
    """Top-K routed SwiGLU experts, dropless, optionally with zero-computation and shared experts."""

    router_class: ClassVar[type[Router]] = Router
    roles = {
        "up": EXPERT_UP,
        "down": ParameterRole(Role.EXPERT, fan_in=-2, fan_out=-1, writes_residual=True),
        "gate": Role.VECTOR,
    }
    widens = ("hidden",)
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
            "balance_groups": 2,
            "shared": 1,
        },
        {"zero_experts": 2, "top_k": 6, "bias": "proportional", "renormalise": False, "z_weight": 1e-3, "gate": True},
    )

    class Config(VariantConfig):
        """Top-K mixture of experts."""

        kind: Literal["moe"] = "moe"
        experts: Annotated[int, Field(ge=1)] = 8
        """Experts E."""
        top_k: Annotated[int, Field(ge=1)] = 2
        """Choices K per token, among experts and zero-computation experts."""
        hidden: Annotated[int | None, Field(ge=8, multiple_of=8)] = None
        """Hidden width F of one expert, a multiple of 8 (grouped products read rows in pieces of 16 bytes). Default:
        the K_e expected experts and the shared ones are together as wide as the default SwiGLU, so that active
        parameters match up to the router."""
        zero_experts: Annotated[int, Field(ge=0)] = 0
        """Zero-computation experts Z: their output is their input."""
        expected_experts: float | None = None
        """Experts K_e that a token is expected to use, the target of balance. Default: K E / (E + Z)."""
        shared: Annotated[int, Field(ge=0)] = 0
        """Shared experts, which every token uses: one SwiGLU of this many times F, neither gated nor scaled by γ."""
        score: Literal["softmax", "sigmoid"] = "softmax"
        """Scores of a token: softmax over all candidates, or a sigmoid of each."""
        renormalise: bool = True
        """Whether the K gate values are rescaled to sum to one."""
        gamma: float | Literal["measured"] = 1.0
        """Factor γ of the experts' sum: a number, or `measured`, with which the experts' part starts as large as a
        dense SwiGLU."""
        balance_weight: Annotated[float, Field(ge=0)] = 0.01
        """Weight α of the balance loss; 0 disables it."""
        balance_over: Literal["step", "running", "micro_batch"] = "step"
        """Tokens whose choices f_j of the balance loss counts. `step`: those of the optimiser step, whatever its
        micro-batches and devices; with `accumulate` a step first runs its micro-batches without gradients, about a
        third more FLOPs. `running`: those of the step up to this micro-batch, on all devices, the buffer of arXiv
        2501.11873. `micro_batch`: those of this micro-batch on this device (GShard, Switch): the loss depends on
        `accumulate` and on the number of devices. All agree where a step is one micro-batch on one device."""
        balance_groups: Annotated[int | None, Field(ge=1)] = None
        """Groups of neighbouring experts that the balance loss balances. Default: every expert is a group."""
        bias: Literal["none", "sign", "proportional"] = "none"
        """Bias on the selection, updated once per optimiser step: by the sign of an expert's deficit, or in proportion
        to the deficit and to the learning rate."""
        bias_step: Annotated[float | None, Field(gt=0)] = None
        """Step μ of the bias. Default by score and rule: softmax 0.2 proportional, 1e-4 sign; sigmoid 2.0 and 1e-3."""
        z_weight: Annotated[float, Field(ge=0)] = 0.0
        """Weight of the router's z-loss, the mean of logsumexp(l)²."""
        gate: bool = False
        """Whether the routed sum has a learned factor, 1 at the start. At 0 it is silent whatever the router chooses,
        zero-computation experts included; growth that preserves the function needs it."""
        backend: Literal["grouped_mm", "loop"] = "grouped_mm"
        """Matrix products of all experts at once, or one by one (reference; slow, synchronises with the device)."""

        implementation = frozenset({"backend"})
        scales: ClassVar[dict[str, dict[str, Any]]] = {"tiny": {"experts": 4}}

        def resolved(self, width: int) -> Self:
            E, Z, K = self.experts, self.zero_experts, self.top_k
            require(
                E + Z <= MAX_CANDIDATES, "experts", got=E + Z, expected=f"at most {MAX_CANDIDATES} with zero_experts"
            )
            candidates = f"experts={E}" + (f" + zero_experts={Z}" if Z else "")
            require(K <= E + Z, "top_k", got=K, expected=f"between 1 and {candidates}")
            expected = float(K * E / (E + Z) if self.expected_experts is None else self.expected_experts)
            require(
                Z or expected == K,
                "expected_experts",
                got=expected,
                expected=f"top_k={K} where there are no zero_experts",
            )
            require(
                (Z == 0 or 0 < expected < K) and expected <= E and K - expected <= Z,
                "expected_experts",
                got=expected,
                expected=f"more than {max(0, K - Z)}, less than top_k={K}, at most experts={E}",
            )
            groups = self.balance_groups or E
            require(E % groups == 0, "balance_groups", got=groups, expected=f"a divisor of experts={E}")
            require(
                width % 8 == 0,
                "width",
                got=width,
                expected="a multiple of 8: grouped products read rows in pieces of 16 bytes",
                do=f"Nearest: {max(8, round(width / 8) * 8)}.",
            )
            require(
                self.gamma == "measured" or self.gamma > 0, "gamma", got=self.gamma, expected="a number greater than 0"
            )
            require(
                self.bias_step is None or self.bias != "none",
                "bias_step",
                got=self.bias_step,
                expected="nothing where bias=none",
            )
            measured = self.gamma == "measured"
            return self.changed(
                hidden=self.hidden or max(8, round(default_hidden(width) / (expected + self.shared) / 8) * 8),
                expected_experts=expected,
                gamma=measured_gamma(E, Z, K, self.score, self.renormalise) if measured else self.gamma,
                bias_step=self.bias_step or BIAS_STEPS.get((self.score, self.bias)),
                balance_groups=groups,
            )

        def canonical(self) -> dict[str, Any]:
            plain = self.plain()
            if not self.gate:
                del plain["gate"]  # off: the model is the same
            return plain

    def __init__(self, config: Any, width: int):
        super().__init__()
        self.config = config
        E, F = config.experts, config.hidden
        self.router = self.router_class(config, width)
        self.up = nn.Parameter(torch.empty(E, width, 2 * F))  # gate and value in one product
        self.down = nn.Parameter(torch.empty(E, F, width))
        # gate and value of every expert
        self.roles = {**type(self).roles, "up": replace(EXPERT_UP, parts=((1, F),) * 2)}
        self.shared = SwiGLU(SwiGLU.Config(hidden=config.shared * F), width) if config.shared else None
        self.gate = nn.Parameter(torch.empty(1)) if config.gate else None

    @classmethod
    def num_experts(cls, config: Any) -> int:
        return int(config.experts)

    def transfer_constants(self) -> dict[str, float]:
        return {name: getattr(self.config, name) for name in ("experts", "zero_experts", "top_k", "gamma")}

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        if name == "gate":
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, INIT_SCALE / math.sqrt(parameter.shape[1]), generator=generator)

    def graph_obstacle(self) -> str | None:
        return "backend: loop waits for the device" if self.config.backend == "loop" else None

    def silencers(self, writers: Sequence[str]) -> tuple[str, ...]:
        if self.gate is not None:
            return ("gate", *(name for name in writers if name != "down"))
        require(
            not self.config.zero_experts,
            "gate",
            got=f"false with zero_experts={self.config.zero_experts}, which pass their input on",
            expected="true: only a gate silences zero-computation experts",
            do="Set gate: true, in the small model too.",
        )
        return tuple(writers)

    def forward(self, x_BTD: Tensor, *, segments: Tensor | None = None, aux: AuxOutputs | None = None) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        valid_N = None if segments is None else segments.flatten() >= 0
        y_ND = self.mix(x_ND, self.router(x_ND, aux, valid_N), aux)
        if self.gate is not None:
            y_ND = y_ND * self.gate.to(y_ND.dtype)
        if aux is not None and aux.collect_metrics:
            experts = aux.metrics["ffn_experts"]
            assert isinstance(experts, Mean)
            none, one = (self._active_parameters(self.config, x_ND.shape[1], number) for number in (0, 1))
            aux.metrics["forward_flops"] = Mean(
                2.0 * (none * experts.weight + (one - none) * experts.total), experts.weight
            )
        y_BTD = y_ND.view_as(x_BTD)
        return y_BTD if self.shared is None else y_BTD + self.shared(x_BTD)

    def mix(self, x_ND: Tensor, routing: Routing, aux: AuxOutputs | None) -> Tensor:
        """γ times the gated sum of the chosen experts' outputs."""
        ids_NK, gates_NK = routing.topk_expert_ids_NK, routing.topk_scores_NK * self.config.gamma
        y_ND = routed_experts(x_ND, ids_NK, gates_NK, routing.routes, self.up, self.down, self.config.backend)
        if self.config.zero_experts:
            zero_gate_N1 = torch.where(ids_NK >= self.config.experts, gates_NK, 0.0).sum(-1, keepdim=True)
            y_ND = y_ND + zero_gate_N1 * x_ND
        return y_ND.to(x_ND.dtype)

    @staticmethod
    def _active_parameters(config: Any, width: int, experts_per_token: Any) -> Any:
        router, expert = width * (config.experts + config.zero_experts), 3 * width * config.hidden
        return router + (experts_per_token + config.shared) * expert

    def rescaling_pairs(self) -> list[RescalingPair]:
        pairs = [expert_pair(self.config.experts, self.config.hidden)]
        return (
            pairs
            if self.shared is None
            else [*pairs, *(pair.under("shared") for pair in self.shared.rescaling_pairs())]
        )

    @classmethod
    def cost(cls, config: Any, width: int, length: int, element_bytes: int = 2) -> Cost:
        active = cls._active_parameters(config, width, config.expected_experts)
        stored, gate = cls._active_parameters(config, width, config.experts), int(config.gate)
        return Cost(stored + gate, round(active) + gate, flops=2.0 * active)

    @classmethod
    def search_space(cls, config: Any, width: int) -> dict[str, Range]:
        space = {}
        if config.balance_weight > 0:
            space["balance_weight"] = Range(low=1e-3, high=0.1, log=True)
        if config.bias != "none":
            space["bias_step"] = Range(low=config.bias_step / 4, high=config.bias_step * 4, log=True)
        return space


@cache
def measured_gamma(
    experts: int, zero_experts: int, top_k: int, score: str, renormalise: bool, tokens: int = 4096
) -> float:
    """γ with which the experts' part starts as large as a dense SwiGLU: rsqrt of the mean of Σ g² over chosen experts.

    Measured on an untrained router: a normalised input gives logits N(0, INIT_SCALE²). One expert starts as large as a
    dense layer of any width, since matrices start by their fan-in, and experts are independent of each other.
    """
    generator = Generator(device="cpu").manual_seed(0)
    logits_NC = torch.randn(tokens, experts + zero_experts, generator=generator, device="cpu") * INIT_SCALE
    scores_NC = logits_NC.softmax(-1) if score == "softmax" else logits_NC.sigmoid()
    gates_NK, ids_NK = scores_NC.topk(top_k, dim=-1)
    if renormalise:
        gates_NK = gates_NK / gates_NK.sum(-1, keepdim=True)
    return round(float((gates_NK.square() * (ids_NK < experts)).sum(-1).mean().rsqrt()), 4)
