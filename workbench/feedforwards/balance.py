"""Load balance of a mixture of experts: a loss, or a bias on the selection that is updated once per optimiser step.

    loss        α Σ_j f_j P_j over G groups of experts, with the zero-computation experts as one more group;
                P_j mean probability of a group,  f_j = G / (K_e T) · choices in group j,
                f_zero = 1 / ((K - K_e) T) · choices of zero-computation experts             (arXiv 2509.01322, eq. 3-5)
    bias        δb_i = μ (K_e / (K E) - T_i / (K T)) for the E experts, 0 for zero-computation ones              (eq. 2)
                or by sign, δb_i = μ sign(K_e / (K E) - T_i / (K T))                                  (arXiv 2408.15664)

T tokens, T_i of them with expert i among their K choices, of which K_e are expected to be real experts. With G = E and
no zero-computation experts the loss is the usual α E Σ f_i P_i (arXiv 2101.03961, eq. 4). The paper prints an indicator
in f_j, "token selects group j"; counted so, f_j = 1 is not the balanced state. We count every choice; then it is.

Legend: C candidates (experts, then zero-computation experts), E experts, K choices per token, G groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FREEZE_LAST = 0.03
"""Fraction of a run's steps, at its end, in which the bias stays constant."""


class BalanceLoss:
    """α Σ_j f_j P_j.

    Args:
        config: a resolved :class:`workbench.feedforwards.moe.MixtureOfExperts.Config`.
    """

    def __init__(self, config: Any):
        self.weight: float = config.balance_weight
        self.num_experts, self.num_zero, self.top_k = config.experts, config.zero_experts, config.top_k
        self.expected_experts: float = config.expected_experts
        self.num_groups: int = config.balance_groups

    def __call__(self, counts_C: Tensor, mean_probability_C: Tensor) -> Tensor:
        """The scalar loss; its gradient flows through the probabilities alone.

        It is linear in the probabilities: shares of their mean give shares of the loss.

        Args:
            counts_C: choices of each candidate.
            mean_probability_C: mean over tokens, or a micro-batch's share of it.
        """
        return self.weight * (self.load_fractions(counts_C).to(mean_probability_C.dtype) * mean_probability_C).sum()

    def load_fractions(self, counts_C: Tensor) -> Tensor:
        """(C,) f_j of each candidate's group, fp64; 1 everywhere when the load is balanced."""
        counts_C, G = counts_C.double(), self.num_groups
        tokens = counts_C.sum() / self.top_k
        fractions_G = counts_C[: self.num_experts].view(G, -1).sum(1) * (G / self.expected_experts)
        if self.num_zero:
            zero_choices = counts_C[self.num_experts :].sum()
            zero_fraction = zero_choices[None] / (self.top_k - self.expected_experts)
            fractions_G = torch.cat((fractions_G, zero_fraction))
        return (fractions_G / tokens)[self.group_ids(counts_C.device)]

    def group_ids(self, device: torch.device) -> Tensor:
        """(C,) group of each candidate: neighbouring experts share one; zero-computation experts form the last."""
        ids_C = torch.arange(self.num_experts + self.num_zero, device=device) // (self.num_experts // self.num_groups)
        return ids_C.clamp_max(self.num_groups - 1 + (self.num_zero > 0))


class BiasController:
    """Update rule of the selection bias.

    Args:
        config: a resolved :class:`workbench.feedforwards.moe.MixtureOfExperts.Config`.
    """

    def __init__(self, config: Any):
        self.rule: str = config.bias
        self.step_size: float = config.bias_step
        self.num_experts: int = config.experts
        self.target_share: float = config.expected_experts / (config.top_k * config.experts)

    def update(self, bias_C: Tensor, counts_C: Tensor, lr_factor: float, applied: Tensor) -> None:
        """Update ``bias_C`` in place. Arguments as in :meth:`workbench.contract.StepCounter.update_state`."""
        counts_C = counts_C.double()
        deficit_C = self.target_share - counts_C / counts_C.sum()
        is_expert_C = torch.arange(len(counts_C), device=counts_C.device) < self.num_experts
        deficit_C = torch.where(is_expert_C, deficit_C, 0.0)
        update_C = deficit_C.sign() if self.rule == "sign" else deficit_C * lr_factor
        bias_C += (self.step_size * applied * update_C).to(bias_C.dtype)
