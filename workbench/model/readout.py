"""What is predicted from a whole sequence instead of its prefixes.

Legend: B batch, T time, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workbench.layers import Linear, RMSNorm, linear_flops, rotary_table


class SummaryReadout(nn.Module):
    """Every position of a document from the state of its last token: z = x_last + position code, two layers of
    norm, projection and GELU (the decoder of MAD's compression task, arXiv 2403.17844, appendix B; without biases,
    ours). The position code is sinusoidal and counts from the beginning of the document.
    """

    def __init__(self, width: int):
        super().__init__()
        self.norms = nn.ModuleList(RMSNorm(width) for _ in range(2))
        self.projections = nn.ModuleList(Linear(width, width) for _ in range(2))

    def forward(self, x_BTD: Tensor, *, segments: Tensor | None = None) -> Tensor:
        """(B, T, D) from the last block's output, (B, T, D)."""
        last_BT, position_BT = _places(x_BTD, segments)
        cos_TC, sin_TC = rotary_table(x_BTD.detach(), x_BTD.shape[1], 0, x_BTD.shape[2], 10_000.0)
        code_TD = torch.cat((sin_TC, cos_TC), dim=-1).to(x_BTD.dtype)
        summary_BTD = x_BTD.gather(1, last_BT[..., None].expand_as(x_BTD))
        z_BTD = summary_BTD + code_TD[position_BT]
        for norm, project in zip(self.norms, self.projections):
            z_BTD = nn.functional.gelu(project(norm(z_BTD)))
        return z_BTD

    @staticmethod
    def cost(width: int) -> tuple[int, int]:
        """Parameters, and forward FLOPs per token."""
        return 2 * width * width + 2 * width, linear_flops((width, width), (width, width))


def _places(x_BTD: Tensor, segments: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, T) index of the last token of each token's document, and its position within the document."""
    B, T, _ = x_BTD.shape
    time_BT = torch.arange(T, device=x_BTD.device).expand(B, T)
    if segments is None:
        return torch.full_like(time_BT, T - 1), time_BT
    edge_B1 = torch.ones(B, 1, dtype=torch.bool, device=x_BTD.device)
    changes_BT = segments[:, 1:] != segments[:, :-1]
    starts_BT = torch.where(torch.cat((edge_B1, changes_BT), dim=1), time_BT, 0).cummax(1).values
    ends_BT = torch.where(torch.cat((changes_BT, edge_B1), dim=1), time_BT, T - 1).flip(1).cummin(1).values.flip(1)
    return ends_BT, time_BT - starts_BT
