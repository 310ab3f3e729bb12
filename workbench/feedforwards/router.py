"""Which experts a token goes to, with what weight, and what keeps the experts busy.

    l = W_r x,  s = softmax(l) or sigmoid(l), in fp32 whatever autocast says
    S = top-K of s + b            b: fp32 state, no parameter; enters the selection alone
    g_i = s_i for i in S          divided by their sum where asked; multiplied by γ

Categories are the N experts and, behind them, Z zero-computation experts (arXiv 2509.01322), whose output is their input.
Balance is a loss, a bias that moves once per optimiser step, or both:

    loss        α Σ_j f_j P_j over D groups of experts, the zero experts one group more; P_j mean probability of a group,
                f_j = D / (K_e T) · choices in group j,   f_zero = 1 / ((K - K_e) T) · choices of zero experts    (eq. 3-5)
    bias        δb_i = μ (K_e / (K N) - T_i / (K T))  for the N experts, 0 for zero experts                     (eq. 2)
                or, by sign (arXiv 2408.15664), δb_i = μ sign(K_e / (K N) - T_i / (K T))

With D = N and no zero experts the loss is the usual α N Σ f_i P_i (arXiv 2101.03961, eq. 4). The paper prints an indicator in f_j,
"token selects group j"; counted so, f_j = 1 is not the balanced state. ``count: multiplicity`` is our reading, under which it is.

Legend: N tokens (of a micro-batch), D model width, C categories, K choices of a token, J groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from workbench.contract import AuxOutputs, StepCounter
from workbench.layers import INIT_SCALE
from workbench.ops.experts import Routes, sort_choices
from workbench.ops.router import gather_scores, router_logits, topk_indices

FREEZE = 0.03
"""Share of the steps, at the end, in which the bias stays as it is."""
COLLAPSED = 0.5
"""A router has collapsed where more than this share of its experts got no token since the diagnosis before. Our choice."""


@dataclass(frozen=True)
class Routing:
    """Choices of N tokens."""

    chosen_NK: Tensor
    """Categories, int64."""
    gate_NK: Tensor
    """Their weights g, without γ."""
    routes: Routes


class Router(StepCounter):
    """Scores, selection, balance.

    Args:
        config: a resolved :class:`workbench.feedforwards.moe.MixtureOfExperts.Config`.
        width: D.
    """

    bias: Tensor | None

    def __init__(self, config: Any, width: int):
        super().__init__()
        self.config = config
        self.N, self.Z, self.K = config.experts, config.zero_experts, config.top_k
        self.target: float = config.expected
        self.categories = self.N + self.Z
        least = max(0, self.K - self.N)
        self.chance = _chance_of_zero(self.K, least, self.Z, self.K - self.target) if config.random_zero else 0.0
        self.weight = nn.Parameter(torch.empty(self.categories, width))
        self.register_buffer("bias", torch.zeros(self.categories) if config.bias != "none" else None)
        self.freeze_last = FREEZE if config.bias != "none" else 0.0

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        parameter.normal_(0.0, INIT_SCALE / math.sqrt(parameter.shape[1]), generator=generator)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        bias = self.bias
        super()._apply(fn, recurse)
        if bias is not None and self.bias is not None and self.bias.dtype.itemsize < 4:  # a step is lost in 16 bits
            self.bias = bias.to(self.bias.device)
        return self

    def scores(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C) logits and scores, fp32 at least."""
        logits_NC = router_logits(x_ND, self.weight)
        return logits_NC, logits_NC.softmax(-1) if self.config.score == "softmax" else logits_NC.sigmoid()

    def forward(self, x_ND: Tensor, aux: AuxOutputs | None = None) -> Routing:
        """Route (N, D)."""
        logits_NC, score_NC = self.scores(x_ND)
        chosen_NK = self.select(score_NC.detach(), logits_NC.detach())
        seen_NC = score_NC if self.gradient_tap is None else score_NC + self.gradient_tap
        gate_NK = gather_scores(seen_NC, chosen_NK)
        if self.config.renormalise:
            gate_NK = gate_NK / gate_NK.sum(-1, keepdim=True)
        routes = sort_choices(chosen_NK, self.categories)
        if aux is not None:
            self.tell(aux, logits_NC, score_NC, chosen_NK, routes.counts)
        return Routing(chosen_NK, gate_NK, routes)

    def select(self, score_NC: Tensor, logits_NC: Tensor) -> Tensor:
        """(N, K) categories."""
        ranked_NC = score_NC if self.bias is None else score_NC + self.bias
        if not self.config.random_zero:
            return topk_indices(ranked_NC, self.K)
        # the control: how many zero experts and which is a matter of chance, the real experts are still the best
        N, Z, K = self.N, self.Z, self.K
        chance_NC = _chance(logits_NC)
        zeros_N1 = (chance_NC[:, :K] < self.chance).sum(-1, keepdim=True).clamp(K - N, Z)
        place_K = torch.arange(K, device=logits_NC.device)
        real_NK = ranked_NC[:, :N].topk(min(K, N), dim=-1).indices[:, place_K.clamp_max(N - 1)]
        zero_NK = chance_NC[:, N:].topk(min(K, Z), dim=-1).indices[:, (K - 1 - place_K).clamp_max(Z - 1)] + N
        return torch.where(place_K < K - zeros_N1, real_NK, zero_NK)

    # -- balance -------------------------------------------------------------------------------------------------

    def tell(self, aux: AuxOutputs, logits_NC: Tensor, score_NC: Tensor, chosen_NK: Tensor, counts: Tensor) -> None:
        """Leave losses, counts and metrics."""
        probability_NC = score_NC if self.config.score == "softmax" else score_NC / score_NC.sum(-1, keepdim=True)
        mean_C = probability_NC.mean(0)
        if self.config.count == "indicator":
            group_C = self.group_of(chosen_NK.device)
            hit_NJ = F.one_hot(group_C[chosen_NK], self.groups).amax(1)
            counts = torch.cat((counts, hit_NJ.sum(0)))
        if self.training:
            aux.counts.append((self, counts, mean_C))
        if self.config.balance_weight > 0 and self.config.balance_over == "micro_batch":
            aux.losses.append(self.balance_loss(counts, mean_C))
        if self.config.z_weight > 0:
            aux.losses.append(self.config.z_weight * logits_NC.logsumexp(-1).square().mean())
        if aux.collect_metrics:
            real_N = (chosen_NK < self.N).sum(-1).to(mean_C.dtype)
            p_NC = probability_NC.detach()
            rows_CD = F.normalize(self.weight.detach(), dim=-1)
            C = self.categories
            aux.metrics |= {
                "routing_entropy": -(p_NC * p_NC.clamp_min(1e-20).log()).sum(-1).mean(),
                "top_k_mass": p_NC.gather(1, chosen_NK).sum(-1).mean(),
                "ffn_experts": real_N.mean(),
                "ffn_experts_sd": real_N.std(correction=0),
                "router_cosine": (rows_CD.sum(0).square().sum() - C) / max(1, C * (C - 1)),
                "router_logit_max": logits_NC.detach().max(),
                "router_z": logits_NC.detach().logsumexp(-1).square().mean(),
            }

    @property
    def groups(self) -> int:
        """J."""
        return (self.config.groups or self.N) + (self.Z > 0)

    def group_of(self, device: torch.device) -> Tensor:
        """(C,) group of every category; zero experts form the last."""
        group_C = torch.arange(self.categories, device=device) // (self.N // (self.config.groups or self.N))
        return group_C.clamp_max(self.groups - 1)

    def forces(self, counts: Tensor) -> Tensor:
        """(C,) f of every category's group, from counts as :meth:`tell` leaves them; without gradient."""
        D = self.config.groups or self.N
        per_C = counts[: self.categories].double()
        tokens = per_C.sum() / self.K
        if self.config.count == "indicator":
            real_D, zero = counts[self.categories :].double().split([D, self.groups - D])
        else:
            real_D, zero = per_C[: self.N].view(D, -1).sum(1), per_C[self.N :].sum()[None]
        f_J = real_D * (D / self.target)
        if self.Z:
            f_J = torch.cat((f_J, zero / (self.K - self.target)))
        return (f_J / tokens)[self.group_of(counts.device)]

    def balance_loss(self, counts: Tensor, mean_C: Tensor) -> Tensor:
        """α Σ_j f_j P_j."""
        return self.config.balance_weight * (self.forces(counts).to(mean_C.dtype) * mean_C).sum()

    def step_loss(self, counts: Tensor, loss_input: Tensor) -> Tensor | None:
        """The balance loss over the step so far."""
        if self.config.balance_weight > 0 and self.config.balance_over == "step":
            return self.balance_loss(counts, loss_input)
        return None

    @torch.no_grad()
    def update_state(self, counts: Tensor, lr_factor: float, remaining: float, applied: Tensor) -> None:
        """One step of the controller."""
        if self.bias is None or remaining < self.freeze_last:
            return
        counts = counts[: self.categories].double()
        lacking_C = self.target / (self.K * self.N) - counts / counts.sum()
        lacking_C = torch.where(torch.arange(self.categories, device=counts.device) < self.N, lacking_C, 0.0)
        step_C = lacking_C.sign() if self.config.bias == "sign" else lacking_C * lr_factor
        self.bias += (self.config.bias_step * applied * step_C).to(self.bias.dtype)

    # -- monitors ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def diagnostics(
        self, counts: Tensor, recent_counts: Tensor, loss_input: Tensor, tap_gradient: Tensor
    ) -> dict[str, Tensor]:
        """Load, its violation beside what perfect balance would show by chance, controller, and R_g."""
        values: dict[str, Tensor] = {}
        for name, every in (("step", counts), ("recent", recent_counts)):
            all_C = every[: self.categories].double()
            load = all_C[: self.N] / all_C[: self.N].mean().clamp_min(1e-9)
            values[f"max_violation_{name}"] = load.max() - 1
            values[f"max_violation_floor_{name}"] = _largest_normal(self.N) / all_C[: self.N].mean().sqrt()
        share = all_C[: self.N] / all_C[: self.N].sum().clamp_min(1)
        dead = (all_C[: self.N] == 0).sum()
        values |= {
            "load": load,
            "load_entropy": -(share * share.clamp_min(1e-20).log()).sum(),
            "dead_experts": dead,
            "collapsed": (dead > COLLAPSED * self.N).double(),
            "zero_share": all_C[self.N :].sum() / all_C.sum(),
        }
        if self.bias is not None:
            bias = self.bias[: self.N]
            values |= {"bias_low": bias.min(), "bias_high": bias.max(), "bias_sd": bias.std(correction=0)}
        if (
            self.config.balance_weight > 0 and self.config.score == "softmax"
        ):  # others' gradients are by another variable
            # the loss is linear in P, so its gradient there is α f (arXiv 2509.01322, eq. 9); a constant vector has no
            # effect through softmax and still counts in R_g, which the centred ratio mends (ours)
            balance, model = self.config.balance_weight * self.forces(counts), tap_gradient.double()
            p = loss_input.double()
            values["r_g"] = balance.norm() / model.norm()
            values["r_g_centred"] = (balance - (p * balance).sum()).norm() / (model - (p * model).sum()).norm()
        return values


