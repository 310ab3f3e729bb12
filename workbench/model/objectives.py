"""Training objectives: next-token loss, multi-token head, hidden z-loss.

Legend: B batch, T time, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from workbench.contract import AuxOutputs
from workbench.layers import Linear, RMSNorm
from workbench.model.block import Block
from workbench.model.config import Layer
from workbench.ops.cross_entropy import linear_cross_entropy
from workbench.ops.hidden_z import hidden_z_floor, hidden_z_loss
from workbench.pooled import Mean

NO_TARGET = -100
"""Target of a position at which nothing is predicted; every negative number means the same."""


class MultiTokenHead(nn.Module):
    """norm(block(W [norm(h_t); norm(e_{t+1})])): hidden states from which the output matrix predicts token t + 2.

    The form of DeepSeek-V3's module (arXiv 2412.19437, §2.2), as we understand it; h is the last block's output.
    """

    def __init__(self, layer: Layer, width: int):
        super().__init__()
        self.hidden_norm, self.embedding_norm = RMSNorm(width), RMSNorm(width)
        self.project = Linear(2 * width, width)
        self.block = Block(layer, width)
        self.norm = RMSNorm(width)

    def forward(
        self,
        x_BTD: Tensor,
        *,
        next_embedding_BTD: Tensor,
        segments: Tensor | None = None,
        aux: AuxOutputs | None = None,
    ) -> Tensor:
        """(B, T, D) from the last block's output and the embeddings of the next tokens, (B, T, D) each."""
        joined_BTE = torch.cat((self.hidden_norm(x_BTD), self.embedding_norm(next_embedding_BTD)), dim=-1)
        return self.norm(self.block(self.project(joined_BTE), segments=segments, aux=aux))


def mtp_segments(segments: Tensor) -> Tensor:
    """(B, T) document numbers in the multi-token head's block: negative where no token of the same document follows,
    each such position a document of its own."""
    has_next_BT = torch.zeros_like(segments, dtype=torch.bool)
    has_next_BT[:, :-1] = (segments[:, :-1] == segments[:, 1:]) & (segments[:, :-1] >= 0)
    alone_T = -1 - torch.arange(segments.shape[1], dtype=segments.dtype, device=segments.device)
    return torch.where(has_next_BT, segments, alone_T)


def mtp_targets(targets_BT: Tensor, segments: Tensor | None = None) -> Tensor:
    """(B, T) the target after each position's target in the same document; NO_TARGET where there is none."""
    after_BT = torch.full_like(targets_BT, NO_TARGET)
    after_BT[:, :-1] = targets_BT[:, 1:]
    if segments is not None:
        after_BT[:, :-1].masked_fill_(segments[:, 1:] != segments[:, :-1], NO_TARGET)
    return after_BT


class StepTotals(NamedTuple):
    """Denominators of an optimiser step's objectives: scalars, fp64, at least 1."""

    targets: Tensor
    """Positions with a target."""
    mtp_targets: Tensor
    """Positions with a target of the multi-token head."""
    tokens: Tensor
    """Positions without padding."""
    mtp_tokens: Tensor
    """Positions without padding of the multi-token head's block."""

    @classmethod
    def of(cls, targets_BT: Tensor, segments: Tensor | None = None) -> StepTotals:
        """Those of one batch."""
        return cls.at_least_one(count_positions(targets_BT, segments))

    @classmethod
    def at_least_one(cls, counts: Tensor) -> StepTotals:
        """From :func:`count_positions`, summed over the batches of a step."""
        return cls(*counts.double().clamp_min(1))


def count_positions(targets_BT: Tensor, segments: Tensor | None = None) -> Tensor:
    """(4,) int64: positions of a batch as counted by the fields of :class:`StepTotals`."""
    if segments is None:
        segments = torch.zeros_like(targets_BT)
        ahead_BT = segments
    else:
        ahead_BT = mtp_segments(segments)
    counted = targets_BT, mtp_targets(targets_BT, segments), segments, ahead_BT
    return torch.stack([(values_BT >= 0).sum() for values_BT in counted])


def target_loss(hidden_BTD: Tensor, head_weight_VD: Tensor, targets_BT: Tensor, total: Tensor) -> Tensor:
    """Negative log-likelihood of the targets that are not negative, summed and divided by ``total``, in nats, with
    gradient."""
    targets_N = targets_BT.flatten()
    weights_N = (1.0 / total).expand(targets_N.shape)
    return linear_cross_entropy(hidden_BTD.flatten(0, 1), head_weight_VD, targets_N, weights_N=weights_N)[0]


def add_mtp_loss(aux: AuxOutputs, loss: Tensor, weight: float, targets_BT: Tensor, total: Tensor) -> None:
    """Record the multi-token head's loss: the share ``loss`` of the mean over the step's ``total`` targets."""
    aux.losses.append(weight * loss)
    aux.metrics["mtp_loss"] = Mean(loss.detach() * total, (targets_BT >= 0).sum())


def add_hidden_z_loss(aux: AuxOutputs, x_BTD: Tensor, weight: float, segments: Tensor | None, total: Tensor) -> None:
    """Record the hidden z-loss (arXiv 2509.01322, eq. 10) of the last block's output, and its excess over the floor.

    Padding does not count; ``total`` are the tokens of the step.
    """
    is_token_BT = torch.ones(x_BTD.shape[:2], device=x_BTD.device) if segments is None else segments >= 0
    is_token_N = is_token_BT.flatten().double()
    loss = hidden_z_loss(x_BTD.flatten(0, 1), is_token_N / total)
    aux.losses.append(weight * loss)
    tokens = is_token_N.sum()
    aux.metrics["hidden_z_excess"] = Mean(loss.detach() * total - tokens * hidden_z_floor(x_BTD.shape[-1]), tokens)
