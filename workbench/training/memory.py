"""The C library's memory, which a training on a CPU takes and frees by the gigabyte every step."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Settings of glibc's mallopt(3)."""


def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
        return library if library.mallopt and library.malloc_trim else None
    except (AttributeError, OSError, TypeError):
        return None  # not glibc


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within, large blocks that this process frees stay for the next step (on a CPU with glibc; elsewhere nothing happens).

    glibc gives them back to the system, which hands them out again page by page, filled with zeros. How often depends on what else
    lies in memory, so that a model of few layers lost more than one of many: tiny `nsa` models trained a quarter slower a layer
    in the shrunken runs of the cost card than whole (one CPU core, glibc 2.36). At the end what is free is given back once; the
    setting itself lasts as long as the process, since glibc cannot be set to the rule that it starts with.
    """
    if torch.cuda.is_available() or (library := _library()) is None:
        yield
        return
    library.mallopt(M_MMAP_MAX, 0)
    library.mallopt(M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        library.malloc_trim(0)
