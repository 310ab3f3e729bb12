"""Router of a mixture of experts: scores, top-K selection, gate values.

    l = W_r x,  s = softmax(l) or sigmoid(l)      in fp32, under autocast too
    S = top-K of s + b                            b: fp32 state without gradient, used in the selection alone
    g_i = s_i for i in S                          divided by their sum if ``renormalise``

Padding is routed nowhere: its choices have the id C, which no category counts, and the gate 0.

The router scores C = E + Z candidates: E experts, then Z zero-computation experts (arXiv 2509.01322), whose output is
their input. Load balance is in balance.py, logged metrics are in monitors.py.

Legend: N tokens of a micro-batch, D model width, E experts, C candidates, K choices per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from workbench.contract import AuxOutputs, Role, StepCounter
from workbench.feedforwards.balance import FREEZE_LAST, BalanceLoss, BiasController
from workbench.feedforwards.monitors import bias_metrics, gradient_ratios, load_metrics, routing_metrics
from workbench.layers import INIT_SCALE
from workbench.ops.experts import Routes, sort_choices
from workbench.ops.router import gather_scores, router_logits, topk_indices


@dataclass(frozen=True)
class Routing:
    """Routing decision for N tokens."""

    topk_expert_ids_NK: Tensor
    """Chosen candidates, int64; ids from E on are zero-computation experts, the id C is that of padding."""
    topk_scores_NK: Tensor
    """Gate values g, without the factor γ; 0 for padding."""
    routes: Routes
    """The N·K choices sorted by expert, with counts of the C candidates, and 0 for the id C where there may be
    padding."""


class Router(StepCounter):
    """Token-choice top-K router.

    Args:
        config: a resolved :class:`workbench.feedforwards.moe.MixtureOfExperts.Config`.
        width: D.
    """

    roles = {"weight": Role.ROUTER}
    bias: Tensor | None

    def __init__(self, config: Any, width: int):
        super().__init__()
        self.config = config
        self.num_experts = config.experts
        self.num_candidates = self.tap_size = config.experts + config.zero_experts
        self.weight = nn.Parameter(torch.empty(self.num_candidates, width))
        self.balance_loss = BalanceLoss(config) if config.balance_weight > 0 else None
        self.bias_controller = BiasController(config) if config.bias != "none" else None
        self.freeze_last = FREEZE_LAST if self.bias_controller else 0.0
        self.counts_first = self.balance_loss is not None and config.balance_over == "step"
        self.register_buffer("bias", torch.zeros(self.num_candidates) if self.bias_controller else None)

    def init_parameter(self, name: str, parameter: Tensor, generator: Generator) -> None:
        parameter.normal_(0.0, INIT_SCALE / math.sqrt(parameter.shape[1]), generator=generator)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        bias = self.bias
        super()._apply(fn, recurse)
        if bias is not None and self.bias is not None and self.bias.dtype.itemsize < 4:
            self.bias = bias.to(self.bias.device)  # stays fp32: one update is below the resolution of 16 bits
        return self

    def forward(self, x_ND: Tensor, aux: AuxOutputs | None = None, valid_N: Tensor | None = None) -> Routing:
        """Route (N, D) normalised tokens; where ``valid_N`` is given and false there is padding."""
        logits_NC, scores_NC = self.scores(x_ND)
        topk_expert_ids_NK = self.select(scores_NC.detach(), logits_NC.detach())
        tapped_NC = scores_NC if self.gradient_tap is None else scores_NC + self.gradient_tap
        topk_scores_NK = gather_scores(tapped_NC, topk_expert_ids_NK)
        if self.config.renormalise:
            topk_scores_NK = topk_scores_NK / topk_scores_NK.sum(-1, keepdim=True)
        if valid_N is None:
            ids_NK, routes = topk_expert_ids_NK, sort_choices(topk_expert_ids_NK, self.num_candidates)
        else:
            ids_NK = torch.where(valid_N[:, None], topk_expert_ids_NK, self.num_candidates)
            topk_scores_NK = torch.where(valid_N[:, None], topk_scores_NK, 0.0)
            sorted_choices = sort_choices(ids_NK, self.num_candidates)
            # one more category, without rows: what is sorted behind the last candidate is computed by nobody
            routes = replace(sorted_choices, counts=F.pad(sorted_choices.counts, (0, 1)))
        if aux is not None:
            self.record_aux(aux, logits_NC, scores_NC, topk_expert_ids_NK, routes, valid_N)
        return Routing(ids_NK, topk_scores_NK, routes)

    def scores(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and scores, (N, C) each, at least fp32."""
        logits_NC = router_logits(x_ND, self.weight)
        return logits_NC, logits_NC.softmax(-1) if self.config.score == "softmax" else logits_NC.sigmoid()

    def select(self, scores_NC: Tensor, logits_NC: Tensor) -> Tensor:
        """(N, K) ids of the chosen candidates, from detached scores and logits. Overridden by controls."""
        scores_for_choice_NC = scores_NC if self.bias is None else scores_NC + self.bias
        return topk_indices(scores_for_choice_NC, self.config.top_k)

    def record_aux(
        self,
        aux: AuxOutputs,
        logits_NC: Tensor,
        scores_NC: Tensor,
        topk_expert_ids_NK: Tensor,
        routes: Routes,
        valid_N: Tensor | None,
    ) -> None:
        """Append losses, counts and metrics of this micro-batch to ``aux``."""
        softmax = self.config.score == "softmax"
        probability_NC = scores_NC if softmax else scores_NC / scores_NC.sum(-1, keepdim=True)
        mean_probability_C = aux.token_mean(probability_NC, valid_N)
        counts_C = routes.counts[: self.num_candidates]
        if self.training:
            aux.counts.append((self, counts_C, mean_probability_C))
        if self.balance_loss is not None and self.config.balance_over == "micro_batch":
            aux.losses.append(self.balance_loss(counts_C, mean_probability_C))
        if self.config.z_weight > 0:
            aux.losses.append(self.config.z_weight * aux.token_mean(logits_NC.logsumexp(-1).square(), valid_N))
        if aux.collect_metrics:
            aux.metrics |= routing_metrics(
                logits_NC.detach(),
                probability_NC.detach(),
                topk_expert_ids_NK,
                self.weight.detach(),
                self.num_experts,
                valid_N,
            )

    # -- once per optimiser step -------------------------------------------------------------------------------------

    def step_loss(self, counts: Tensor, loss_input: Tensor) -> Tensor | None:
        """The balance loss over the step; ``loss_input`` is the micro-batch's share of the mean probability (C,)."""
        if self.balance_loss is not None and self.config.balance_over != "micro_batch":
            return self.balance_loss(counts, loss_input)
        return None

    @torch.no_grad()
    def update_state(self, counts: Tensor, lr_factor: float, remaining: float, applied: Tensor) -> None:
        """Update the selection bias."""
        if self.bias is not None and self.bias_controller is not None and remaining >= self.freeze_last:
            self.bias_controller.update(self.bias, counts, lr_factor, applied)

    @torch.no_grad()
    def diagnostics(
        self, counts: Tensor, recent_counts: Tensor, loss_input: Tensor, tap_gradient: Tensor
    ) -> dict[str, Tensor]:
        """Load, selection bias, and how strong the balance loss is relative to the training loss."""
        values = load_metrics(counts, recent_counts, self.num_experts)
        if self.bias is not None:
            values |= bias_metrics(self.bias[: self.num_experts])
        if self.balance_loss is not None and self.config.score == "softmax":  # other scores are another variable
            # the loss is linear in the probabilities P, so its gradient there is α f
            balance_gradient_C = self.balance_loss.weight * self.balance_loss.load_fractions(counts)
            values |= gradient_ratios(balance_gradient_C, tap_gradient.double(), loss_input.double())
        return values
