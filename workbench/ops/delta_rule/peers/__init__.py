"""The delta rule by kernels of other packages, one file each; every package is optional.

A file of this folder has PEERS: for each backend what it covers and how it is called. A peer computes a call only
after it agreed with the recurrence in fp64 on this device, dtype and head size (:mod:`.verify`). :mod:`.choice` takes
the fastest for ``backend="auto"``; a peer that leaves something out is used only where it is named. In compiled code
peers are called through an operator (:mod:`.operator`).

Legend: B batch, T time, H heads, K key channels, V value channels.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from workbench.distribution import install_extra

__all__ = ["Call", "Peer", "known_peers", "obstacle"]


class Call(NamedTuple):
    """What a peer's limits depend on: everything about a call but its values."""

    device: torch.device
    dtype: torch.dtype
    B: int
    T: int
    H: int
    K: int
    V: int
    decay: str
    """"none", "head" or "channel"."""
    erase: bool
    """Whether erase keys differ from write keys."""
    packed: bool
    """Whether rows consist of documents."""
    compiled: bool
    """Whether the call is made in compiled code."""


@dataclass(frozen=True)
class Peer:
    """A backend of another package."""

    name: str
    """Of the backend."""
    modules: tuple[str, ...]
    """Names under which its packages are imported."""
    distribution: str
    """Name under which it is installed; its version is part of what is measured."""
    extra: str
    """The extra that installs it."""
    compute: Callable[..., tuple[Tensor, Tensor]]
    """Takes the tensors of :func:`workbench.ops.delta_rule.delta_rule`."""
    capabilities: frozenset[tuple[int, int]] | None = None
    """Compute capabilities of its GPUs. Default: any."""
    dtypes: frozenset[torch.dtype] | None = None
    """Of the values. Default: any."""
    channels: int | None = None
    """The one number of key and of value channels of a head. Default: any."""
    decays: frozenset[str] = frozenset({"none", "head", "channel"})
    erase: bool = False
    """Whether it takes separate erase keys."""
    max_beta: float = 2.0
    """Largest β that it takes."""
    truncates: str = ""
    """What it leaves out of the function; such a peer has to be named."""
    automatic: bool = False
    """Whether ``backend="auto"`` may choose it."""

    def __post_init__(self) -> None:
        assert not (self.truncates and self.automatic), self.name


@cache
def known_peers() -> dict[str, Peer]:
    """Backend -> peer, of every file of this folder."""
    files = (importlib.import_module(f"{__name__}.{file.name}") for file in pkgutil.iter_modules(__path__))
    return {peer.name: peer for file in files for peer in getattr(file, "PEERS", ())}


def capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a CUDA device that is present; None for any other device."""
    present = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_capability(device) if present else None


def obstacle(peer: Peer, call: Call) -> str | None:
    """Why the peer cannot compute a call; None if it may be tried. Imports nothing of its packages."""
    found = capability(call.device)
    if found is None:
        return f"its kernels need a CUDA device; the tensors are on {call.device.type}"
    missing = [name for name in peer.modules if find_spec(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} ({install_extra(peer.extra)})"
    if peer.capabilities is not None and found not in peer.capabilities:
        return f"compute capability: got {_version(found)}; it takes {_names(map(_version, peer.capabilities))}"
    if peer.dtypes is not None and call.dtype not in peer.dtypes:
        return f"dtype: got {_version(call.dtype)}; it takes {_names(map(_version, peer.dtypes))}"
    if peer.channels is not None and {call.K, call.V} != {peer.channels}:
        return f"channels of a head: got K={call.K}, V={call.V}; it takes {peer.channels} of both"
    if call.decay not in peer.decays:
        return f"decay: got {call.decay}; it takes {_names(peer.decays)}"
    if call.erase and not peer.erase:
        return "it has no erase keys beside the write keys"
    return None


def _version(value: tuple[int, int] | torch.dtype) -> str:
    return ".".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
