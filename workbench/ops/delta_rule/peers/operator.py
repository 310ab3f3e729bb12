"""Peers in compiled code: one operator whose backward pass repeats the forward pass of the peer.

The functions of other packages break compiled graphs, which the workbench does not allow. Only the inputs are saved
between the passes; repeating costs one forward pass of the peer.

Legend: B batch, T time, H heads, K key channels, V value channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.compat import autograd_inside_operators
from workbench.ops.delta_rule.peers import known_peers

NAMES = ("q_BTHK", "write_key_BTHK", "value_BTHV", "g", "erase_key_BTHK", "beta_BTH", "state_BHKV")


def compute(
    name: str,
    q_BTHK: Tensor,
    write_key_BTHK: Tensor,
    value_BTHV: Tensor,
    g: Tensor | None = None,
    *,
    erase_key_BTHK: Tensor | None = None,
    beta_BTH: Tensor | None = None,
    state_BHKV: Tensor | None = None,
    segments: Tensor | None = None,
    compiled: bool,
) -> tuple[Tensor, Tensor]:
    """As :func:`workbench.ops.delta_rule.delta_rule`, by the peer ``name``.

    Args:
        compiled: whether through the operator.
    """
    tensors = (q_BTHK, write_key_BTHK, value_BTHV, g, erase_key_BTHK, beta_BTH, state_BHKV)
    return _forward(name, *tensors, segments) if compiled else _call(name, tensors, segments)


def _call(name: str, tensors: tuple[Tensor | None, ...], segments: Tensor | None) -> tuple[Tensor, Tensor]:
    q, k, v, g, *optional = tensors
    o, end = known_peers()[name].compute(q, k, v, g, **dict(zip(NAMES[4:], optional)), segments=segments)
    return o, end.float()


@torch.library.custom_op("workbench::delta_rule_peer", mutates_args=())
def _forward(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    e: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs, and the state after the last token."""
    o, end = _call(name, (q, k, v, g, e, beta, state), segments)
    return o.contiguous(), end.contiguous()


@_forward.register_fake
def _(name, q, k, v, g, e, beta, state, segments):  # type: ignore[no-untyped-def]
    B, _, H, K = q.shape
    return v.new_empty(v.shape), v.new_empty(B, H, K, v.shape[-1], dtype=torch.float32)


@torch.library.custom_op("workbench::delta_rule_peer_backward", mutates_args=())
def _backward(
    name: str,
    do: Tensor,
    dend: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    e: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None,
) -> list[Tensor]:
    """Gradients of the inputs that are given."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in (q, k, v, g, e, beta, state)]
    with torch.enable_grad(), autograd_inside_operators():
        o, end = _call(name, tuple(leaves), segments)
        ends = ([o], [do]) if dend is None else ([o, end], [do, dend])
        given = [x for x in leaves if x is not None]
        gradients = torch.autograd.grad(ends[0], given, ends[1], allow_unused=True)
    return [torch.zeros_like(x) if dx is None else dx.contiguous() for x, dx in zip(given, gradients)]


@_backward.register_fake
def _(name, do, dend, q, k, v, g, e, beta, state, segments):  # type: ignore[no-untyped-def]
    return [x.new_empty(x.shape) for x in (q, k, v, g, e, beta, state) if x is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.name = inputs[0]
    ctx.save_for_backward(*inputs[1:])


def _differentiate(ctx: Any, do: Tensor | None, dend: Tensor | None) -> Any:
    *tensors, segments = ctx.saved_tensors
    do = torch.zeros_like(tensors[2]) if do is None else do
    gradients = iter(_backward(ctx.name, do, dend, *tensors, segments))
    return None, *(None if x is None else next(gradients) for x in tensors), None


_forward.register_autograd(_differentiate, setup_context=_save)
