"""Rows to the ranks that store their experts, and back: expert parallelism, as in GShard (arXiv 2006.16668).

The experts of a layer are distributed over the ranks, which have different tokens: rank w stores the L experts from w·L
on. A rank sends its rows, sorted by expert, in one all-to-all; what it receives is ordered by sender, then by expert,
and is sorted by expert. The outputs go back the same way. The gradient of every exchange is the opposite exchange, so
that the gradients of a rank's experts are sums over the tokens of all ranks: nothing remains to be reduced. Every rank
takes part in every exchange, with no rows if it has none.

Legend: R rows of this rank sorted by expert, M rows that it receives, D width, W ranks, E = W·L experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from workbench.ops.experts.routing import combine, dispatch, dispatch_weights, sort_choices


class _AllToAll(torch.autograd.Function):
    """The first ``sent[w]`` rows go to rank w, and so on; from every rank, in order of rank, ``received[w]`` rows. The
    result has ``rows`` rows, of which those behind the received ones are uninitialised."""

    @staticmethod
    def forward(ctx, x, sent, received, rows, group):  # type: ignore[no-untyped-def]
        ctx.reverse = received, sent, len(x), group
        y = x.new_empty(rows, *x.shape[1:])
        dist.all_to_all_single(y[: sum(received)], x[: sum(sent)].contiguous(), received, sent, group=group)
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        return _AllToAll.apply(dy, *ctx.reverse), None, None, None, None


class Exchange:
    """One exchange of rows between the ranks of ``group``. Made and used by every rank of it.

    Waits for the device once, when the numbers of rows are copied to the host: an all-to-all takes its sizes from
    there, and the buffer of the received rows has the size that they need. (With room for the worst case, in which one
    rank receives all rows, it would take W times the memory.) The host waits for the work before it: a step whose
    kernels are short is slower, and no step is captured in a CUDA graph.

    Args:
        counts_E: (E,) integers, rows of each expert on this rank.
        group: of the W ranks; E is a multiple of W.
    """

    counts_L: Tensor
    """(L,) integers: rows of each expert of this rank, of all ranks' tokens."""

    def __init__(self, counts_E: Tensor, group: Any):
        self.group, world = group, dist.get_world_size(group)
        sent_WL = counts_E.reshape(world, -1).contiguous()
        received_WL = torch.empty_like(sent_WL)
        dist.all_to_all_single(received_WL, sent_WL, group=group)
        self.sent: Sequence[int]
        self.received: Sequence[int]
        self.sent, self.received = torch.stack((sent_WL.sum(1), received_WL.sum(1))).tolist()
        num_received, num_experts = sum(self.received), sent_WL.shape[1]
        expert_WL = torch.arange(num_experts, device=counts_E.device).expand(world, -1)
        expert_M = expert_WL.flatten().repeat_interleave(received_WL.flatten(), output_size=num_received)
        self.is_full = num_received > 0
        if not self.is_full:  # one row of no expert: kernels are not launched without rows
            expert_M = F.pad(expert_M, (0, 1), value=num_experts)
        self.routes = sort_choices(expert_M[:, None], num_experts)
        self.counts_L = self.routes.counts

    def to_experts(self, x_RD: Tensor) -> Tensor:
        """(M, D) rows of this rank's experts, sorted by expert. Where there is none, one row of no expert."""
        return dispatch(self._received(x_RD), self.routes, len(self.counts_L))

    def weights_to_experts(self, weight_R: Tensor) -> Tensor:
        """(M,) factors of the rows of :meth:`to_experts`."""
        return dispatch_weights(self._received(weight_R), self.routes)

    def _received(self, x_R: Tensor) -> Tensor:
        return _AllToAll.apply(x_R, self.sent, self.received, len(self.routes.order_R), self.group)

    def to_tokens(self, y_MD: Tensor, rows: int) -> Tensor:
        """(R, D) from the outputs of this rank's experts, those of this rank's rows; inverse of :meth:`to_experts`.

        Args:
            rows: R. Rows behind those of the last expert are uninitialised.
        """
        y_MD = combine(y_MD, self.routes, len(self.counts_L))
        return _AllToAll.apply(y_MD, self.received, self.sent, rows, self.group)
