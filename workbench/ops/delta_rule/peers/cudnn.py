"""NVIDIA's cuDNN frontend (the extra `cudnn`; github.com/NVIDIA/cudnn-frontend, MIT and Apache 2.0): the engine
`kda_hopper_cuda` for one decay per channel, heads of 128 × 128 and β of at most 1, on Hopper.

It divides rows into parts, and leaves out of each what the state has lost by more than 2^-23.5 before it. Its bound
assumes write keys and queries of at most unit norm and 0 <= β <= 1; a larger β stops the program. Its backward pass
has the scale K^-1/2 built in, so that queries, which are already scaled, are multiplied by K^1/2 before.

Written against version 1.32.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from workbench.ops.delta_rule.peers import Peer
from workbench.ops.delta_rule.peers.documents import Sequences

ENGINE = "kda_hopper_cuda"


def delta_rule_cudnn(
    q_BTHK: Tensor,
    write_key_BTHK: Tensor,
    value_BTHV: Tensor,
    g_BTHK: Tensor | None = None,
    *,
    erase_key_BTHK: Tensor | None = None,
    beta_BTH: Tensor | None = None,
    state_BHKV: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`workbench.ops.delta_rule.delta_rule`, with one decay per channel and without erase keys.

    Raises:
        RuntimeError: where β is greater than 1; on a GPU as a failed assertion of the device.
    """
    assert g_BTHK is not None
    assert erase_key_BTHK is None
    B, T, H, K = q_BTHK.shape
    dtype = value_BTHV.dtype
    if beta_BTH is None:
        beta_BTH = torch.ones(B, T, H, device=q_BTHK.device)
    else:
        torch._assert_async(
            (beta_BTH <= 1).all(), "delta_rule: backend='cudnn_truncated': β > 1, which its truncation does not allow."
        )
    sequences = Sequences(segments, state_BHKV)
    ends_N1 = sequences.ends_N1
    if ends_N1 is None:
        ends_N1 = torch.arange(0, B * T + 1, T, device=q_BTHK.device)
    arguments = {
        "q": (q_BTHK.float() * K**0.5).to(dtype),
        "k": write_key_BTHK.to(dtype),
        "v": value_BTHV,
        "g": g_BTHK.float(),
        "beta": beta_BTH.float(),
    }
    state = sequences.state_NHKV
    out, final = importlib.import_module("cudnn.linear_attention.ops").kimi_delta_attention(
        **{name: x.flatten(0, 1) for name, x in arguments.items()},
        cu_seqlens=ends_N1.int(),
        scale=K**-0.5,
        initial_state=None if state is None else state.mT.contiguous(),  # its states are (V, K)
        output_final_state=True,
        plan_name=ENGINE,
    )
    return out.view(B, T, H, -1).to(dtype), final.mT[sequences.last_B]


PEERS = (
    Peer(
        name="cudnn_truncated",
        modules=("cudnn",),
        distribution="nvidia-cudnn-frontend",
        extra="cudnn",
        compute=delta_rule_cudnn,
        capabilities=frozenset({(9, 0)}),
        dtypes=frozenset({torch.bfloat16}),
        channels=128,
        decays=frozenset({"channel"}),
        max_beta=1.0,
        truncates="what the state has lost by more than 2^-23.5 before a part of a row",
    ),
)
