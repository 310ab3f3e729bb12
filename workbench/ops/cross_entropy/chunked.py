"""Cross-entropy of a linear head, chunk by chunk over tokens.

The gradient of the weighted sum of losses, w_n (softmax(W h_n) − onehot(target_n)), is computed in the forward pass
from the scores of a chunk and multiplied at once, so forward and backward together cost the three matrix products of an
ordinary head, with the scores of one chunk in memory. The idea is that of Liger-Kernel (arXiv 2410.10989, §3.2); the
code is our own.

Legend: N tokens, D width, V vocabulary, C tokens of one chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.ops.dispatch import matmul_dtype

CHUNK_BYTES = 2**29
"""Largest size of the scores of one chunk."""


def linear_cross_entropy(
    h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, weights_N: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of targets under softmax(W h), in nats.

    Args:
        h_ND: hidden states. weight_VD: the head. Products are in their dtype, or in autocast's.
        targets_N: int64 token ids; negative for no target.
        weights_N: w, (N,) constants; default 1.

    Returns:
        Σ w_n loss_n, float32 (float64 for float64), differentiable in ``h_ND`` and ``weight_VD``; and the losses (N,),
            without
        gradient, 0 for rows without a target.
    """
    if weights_N is None:
        weights_N = torch.ones(targets_N.shape, device=h_ND.device)
    if h_ND.device.type == "cpu" and bool(((mask_N := targets_N >= 0) == 0).any()):
        # on a CPU counting them needs no synchronisation, so rows without a target are dropped: tasks have few answers
        total, losses_A = _LinearCrossEntropy.apply(h_ND[mask_N], weight_VD, targets_N[mask_N], weights_N[mask_N])
        return total, losses_A.new_zeros(targets_N.shape).masked_scatter_(mask_N, losses_A)
    return _LinearCrossEntropy.apply(h_ND, weight_VD, targets_N, weights_N)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_ND, weight_VD, targets_N, weights_N):  # type: ignore[no-untyped-def]
        dtype = matmul_dtype(h_ND)
        wide = torch.promote_types(dtype, torch.float32)
        h, weight = h_ND.to(dtype), weight_VD.to(dtype)
        N, V = h.shape[0], weight.shape[0]
        wants_h, wants_weight = ctx.needs_input_grad[:2]
        losses_N = torch.empty(N, device=h.device, dtype=wide)
        dh_ND = torch.empty_like(h) if wants_h else None
        dweight_VD = torch.zeros(weight.shape, device=h.device, dtype=wide) if wants_weight else None
        step = max(1, CHUNK_BYTES // (V * h.element_size()))
        chunks = max(1, -(-N // step))
        step = max(1, -(-N // chunks))  # chunks of equal size
        for start in range(0, N, step):
            span = slice(start, start + step)
            scores_CV = h[span] @ weight.t()
            _losses_(scores_CV, targets_N[span], weights_N[span].to(wide), losses_N[span], wants_h or wants_weight)
            if dh_ND is not None:
                torch.mm(scores_CV, weight, out=dh_ND[span])
            if dweight_VD is not None:
                _add_product_(dweight_VD, scores_CV, h[span])
        ctx.save_for_backward(dh_ND, dweight_VD)
        ctx.types = h_ND.dtype, weight_VD.dtype
        ctx.mark_non_differentiable(losses_N)
        return (losses_N * weights_N.to(wide)).sum(), losses_N

    @staticmethod
    def backward(ctx, upstream, _):  # type: ignore[no-untyped-def]
        dh_ND, dweight_VD = ctx.saved_tensors
        h_type, weight_type = ctx.types
        dh = None if dh_ND is None else (dh_ND * upstream.to(dh_ND.dtype)).to(h_type)
        dweight = None if dweight_VD is None else (dweight_VD * upstream).to(weight_type)
        return dh, dweight, None, None


def _losses_(scores_CV: Tensor, targets_C: Tensor, weights_C: Tensor, losses_C: Tensor, gradient: bool) -> None:
    """Writes the losses; with ``gradient`` overwrites the scores with the gradient of the weighted losses."""
    if scores_CV.is_cuda and losses_C.dtype == torch.float32:  # the kernel sums in fp32
        from workbench.ops.cross_entropy.triton import losses_

        return losses_(scores_CV, targets_C, weights_C, losses_C, gradient)
    wide = losses_C.dtype
    mask_C = targets_C >= 0
    index_C1 = targets_C.clamp_min(0)[:, None]
    scores = scores_CV.to(wide)
    lse_C1 = scores.logsumexp(dim=-1, keepdim=True)
    losses_C.copy_(torch.where(mask_C, (lse_C1 - scores.gather(1, index_C1))[:, 0], 0.0))
    if gradient:
        p = (scores - lse_C1).exp_()
        p.scatter_add_(1, index_C1, torch.full_like(index_C1, -1, dtype=wide))
        scores_CV.copy_(p * torch.where(mask_C, weights_C, 0.0)[:, None])


def _add_product_(total_VD: Tensor, scores_CV: Tensor, h_CD: Tensor) -> None:
    """total += scoresᵀ h, summed in the dtype of the total."""
    if scores_CV.dtype != total_VD.dtype and scores_CV.is_cuda:
        total_VD += torch.mm(scores_CV.t(), h_CD, out_dtype=total_VD.dtype)
    else:
        total_VD += scores_CV.t() @ h_CD
