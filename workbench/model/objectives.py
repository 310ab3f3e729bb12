"""Training objectives: next-token loss, multi-token head, hidden z-loss.

Legend: B batch, T time, D model width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workbench.contract import AuxOutputs
from workbench.layers import Linear, RMSNorm
from workbench.model.block import Block
from workbench.model.config import Layer
from workbench.ops.cross_entropy import linear_cross_entropy
from workbench.ops.hidden_z import hidden_z_floor, hidden_z_loss

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


def mtp_targets(targets_BT: Tensor, segments: Tensor | None = None) -> Tensor:
    """(B, T) the target after each position's target in the same document; NO_TARGET where there is none."""
    after_BT = torch.full_like(targets_BT, NO_TARGET)
    after_BT[:, :-1] = targets_BT[:, 1:]
    if segments is not None:
        after_BT[:, :-1].masked_fill_(segments[:, 1:] != segments[:, :-1], NO_TARGET)
    return after_BT


def mean_loss(hidden_BTD: Tensor, head_weight_VD: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean negative log-likelihood of the targets that are not negative, in nats, with gradient."""
    targets_N = targets_BT.flatten()
    weights_N = (1.0 / (targets_N >= 0).sum().clamp_min(1)).expand(targets_N.shape)
    return linear_cross_entropy(hidden_BTD.flatten(0, 1), head_weight_VD, targets_N, weights_N=weights_N)[0]


def add_mtp_loss(aux: AuxOutputs, loss: Tensor, weight: float) -> None:
    """Record the multi-token head's loss."""
    aux.losses.append(weight * loss)
    aux.metrics["mtp_loss"] = loss.detach()


def add_hidden_z_loss(aux: AuxOutputs, x_BTD: Tensor, weight: float) -> None:
    """Record the hidden z-loss (arXiv 2509.01322, eq. 10) of the last block's output, and its excess over the floor."""
    loss = hidden_z_loss(x_BTD.flatten(0, 1))
    aux.losses.append(weight * loss)
    aux.metrics["hidden_z_excess"] = loss.detach() - hidden_z_floor(x_BTD.shape[-1])
