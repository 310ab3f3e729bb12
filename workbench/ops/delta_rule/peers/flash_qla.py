"""FlashQLA (the extra `flash-qla`; github.com/QwenLM/FlashQLA, MIT): no decay or one per head, heads of 128 × 128.

`flash_qla` computes the function. `flash_qla_truncated` divides long rows into parts that run beside each other: each
starts from the tokens before it over which the state has lost 10 nats, and what is older is left out (e^-10 = 4.5·10⁻⁵
of the state; where the state loses less, it corrects the parts exactly). Its kernels are compiled at first use, which
took 100 s on an H200, and kept on disk by TileLang.

Written against version 0.1.3.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from workbench.ops.delta_rule.peers import Peer
from workbench.ops.delta_rule.peers.documents import Sequences


def delta_rule_flash_qla(
    q_BTHK: Tensor,
    write_key_BTHK: Tensor,
    value_BTHV: Tensor,
    g_BTH: Tensor | None = None,
    *,
    erase_key_BTHK: Tensor | None = None,
    beta_BTH: Tensor | None = None,
    state_BHKV: Tensor | None = None,
    segments: Tensor | None = None,
    in_parts: bool = False,
) -> tuple[Tensor, Tensor]:
    """As :func:`workbench.ops.delta_rule.delta_rule`, without erase keys.

    Args:
        in_parts: whether long rows are divided, which leaves out what the state has forgotten.
    """
    assert erase_key_BTHK is None
    shape, dtype = q_BTHK.shape[:3], value_BTHV.dtype
    device = value_BTHV.device
    g_BTH = torch.zeros(shape, device=device) if g_BTH is None else g_BTH.float()
    beta_BTH = torch.ones(shape, device=device) if beta_BTH is None else beta_BTH.float()
    arguments = {"q": q_BTHK.to(dtype), "k": write_key_BTHK.to(dtype), "v": value_BTHV, "g": g_BTH, "beta": beta_BTH}
    sequences = Sequences(segments, state_BHKV)
    out, final = importlib.import_module("flash_qla").chunk_gated_delta_rule(
        **{name: sequences.one_row(x) for name, x in arguments.items()},
        scale=1.0,
        initial_state=sequences.state_NHKV,
        output_final_state=True,
        cu_seqlens=sequences.ends_N1,
        auto_cp=in_parts,
    )
    return out.view(*shape, -1).to(dtype), final[sequences.last_B]


_exact = Peer(
    name="flash_qla",
    modules=("tilelang", "flash_qla"),
    distribution="flash-qla",
    extra="flash-qla",
    compute=delta_rule_flash_qla,
    capabilities=frozenset({(9, 0), (10, 0), (10, 3)}),
    dtypes=frozenset({torch.bfloat16, torch.float16}),
    channels=128,
    decays=frozenset({"none", "head"}),
    automatic=True,
)
PEERS = (
    _exact,
    replace(
        _exact,
        name="flash_qla_truncated",
        compute=partial(delta_rule_flash_qla, in_parts=True),
        truncates="what the state has forgotten before a part of a row, by 10 nats",
        automatic=False,
    ),
)
