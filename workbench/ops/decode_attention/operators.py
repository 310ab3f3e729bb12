"""The operator behind the public function, opaque to torch.compile: it chooses its implementation when it runs.

Legend as in the package.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.ops.decode_attention.torch import decode_attention_torch
from workbench.ops.dispatch import choose_backend, disable_autocast, record

MAX_CHANNELS = 512
"""Most channels of a key or a value that the kernels take: a tile of them has to fit in shared memory."""


@torch.library.custom_op("workbench::decode_attention", mutates_args=())
def _decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    lengths: Tensor,
    shared: Tensor | None,
    k_steps: Tensor | None,
    v_steps: Tensor | None,
    sink: Tensor | None,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    supported = max(k.shape[-1], 0 if v is None else v.shape[-1]) <= MAX_CHANNELS
    with disable_autocast(q):
        if record("decode_attention", choose_backend(q, supported=supported)) == "torch":
            return decode_attention_torch(q, k, v, lengths, shared, k_steps, v_steps, sink, scale, softcap, window)
        from workbench.ops.decode_attention.triton import decode_attention_triton

        return decode_attention_triton(q, k, v, lengths, shared, k_steps, v_steps, sink, scale, softcap, window)


@_decode_attention.register_fake
def _(q, k, v, lengths, shared, k_steps, v_steps, sink, scale, softcap, window) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    V = (k if v is None else v).shape[-1]
    return q.new_empty(*q.shape[:2], V), q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