@cache
def _chance_of_zero(K: int, least: int, most: int, mean: float) -> float:
    """p for which a binomial number of K, kept between ``least`` and ``most``, has this mean (bisection)."""
    low, high = 0.0, 1.0
    for _ in range(60):
        p = (low + high) / 2
        weights = [math.comb(K, i) * p**i * (1 - p) ** (K - i) for i in range(K + 1)]
        found = sum(w * min(max(i, least), most) for i, w in enumerate(weights))
        low, high = (p, high) if found < mean else (low, p)
    return (low + high) / 2


@cache
def _largest_normal(count: int) -> float:
    """Expected maximum of so many standard normal numbers."""
    steps = [i / 500 - 8 + 0.001 for i in range(8000)]
    normal = NormalDist()
    return sum(x * count * normal.pdf(x) * normal.cdf(x) ** (count - 1) for x in steps) / 500


def _chance(logits_NC: Tensor) -> Tensor:
    """Numbers in [0, 1) hashed from the bits of the logits: as good as random, and the same when computed again."""
    bits = logits_NC.float().contiguous().view(torch.int32).long()
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B & 0x7FFFFFFF), (16, 0x9E3779B)):
        bits = ((bits & 0xFFFFFFFF) ^ ((bits & 0xFFFFFFFF) >> shift)) * factor
    return (bits & 0xFFFFFF).double() / 2**24


@cache
def measured_gamma(
    experts: int, zero_experts: int, top_k: int, score: str, renormalise: bool, tokens: int = 4096
) -> float:
    """γ with which the experts' part starts as large as a dense SwiGLU: 1 / root of the mean of Σ g² over chosen experts.

    Measured on a router as it starts: a normalised input gives logits N(0, INIT_SCALE²). One expert starts as large as
    one dense layer of any width, since matrices start by their fan-in, and experts are independent of each other.
    """
    draw = Generator(device="cpu").manual_seed(0)
    logits = torch.randn(tokens, experts + zero_experts, generator=draw, device="cpu") * INIT_SCALE
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    gates, chosen = scores.topk(top_k, dim=-1)
    if renormalise:
        gates = gates / gates.sum(-1, keepdim=True)
    return round(float((gates.square() * (chosen < experts)).sum(-1).mean().rsqrt()), 4)
