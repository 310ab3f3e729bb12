"""Memory of the C library, which training on a CPU allocates and frees by the gigabyte every step; memory in use."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt(3)."""


def peak_memory(device: torch.device) -> int:
    """Bytes, the largest so far: of tensors on a CUDA device, else of the process (its resident set, Linux only; 0
    elsewhere)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not sys.platform.startswith("linux"):
        return 0
    import resource  # not on every system

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _glibc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
        return library if library.mallopt and library.malloc_trim else None
    except (AttributeError, OSError, TypeError):
        return None


@contextmanager
def retain_freed_memory() -> Iterator[None]:
    """Keep large freed blocks for the next step instead of returning them to the system (CPU with glibc only).

    By default glibc returns them to the kernel, which hands them out again page by page, filled with zeros. How often
    depends on what else is allocated, so that models of few layers lost more than deep ones: tiny `nsa` models
    trained a quarter slower per layer in the shrunken runs of the cost card than at full depth (one CPU core, glibc
    2.36). At the end free memory is returned once; the setting itself lasts as long as the process, since glibc
    cannot restore its initial dynamic rule.
    """
    if torch.cuda.is_available() or (library := _glibc()) is None:
        yield
        return
    library.mallopt(M_MMAP_MAX, 0)
    library.mallopt(M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        library.malloc_trim(0)
