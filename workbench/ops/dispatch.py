"""Which implementation computes an operation, which ones this process has used, and autocast inside operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor

TRITON = find_spec("triton") is not None
"""Whether Triton, which compiles the kernels, is installed."""

_recorded: dict[str, list[str]] = {}
_forced: str | None = None


def choose_backend(x: Tensor, *, supported: bool = True, kernels: str = "triton") -> str:
    """``kernels`` on CUDA devices, for every dtype but float64, where they are ``supported``; otherwise "torch".

    Args:
        x: a tensor of the call; its device and dtype decide.
        supported: whether the kernels cover the sizes and arguments of this call.
        kernels: name of the implementation for GPUs.
    """
    available = _forced == kernels or (TRITON and x.device.type == "cuda" and _forced != "torch")
    return kernels if available and supported and x.dtype != torch.float64 else "torch"


@contextmanager
def force_backend(name: str | None) -> Iterator[None]:
    """Overrules the device in :func:`choose_backend`, for measurements and tests.

    Args:
        name: "torch" to use no kernels, the name of kernels to use them on any device (on a CPU: Triton's interpreter),
            or None to decide by device.
    """
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def is_forced() -> bool:
    """Whether :func:`force_backend` is in effect."""
    return _forced is not None


@torch.compiler.assume_constant_result  # recorded when code is compiled, not on every call
def record(operation: str, backend: str) -> str:
    """Records that ``backend`` computes ``operation`` in this process; returns ``backend``."""
    backends = _recorded.setdefault(operation, [])
    if backend not in backends:
        backends.append(backend)
    return backend


def recorded() -> dict[str, list[str]]:
    """Operation -> its backends since the last :func:`reset`, in order of first use."""
    return {operation: list(backends) for operation, backends in sorted(_recorded.items())}


def reset() -> None:
    """Clears what was recorded."""
    _recorded.clear()


def _autocast_device(x: Tensor) -> str:
    return "cpu" if x.device.type == "meta" else x.device.type  # autocast does not know the meta device


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products with ``x``: autocast's for float32 tensors where autocast is enabled, else that of
    ``x``."""
    device = _autocast_device(x)
    if x.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def disable_autocast(x: Tensor) -> torch.autocast:
    """Context on the device of ``x`` in which matrix products keep the dtype of their factors."""
    return torch.autocast(_autocast_device(x), enabled=False)
