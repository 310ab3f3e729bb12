"""Whether a peer computes the delta rule: a small comparison with the recurrence in fp64 before its first use.

Legend: B batch, T time, H heads, K key channels, V value channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.ops.delta_rule.peers import Call, Peer, known_peers, obstacle
from workbench.ops.delta_rule.peers.operator import compute
from workbench.ops.delta_rule.reference import delta_rule_recurrent
from workbench.ops.dispatch import disable_autocast

TOLERANCE = 2e-2
"""Largest relative error of outputs, state and gradients: four times the largest of our kernels in bf16 (5.6·10⁻³), and
far below that of any other function."""
LENGTH = 150
"""Tokens of the comparison: two chunks of 64 and a part."""

_reasons: dict[tuple[Any, ...], str] = {}


def reset() -> None:
    """Forget what was verified in this process."""
    _reasons.clear()


@torch.compiler.assume_constant_result  # compared when code is compiled
def refusal(name: str, *call: Any) -> str:
    """Why the peer ``name`` cannot compute a call, "" if it can: its limits, then the comparison, once per device,
    dtype and form of the operation.

    Args:
        name: of the backend.
        call: the fields of :class:`~workbench.ops.delta_rule.peers.Call`.
    """
    peer, facts = known_peers()[name], Call(*call)
    reason = obstacle(peer, facts)
    if reason is not None:
        return reason
    key = (name, facts.device, facts.dtype, facts.K, facts.V, facts.decay, facts.erase, facts.compiled)
    if key not in _reasons:
        _reasons[key] = compare(peer, facts)
    return _reasons[key]


def compare(peer: Peer, call: Call) -> str:
    """Why the peer is not the recurrence; "" if it is.

    Two rows of moderate decays that continue a state, and two rows of documents in which some tokens lose 30 nats, each
    with the gradients of all inputs.
    """
    small = call._replace(B=2, T=LENGTH, H=2)
    try:
        for packed in (False, True):
            with measuring(call.device):
                leaves, segments = inputs(small._replace(packed=packed), peer.max_beta, state=True)
                exact = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
                actual = results(partial(compute, peer.name, compiled=call.compiled), leaves, segments)
                expected = results(delta_rule_recurrent, exact, segments)
            for what, a, b in zip(("outputs", "state", *(f"gradient of {name}" for name in leaves)), actual, expected):
                a, b = a.detach().double(), b.detach()
                error = float((a - b).norm() / b.norm().clamp_min(1e-3 * math.sqrt(b.numel())))
                if not error <= TOLERANCE:  # also NaN
                    form = "documents and decays of 30 nats" if packed else "moderate decays"
                    return f"{what}: relative error {error:.1e} with {form}; at most {TOLERANCE:.0e} is allowed"
    except Exception as error:  # of any kind: it is the package's
        return f"{type(error).__name__}: {error}"
    return ""


def inputs(call: Call, max_beta: float, *, state: bool) -> tuple[dict[str, Tensor], Tensor | None]:
    """Random leaves of a call by keyword, and its documents; training's random numbers are not touched."""
    generator = torch.Generator(call.device).manual_seed(0)
    on: dict[str, Any] = {"device": call.device, "generator": generator}
    B, T, H, K, V = call.B, call.T, call.H, call.K, call.V

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, **on)

    leaves = {
        "q_BTHK": F.normalize(normal(B, T, H, K), dim=-1) * K**-0.5,
        "write_key_BTHK": F.normalize(normal(B, T, H, K), dim=-1),
        "value_BTHV": normal(B, T, H, V),
        "beta_BTH": max_beta * torch.rand(B, T, H, **on),
    }
    if state:
        leaves["state_BHKV"] = normal(B, H, K, V)
    if call.decay != "none":
        shape = (B, T, H, K) if call.decay == "channel" else (B, T, H)
        leaves["g"] = -torch.exp(math.log(1e-3) * torch.rand(shape, **on))  # 0.001 to 1 nat, log-uniform
        if call.packed:
            leaves["g"] = torch.where(torch.rand(shape, **on) < 0.03, -30.0, leaves["g"])
    if call.erase:
        leaves["erase_key_BTHK"] = F.normalize(normal(B, T, H, K), dim=-1)
    wide = ("g", "beta_BTH", "state_BHKV")
    leaves = {name: (x if name in wide else x.to(call.dtype)).requires_grad_() for name, x in leaves.items()}
    if not call.packed:
        return leaves, None
    starts_BT = torch.rand(B, T, **on) < 1 / 64
    return leaves, starts_BT.cumsum(1)


def results(
    function: Callable[..., tuple[Tensor, Tensor]], leaves: dict[str, Tensor], segments: Tensor | None
) -> list[Tensor]:
    """Outputs, state after the last token, and the gradients of a fixed sum of both."""
    o, end = function(**{"g": None, **leaves}, segments=segments)
    total = o.new_zeros((), dtype=torch.promote_types(end.dtype, torch.float32))
    for y in (o, end):
        weight = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=total.dtype).view(y.shape).sin()
        total = total + (y.to(total.dtype) * weight).sum()
    return [o, end, *torch.autograd.grad(total, list(leaves.values()))]


@contextmanager
def measuring(device: torch.device) -> Iterator[None]:
    """Real tensors with gradients and their own dtype, wherever the call is made: in a compiled function, under
    autocast, in inference mode."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(disable_autocast(torch.empty((), device=device)))
        yield
