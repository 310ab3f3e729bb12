"""Experts on the rows of the tokens that have chosen them, stored on this rank or distributed over several.

Legend: N tokens, K choices of a token, R = N·K rows, D width, E experts, F hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from workbench.ops.dispatch import matmul_dtype
from workbench.ops.experts.exchange import Exchange
from workbench.ops.experts.routing import Routes, combine, dispatch, dispatch_weights
from workbench.ops.experts.torch import local_experts


def swiglu_experts(
    x_RD: Tensor,
    up_EDF: Tensor,
    down_EFD: Tensor,
    counts_E: Tensor,
    weight_R: Tensor | None = None,
    *,
    all_rows: bool = True,
    backend: str = "grouped_mm",
) -> Tensor:
    """SwiGLU experts on rows sorted by expert.

    On CUDA our kernels compute the activation and the gradient of the weights ("triton"); the products themselves, and
    everything on other devices, are torch's ("torch"). float64, which the grouped product lacks, takes the "loop".

    Of experts that are distributed over ranks, each rank computes those that it stores, for the rows of all ranks;
    every rank makes the call. Rows travel in the dtype of the products.

    Args:
        x_RD: (R, D) rows; the first ``counts_E[0]`` belong to expert 0, and so on.
        up_EDF: (E, D, 2F), gate and value side by side. down_EFD: (E, F, D). Sizes multiples of 8. Tensors, or
            DTensors that are sharded evenly over E on one mesh of one dimension.
        counts_E: (E,) integers; zero is allowed.
        weight_R: a factor on every row's output.
        all_rows: whether the counts sum to R. Otherwise further rows belong to no expert, and their output is
            undefined, not even finite.
        backend: "grouped_mm", or "loop" (the definition; synchronises with the device).
    """
    x_RD = x_RD.to(matmul_dtype(x_RD))
    if isinstance(up_EDF, DTensor) and isinstance(down_EFD, DTensor):
        return _distributed_experts(x_RD, up_EDF, down_EFD, counts_E, weight_R, backend)
    return local_experts(x_RD, up_EDF, down_EFD, counts_E, weight_R, all_rows=all_rows, backend=backend)


@torch.compiler.disable  # sizes come from the host, and collectives on them do not belong to a graph
def _distributed_experts(
    x_RD: Tensor, up_EDF: DTensor, down_EFD: DTensor, counts_E: Tensor, weight_R: Tensor | None, backend: str
) -> Tensor:
    exchange = Exchange(counts_E, up_EDF.device_mesh.get_group())
    y_MD = local_experts(
        exchange.to_experts(x_RD),
        up_EDF.to_local(),
        down_EFD.to_local(),
        exchange.counts_L,
        # four bytes more per row; a factor on the returned outputs would be a further pass over them, which are kept
        None if weight_R is None else exchange.weights_to_experts(weight_R),
        all_rows=exchange.is_full,
        backend=backend,
    )
    return exchange.to_tokens(y_MD, len(x_RD))


def routed_experts(
    x_ND: Tensor,
    chosen_NK: Tensor,
    weight_NK: Tensor,
    routes: Routes,
    up_EDF: Tensor,
    down_EFD: Tensor,
    backend: str = "grouped_mm",
) -> Tensor:
    """Σ_k w_k E_{c_k}(x) over the choices c_k that are experts; dropless, and without a host synchronisation unless the
    experts are distributed over ranks.

    Args:
        chosen_NK: c, integers; those from E on are no experts: they contribute nothing and enter no product.
        weight_NK: w.
        routes: of these choices, over at least E categories.
        up_EDF, down_EFD, backend: see :func:`workbench.ops.experts.swiglu_experts`.

    Returns:
        (N, D) in the dtype of the products.
    """
    E = up_EDF.shape[0]
    all_experts = len(routes.counts) == E
    if not all_experts:
        weight_NK = torch.where(chosen_NK < E, weight_NK, 0.0)
    weight_R = dispatch_weights(weight_NK, routes)
    x_RD = dispatch(x_ND.to(matmul_dtype(x_ND)), routes, E, backend)  # cast before it is copied K times
    y_RD = swiglu_experts(x_RD, up_EDF, down_EFD, routes.counts[:E], weight_R, all_rows=all_experts, backend=backend)
    return combine(y_RD, routes, E, backend)
